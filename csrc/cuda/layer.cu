// The five stages of a layer: the decode kernels for few rows, and for more rows a composition of the mechanisms'
// kernels. Both give a row the same bits.
#include "kv_cache.cuh"
#include "launch.cuh"
#include "matryoshka_prefill.cuh"
#include "quantize.cuh"
#include "stages_decode.cuh"

namespace quicksilver::QS_CUDA {
namespace {

// --- work memory -----------------------------------------------------------------------------------------------------

// Hands out parts of a buffer, or without one adds up what they need.
class Carver {
 public:
  explicit Carver(void* buffer) : start_(static_cast<char*>(buffer)) {}

  template <class T>
  void take(T*& pointer, int64_t bytes) {
    constexpr int64_t kAlign = 128;
    if (start_) pointer = reinterpret_cast<T*>(start_ + bytes_);
    bytes_ += (bytes + kAlign - 1) / kAlign * kAlign;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* start_;
  int64_t bytes_ = 0;
};

int64_t carve(void* buffer, const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries,
              DeviceWorkspace& work) {
  if (decode::kHeads + layer.heads + layer.kv_heads > kCounters) {
    throw std::invalid_argument("work memory is for layers of up to " + std::to_string(kCounters - decode::kHeads) +
                                " heads, and this one has " + std::to_string(layer.heads + layer.kv_heads));
  }
  const int64_t query = layer.heads * layer.head_size, key = layer.kv_heads * layer.head_size;
  int64_t widest = layer.d;
  for (const int64_t columns : {query, layer.ffn}) widest = columns > widest ? columns : widest;
  Attention params;
  params.heads = layer.heads;
  params.count = rows;
  params.cache.kv_heads = layer.kv_heads;
  params.cache.head_size = layer.head_size;
  params.cache.sequences = sequences;
  params.cache.block_size = 1;
  params.cache.max_blocks = max_entries;

  Carver carver(buffer);
  carver.take(work.counters, kCounters * 4);
  carver.take(work.attention_scratch, attention_scratch_bytes(params));
  carver.take(work.previous, rows * layer.d * 4);
  carver.take(work.q, rows * query * 4);
  carver.take(work.k, rows * key * 4);
  carver.take(work.v, rows * key * 4);
  carver.take(work.attention, rows * query * 4);
  carver.take(work.inner, rows * layer.ffn * 4);
  if (rows > kDecodeRows) carver.take(work.gate, rows * layer.ffn * 4);
  carver.take(work.slots, rows * 8);
  carver.take(work.full, 4);
  carver.take(work.drift, rows * 4);
  carver.take(work.drift_parts, rows * ((layer.d + 15) / 16) * 8);
  carver.take(work.quantized, quantized_rows_bytes(rows, widest, 32));  // the smallest groups want most
  work.rows = rows;
  work.sequences = sequences;
  work.max_entries = max_entries;
  work.d = layer.d;
  work.heads = layer.heads;
  work.kv_heads = layer.kv_heads;
  work.head_size = layer.head_size;
  work.ffn = layer.ffn;
  return carver.bytes();
}

// What a call wants of work memory, compared with what that was carved for.
void check(int64_t wanted, int64_t has, const char* what) {
  if (wanted <= has) return;
  throw std::invalid_argument("work memory is for " + std::to_string(has) + ' ' + what + ", and the call has " +
                              std::to_string(wanted));
}
void check_width(int64_t wanted, const Rows& rows, int64_t has, const DeviceWorkspace& work, const char* what) {
  check(rows.count, work.rows, "active rows");
  check(wanted, has, what);
}
void check_hidden(int64_t d, const Rows& rows, const DeviceWorkspace& work) {
  check_width(d, rows, work.d, work, "values of a hidden state");
}
void check_heads(const Layer& layer, const Rows& rows, const DeviceWorkspace& work) {
  check_width(layer.heads * layer.head_size, rows, work.heads * work.head_size, work, "values of a row's queries");
  check(layer.kv_heads * layer.head_size, work.kv_heads * work.head_size, "values of a row's keys");
  check(layer.heads + layer.kv_heads, work.heads + work.kv_heads, "heads");
}
void check_inner(const Layer& layer, const Rows& rows, const DeviceWorkspace& work) {
  check_width(layer.ffn, rows, work.ffn, work, "values inside the MLP");
}
// Attention's counters lie where the numbers of sequences and heads say.
void check_same(int64_t wanted, int64_t has, const char* what) {
  if (wanted == has) return;
  throw std::invalid_argument("work memory is for a cache of " + std::to_string(has) + ' ' + what +
                              ", and the call's has " + std::to_string(wanted));
}

// --- stages of many rows ---------------------------------------------------------------------------------------------

QuantizedRows quantized(const RowInput& input, const Rows& rows, const int32_t* count, const MatryoshkaWeight& weight,
                        const DeviceWorkspace& work, Stream stream) {
  const QuantizedRows x = carve_quantized_rows(work.quantized, rows.count, weight.k, weight.group);
  quantize_rows(input, x, count, stream);
  return x;
}

RowInput normed(const Norm& norm, const Rows& rows, int64_t d) {
  RowInput input;
  input.x = rows.hidden;
  input.stride = d;
  input.index = rows.active;
  input.norm = norm;
  return input;
}

// A product that writes compact rows of its own width.
MatryoshkaGemm product(const Linear& linear, const QuantizedRows& x, const Rows& rows, float* y) {
  MatryoshkaGemm gemm;
  gemm.x = x;
  gemm.w = linear.weight;
  gemm.bits = rows.bits;
  gemm.bias = linear.bias;
  gemm.y = y;
  gemm.y_stride = linear.weight.n;
  return gemm;
}

// hidden += linear(input)
void add_product(const Linear& linear, const RowInput& input, const Rows& rows, const int32_t* count,
                 const DeviceWorkspace& work, Stream stream) {
  const QuantizedRows x = quantized(input, rows, count, linear.weight, work, stream);
  PrefillGemm gemm;
  gemm.products[0] = product(linear, x, rows, rows.hidden);
  gemm.products[0].residual = rows.hidden;
  gemm.products[0].out_index = rows.active;
  gemm.count = 1;
  gemm.bits_index = rows.active;
  prefill_gemm(gemm, count, stream);
}

struct Heads {
  float* q;  // null: no query
  float* k;
  const float* v;
  int32_t heads, kv_heads, head_size;
  Norm q_norm, k_norm;  // no weight: none
  const float* cosine;  // null: no rotary embedding
  const float* sine;
  const int32_t* active;
  const int32_t* positions;
  const int64_t* slots;
  KvCache cache;
  int64_t rows;
  const int32_t* count;
};

constexpr int kHeadsThreads = 256;

// A warp per row and head of q or k: finishes it; k's goes to the cache, together with v's. Four blocks are enough to
// hide the loads; asked for nothing, the compiler spills to fit six.
QS_KERNEL void __launch_bounds__(kHeadsThreads, 4) finish_heads_kernel(Heads p) {
  const int32_t query_heads = p.q ? p.heads : 0, heads = query_heads + p.kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kHeadsThreads / kWarp) + warp();
  const int64_t i = item / heads, head = item % heads - query_heads;
  if (i >= (p.count ? load(p.count) : p.rows)) return;  // whole warps, which share nothing
  float* const x =
      head < 0 ? p.q + (i * p.heads + head + p.heads) * p.head_size : p.k + (i * p.kv_heads + head) * p.head_size;
  const int64_t position = load(p.positions + (p.active ? load(p.active + i) : i));
  finish_head(x, p.head_size, head < 0 ? p.q_norm : p.k_norm, p.cosine, p.sine, position);
  if (head < 0) return;
  const float* const v = p.v + (i * p.kv_heads + head) * p.head_size;
  scatter_vector(
      p.cache, load(p.slots + i), head, [&](int64_t e) { return load(x + e); }, [&](int64_t e) { return load(v + e); });
}

// Norm, projections, the heads' norms, rotary embedding, new cache entries; without the query where only entries are
// wanted.
void project(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
             const DeviceWorkspace& work, bool with_query, Stream stream) {
  if (rows.count <= 0) return;
  check_hidden(layer.d, rows, work);
  check_heads(layer, rows, work);
  if (rows.count <= kDecodeRows) {
    return decode_attention_input(layer, rows, count, cache, work, with_query, stream);
  }
  if (rows.slots == nullptr) {
    kv_allocate(cache, rows.active, rows.count, rows.sequence, rows.positions, work.slots, count, work.full, stream);
  }
  RowInput input = normed(layer.attention_norm, rows, layer.d);
  if (with_query) input.copy = work.previous;
  const QuantizedRows x = quantized(input, rows, count, layer.k.weight, work, stream);
  PrefillGemm gemm;
  gemm.bits_index = rows.active;
  if (with_query) gemm.products[gemm.count++] = product(layer.q, x, rows, work.q);
  gemm.products[gemm.count++] = product(layer.k, x, rows, work.k);
  gemm.products[gemm.count++] = product(layer.v, x, rows, work.v);
  prefill_gemm(gemm, count, stream);

  Heads heads = {};
  heads.q = with_query ? work.q : nullptr;
  heads.k = work.k;
  heads.v = work.v;
  heads.heads = static_cast<int32_t>(layer.heads);
  heads.kv_heads = static_cast<int32_t>(layer.kv_heads);
  heads.head_size = static_cast<int32_t>(layer.head_size);
  heads.q_norm = layer.q_norm;
  heads.k_norm = layer.k_norm;
  heads.cosine = layer.cosine;
  heads.sine = layer.sine;
  heads.active = rows.active;
  heads.positions = rows.positions;
  heads.slots = rows.slots ? rows.slots : work.slots;
  heads.cache = cache;
  heads.rows = rows.count;
  heads.count = count;
  const int64_t items = rows.count * (layer.kv_heads + (with_query ? layer.heads : 0));
  const Dim grid = blocks_in_x(items, kHeadsThreads / kWarp);
  launch("finish_heads", finish_heads_kernel, grid, kHeadsThreads, 0, stream, heads);
}

}  // namespace

int64_t workspace_bytes(const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries) {
  DeviceWorkspace work;
  return carve(nullptr, layer, rows, sequences, max_entries, work);
}

DeviceWorkspace carve_workspace(void* buffer, const Layer& layer, int64_t rows, int64_t sequences,
                                int64_t max_entries) {
  DeviceWorkspace work;
  carve(buffer, layer, rows, sequences, max_entries, work);
  return work;
}

void attention_input(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
                     const DeviceWorkspace& work, Stream stream) {
  project(layer, rows, count, cache, work, true, stream);
}

void write_kv(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
              const DeviceWorkspace& work, Stream stream) {
  project(layer, rows, count, cache, work, false, stream);
}

void attention(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
               const DeviceWorkspace& work, float* log_sum_exp, Stream stream) {
  if (rows.count <= 0) return;
  check_heads(layer, rows, work);
  check_same(layer.heads, work.heads, "heads");
  check_same(cache.sequences, work.sequences, "sequences");
  check(cache.max_blocks * cache.block_size, work.max_entries, "entries of a sequence");
  Attention params;
  params.query = work.q;
  params.query_stride = layer.heads * layer.head_size;
  params.heads = layer.heads;
  params.count = rows.count;
  params.index = rows.active;
  params.query_positions = rows.positions;
  params.query_sequence = rows.sequence;
  params.scale = layer.attention_scale;
  params.cache = cache;
  params.out = work.attention;
  params.out_stride = layer.heads * layer.head_size;
  params.log_sum_exp = log_sum_exp;
  compacted_attention(params, count, work.attention_scratch, stream);
}

void attention_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                      Stream stream) {
  if (rows.count <= 0) return;
  check_heads(layer, rows, work);
  if (rows.count <= kDecodeRows) return decode_attention_output(layer, rows, count, work, stream);
  RowInput input;
  input.x = work.attention;
  input.stride = layer.heads * layer.head_size;
  add_product(layer.o, input, rows, count, work, stream);
}

void mlp_input(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work, Stream stream) {
  if (rows.count <= 0) return;
  check_hidden(layer.d, rows, work);
  check_inner(layer, rows, work);
  if (rows.count <= kDecodeRows) return decode_mlp_input(layer, rows, count, work, stream);
  const QuantizedRows x = quantized(normed(layer.mlp_norm, rows, layer.d), rows, count, layer.up.weight, work, stream);
  PrefillGemm gemm;
  gemm.count = 1;
  gemm.bits_index = rows.active;
  gemm.finish = Finish::activation;
  gemm.activation = layer.activation;
  if (layer.activation == Activation::silu_gated) {
    gemm.products[0] = product(layer.gate, x, rows, work.gate);
    gemm.finish = Finish::none;
    prefill_gemm(gemm, count, stream);
    gemm.finish = Finish::silu_gated;
    gemm.gate = work.gate;
  }
  gemm.products[0] = product(layer.up, x, rows, work.inner);
  prefill_gemm(gemm, count, stream);
}

void mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work, int32_t* depth,
                const DeviceHalting* halting, Stream stream) {
  if (rows.count <= 0) return;
  check_hidden(layer.d, rows, work);
  check_inner(layer, rows, work);
  if (rows.count <= kDecodeRows) return decode_mlp_output(layer, rows, count, work, depth, halting, stream);
  RowInput input;
  input.x = work.inner;
  input.stride = layer.ffn;
  input.depth = depth;
  input.depth_index = rows.active;
  add_product(layer.down, input, rows, count, work, stream);
  if (halting == nullptr) return;

  HaltingUpdate update;
  update.hidden = rows.hidden;
  update.previous = work.previous;
  update.stride = update.previous_stride = update.d = layer.d;
  update.active = rows.active;
  update.count = rows.count;
  update.previous_compact = true;
  update.positions = rows.positions;
  update.overrides = halting->overrides;
  update.drift_threshold = halting->drift_threshold;
  update.entropy_threshold = halting->entropy_threshold;
  update.relative = halting->relative;
  update.sink_tokens = halting->sink_tokens;
  update.drift = work.drift;
  update.halted = halting->halted;
  update.next_active = halting->active;
  if (halting->tests_entropy) {
    float* const entropy = work.drift_parts;  // which only decode wants
    softmax_entropy(rows.hidden, layer.d, rows.active, rows.count, layer.d, entropy, count, stream);
    update.entropy = entropy;
  }
  halting_update(update, count, halting->count, work.counters, stream);
}

void lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d, float* logits,
             int64_t logits_stride, const DeviceWorkspace& work, Stream stream) {
  if (rows.count <= 0) return;
  check_hidden(d, rows, work);
  if (rows.count <= kDecodeRows) {
    return decode_lm_head(norm, head, rows, count, d, logits, logits_stride, work, stream);
  }
  const QuantizedRows x = quantized(normed(norm, rows, d), rows, count, head.weight, work, stream);
  PrefillGemm gemm;
  gemm.count = 1;
  gemm.products[0] = product(head, x, rows, logits);
  gemm.products[0].bits = nullptr;  // all that the head's weight has
  gemm.products[0].y_stride = logits_stride;
  prefill_gemm(gemm, count, stream);
}

}  // namespace quicksilver::QS_CUDA
