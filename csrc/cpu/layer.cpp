// The stages of a decoder layer, each in one to three parallel regions.
#include "quicksilver/layer.h"

#include "kernels.h"
#include "norm.h"
#include "quantize.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

int64_t row_of(const Rows& rows, int64_t i) { return rows.active ? rows.active[i] : i; }

// A product of rows that have yet to be quantized, which writes compact rows of its own width.
MatryoshkaGemm product(const Linear& linear, const int32_t* bits, float* y) {
  MatryoshkaGemm gemm;
  gemm.w = linear.weight;
  gemm.bits = bits;
  gemm.bias = linear.bias;
  gemm.y = y;
  gemm.y_stride = linear.weight.n;
  return gemm;
}

constexpr int kMaxProducts = 3;
// A single row that needs no more than this is quantized by every share of the products for itself: cheaper than a
// region.
constexpr int64_t kOwnBytes = 48 * 1024;

// Products of the same rows: source_of(i) gives row i, which is quantized into `memory`. also(worker, workers) is done
// in their region, before them.
template <class SourceOf, class Also>
void multiply(MatryoshkaGemm* gemms, int count, int64_t rows, void* memory, const SourceOf& source_of,
              const Also& also) {
  const int64_t k = gemms[0].w.k;
  const int32_t group = gemms[0].w.group;
  const QuantizedRows shared = carve_quantized_rows(memory, rows, k, group);
  for (int i = 0; i < count; ++i) gemms[i].x = shared;
  const bool alone = rows == 1 && quantized_rows_bytes(1, k, group) <= kOwnBytes;
  if (!alone) {
    in_parallel(rows, k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) quantize_row(shared, i, source_of(i), [] {});
    });
  }
  on_all_threads([&](int worker, int workers) {
    also(worker, workers);
    if (!alone) return gemm_worker(gemms, count, worker, workers);
    alignas(64) char own[kOwnBytes];
    MatryoshkaGemm mine[kMaxProducts];
    for (int i = 0; i < count; ++i) {
      mine[i] = gemms[i];
      mine[i].x = carve_quantized_rows(own, 1, k, group);
    }
    FirstWeights first = first_weights(mine, count, worker, workers);
    quantize_row(mine[0].x, 0, source_of(0), [&] { first.fetch(); });
    gemm_worker(mine, count, worker, workers);
  });
  gemm_count(gemms, count);
}

template <class SourceOf>
void multiply(MatryoshkaGemm* gemms, int count, int64_t rows, void* memory, const SourceOf& source_of) {
  multiply(gemms, count, rows, memory, source_of, [](int, int) {});
}

// bits of the active rows, or null
const int32_t* compact_bits(const Rows& rows, Workspace& work) {
  if (rows.bits == nullptr) return nullptr;
  for (int64_t i = 0; i < rows.count; ++i) work.bits[i] = rows.bits[row_of(rows, i)];
  return work.bits;
}

// Pairs (i, i + size / 2) of one head, turned.
void rotate(float* x, int64_t size, const float* cosine, const float* sine) {
  const int64_t half = size / 2;
  for (int64_t k = 0; k < half; k += 16) {
    const int n = half - k < 16 ? static_cast<int>(half - k) : 16;
    const f32x16 a = load(x + k, n), b = load(x + half + k, n), c = load(cosine + k, n), s = load(sine + k, n);
    store(x + k, a * c - b * s, n);
    store(x + half + k, b * c + a * s, n);
  }
}

void normalize(const Norm& norm, float* x, int64_t size) {
  const NormSource source = norm_source(norm, x, size);
  for (int64_t k = 0; k < size; k += 16) {
    const int n = size - k < 16 ? static_cast<int>(size - k) : 16;
    store(x + k, source(k, n), n);
  }
}

// Norm, projections, the heads' norms, rotary embedding, new cache entries; without the query where only entries are
// wanted.
bool project(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work, bool with_query) {
  if (rows.count <= 0) return true;
  work.reserve(layer, rows.count);
  const int64_t* slots = rows.slots;
  if (slots == nullptr) {
    if (!QS_ISA::kv_allocate(cache, rows.active, rows.count, rows.sequence, rows.positions, work.slots)) return false;
    slots = work.slots;
  }
  const int32_t* bits = compact_bits(rows, work);
  const int64_t size = layer.head_size;
  MatryoshkaGemm gemms[] = {product(layer.q, bits, work.q), product(layer.k, bits, work.k),
                            product(layer.v, bits, work.v)};
  const int skip = with_query ? 0 : 1;
  const auto source_of = [&](int64_t i) {
    return norm_source(layer.attention_norm, rows.hidden + row_of(rows, i) * layer.d, layer.d);
  };
  const auto keep_previous = [&](int worker, int workers) {
    const Range part = split(with_query ? rows.count : 0, worker, workers);
    for (int64_t i = part.begin; i < part.end; ++i) {
      memcpy(work.previous + i * layer.d, rows.hidden + row_of(rows, i) * layer.d, static_cast<size_t>(layer.d) * 4);
    }
  };
  multiply(gemms + skip, 3 - skip, rows.count, work.quantized, source_of, keep_previous);

  KvScatter scatter;
  scatter.key = work.k;
  scatter.value = work.v;
  scatter.key_stride = scatter.value_stride = layer.kv_heads * size;
  scatter.slots = slots;
  scatter.count = rows.count;
  scatter.cache = cache;

  const int64_t query_heads = with_query ? layer.heads : 0;
  const int64_t heads = query_heads + layer.kv_heads;
  in_parallel(rows.count * heads, size * 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / heads, head = item % heads - query_heads;
      float* x_head = head < 0 ? work.q + (i * layer.heads + head + query_heads) * size
                               : work.k + (i * layer.kv_heads + head) * size;
      const Norm& norm = head < 0 ? layer.q_norm : layer.k_norm;
      if (norm.weight) normalize(norm, x_head, size);
      if (layer.cosine) {
        const int64_t at = rows.positions[row_of(rows, i)] * (size / 2);
        rotate(x_head, size, layer.cosine + at, layer.sine + at);
      }
      if (head >= 0) kv_scatter_heads(scatter, i, head, head + 1);
    }
  });
  return true;
}

// hidden += linear(rows from source_of)
template <class SourceOf>
void add_product(const Linear& linear, const Rows& rows, int64_t d, Workspace& work, const SourceOf& source_of) {
  MatryoshkaGemm gemm = product(linear, compact_bits(rows, work), rows.hidden);
  gemm.residual = rows.hidden;
  gemm.y_stride = d;
  gemm.out_index = rows.active;
  multiply(&gemm, 1, rows.count, work.quantized, source_of);
}

}  // namespace

bool attention_input(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
  return project(layer, rows, cache, work, true);
}

bool write_kv(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
  return project(layer, rows, cache, work, false);
}

void attention(const Layer& layer, const Rows& rows, const KvCache& cache, Workspace& work, float* log_sum_exp) {
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
  QS_ISA::compacted_attention(params);
}

void attention_output(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  const int64_t width = layer.heads * layer.head_size;
  add_product(layer.o, rows, layer.d, work, [&](int64_t i) {
    const float* row = work.attention + i * width;
    return [row](int64_t k, int n) { return load(row + k, n); };
  });
}

void mlp_input(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  const int32_t* bits = compact_bits(rows, work);
  MatryoshkaGemm gemms[] = {product(layer.gate, bits, work.gate), product(layer.up, bits, work.up)};
  const int skip = layer.activation == Activation::silu_gated ? 0 : 1;
  multiply(gemms + skip, 2 - skip, rows.count, work.quantized,
           [&](int64_t i) { return norm_source(layer.mlp_norm, rows.hidden + row_of(rows, i) * layer.d, layer.d); });
}

void mlp_output(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  const auto add = [&](const auto& source_of) { add_product(layer.down, rows, layer.d, work, source_of); };
  const auto up = [&](int64_t i) { return work.up + i * layer.ffn; };
  switch (layer.activation) {
    case Activation::silu_gated:
      return add([&](int64_t i) { return SiluSource{work.gate + i * layer.ffn, up(i)}; });
    case Activation::gelu_tanh:
      return add([&](int64_t i) { return GeluSource{up(i)}; });
    case Activation::gelu:
      return add([&](int64_t i) { return ErfGeluSource{up(i)}; });
    case Activation::relu:
      return add([&](int64_t i) { return ReluSource{up(i)}; });
  }
}

int64_t run_layers(const Layer* const* layers, KvCache* const* caches, int64_t count, const Rows& rows,
                   Workspace& work) {
  for (int64_t i = 0; i < count; ++i) {
    const Layer& layer = *layers[i];
    if (!QS_ISA::attention_input(layer, rows, *caches[i], work)) return i;
    QS_ISA::attention(layer, rows, *caches[i], work, nullptr);
    QS_ISA::attention_output(layer, rows, work);
    QS_ISA::mlp_input(layer, rows, work);
    QS_ISA::mlp_output(layer, rows, work);
  }
  return count;
}

void lm_head(const Norm& norm, const Linear& head, const Rows& rows, int64_t d, float* logits, int64_t logits_stride,
             Workspace& work) {
  if (rows.count <= 0) return;
  MatryoshkaGemm gemm = product(head, nullptr, logits);
  gemm.y_stride = logits_stride;
  multiply(&gemm, 1, rows.count, work.quantized,
           [&](int64_t i) { return norm_source(norm, rows.hidden + row_of(rows, i) * d, d); });
}

int64_t argmax(const float* x, int64_t n) {
  // Per lane: the largest so far, where its sixteen values began, and whether
  // all were numbers.
  f32x16 top = broadcast(-__builtin_inff());
  i32x16 where = broadcast(0), numbers = broadcast(-1);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 a = load(x + i);
    numbers = numbers & ordered(a);
    QS_PARTS(part) {
      const ni larger = a.v[part] > top.v[part];
      top.v[part] = larger ? a.v[part] : top.v[part];
      where.v[part] = larger ? broadcast_ni(static_cast<int32_t>(i)) : where.v[part];
    }
  }
  int64_t best = 0;
  float largest = i > 0 ? max_lane(top) : x[0];
  if (i > 0) {
    float values[16];
    int32_t starts[16];
    store(values, top);
    store(starts, where);
    best = n;
    for (int lane = 0; lane < 16; ++lane) {
      if (values[lane] == largest && starts[lane] + lane < best) best = starts[lane] + lane;
    }
  }
  bool nan = sum(numbers) != -16;
  for (; i < n; ++i) {
    if (x[i] > largest) {
      largest = x[i];
      best = i;
    }
    nan |= x[i] != x[i];
  }
  for (i = 0; nan && i < n; ++i) {
    if (x[i] != x[i]) return i;
  }
  return best;
}

}  // namespace quicksilver::QS_ISA
