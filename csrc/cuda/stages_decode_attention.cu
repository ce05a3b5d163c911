// Stage 1: norm, the projections q, k and v, rotary embedding, new cache entries.
#include "kv_cache.cuh"
#include "stages_decode.cuh"

namespace quicksilver::QS_CUDA {
namespace decode {
namespace {

// A block has columns of q, k or v. The block that completes a head finishes it (finish_head), and one that completes a
// head's key and value writes them to the cache: counters[kHeads + head] counts the columns that are there.
struct Projections : NormedGemm {
  static constexpr bool kPaired = false;
  Linear q, k, v;
  float* q_out = nullptr;
  float* k_out = nullptr;
  float* v_out = nullptr;
  int32_t q_tiles = 0;  // blocks of q; 0: no query is wanted
  int32_t k_tiles = 0;
  float* previous = nullptr;  // gets the rows as they come in, or null
  const int32_t* positions = nullptr;
  const int32_t* sequence = nullptr;
  Norm q_norm, k_norm;
  const float* cosine = nullptr;
  const float* sine = nullptr;
  int32_t heads = 0;
  KvCache cache;
  const int64_t* slots = nullptr;
  int64_t* new_slots = nullptr;  // where slots have yet to be given out
  int32_t* full = nullptr;

  enum class Part { query, key, value };
  QS_DEVICE Part part() const {
    const int32_t block = static_cast<int32_t>(blockIdx.x);
    return block < q_tiles ? Part::query : block < q_tiles + k_tiles ? Part::key : Part::value;
  }
  QS_DEVICE const Linear& linear() const { return part() == Part::query ? q : part() == Part::key ? k : v; }

  QS_DEVICE Panel panel(int p) const {
    const int32_t before = part() == Part::query ? 0 : part() == Part::key ? q_tiles : q_tiles + k_tiles;
    return panel_of(linear().weight, x, 2 * (static_cast<int32_t>(blockIdx.x) - before) + p);
  }

  QS_DEVICE int32_t tasks(int32_t count) const { return NormedGemm::tasks(count) + (new_slots ? 1 : 0); }
  QS_DEVICE void perform(int32_t task, int32_t count, void* scratch) const {
    static_assert(kScratchBytes >= 4 * kAllocateShared && kThreads == kAllocateThreads);
    if (task == NormedGemm::tasks(count)) {
      return allocate_slots(cache, active, count, sequence, positions, new_slots, full, static_cast<int32_t*>(scratch));
    }
    NormedGemm::perform(task, count, scratch);
    if (previous == nullptr) return;
    const int32_t row = task / parts_of(x);
    const int64_t begin = task % parts_of(x) * kPartValues, end = minimum(begin + kPartValues, x.k);
    for (int64_t column = begin + threadIdx.x; column < end; column += kThreads) {
      store(previous + row * x.k + column, load(input(row) + column));
    }
  }

  QS_DEVICE void write(int32_t i, int64_t column, float sum, bool valid) const {
    if (!valid) return;
    const Linear& of = linear();
    float* const y = part() == Part::query ? q_out : part() == Part::key ? k_out : v_out;
    store(y + i * of.weight.n + column, of.bias ? add_rn(sum, load(of.bias + column)) : sum);
  }

  QS_DEVICE void finish(int64_t from, int64_t to, int32_t count, void* scratch) const {
    const bool query = part() == Part::query;
    const Norm& head_norm = query ? q_norm : k_norm;
    if (query && cosine == nullptr && head_norm.weight == nullptr) return;
    const int32_t size = static_cast<int32_t>(cache.head_size);
    const int32_t begin = static_cast<int32_t>(from), end = static_cast<int32_t>(to);
    const int32_t first = begin / size, some = (end - 1) / size - first + 1;  // heads, at most 32
    bool* const complete = static_cast<bool*>(scratch);
    if (static_cast<int32_t>(threadIdx.x) < some) {
      const int32_t head = first + static_cast<int32_t>(threadIdx.x);
      const int32_t columns = minimum(end, (head + 1) * size) - maximum(begin, head * size);
      int32_t* const counter = counters + kHeads + (query ? head : heads + head);
      fence();  // covers the whole block's stores: they came before a barrier
      const bool last = atomic_add(counter, columns) + columns == (query ? size : 2 * size);
      if (last) quicksilver::QS_CUDA::store(counter, 0);
      fence();  // and what follows sees the other blocks' stores
      store_shared(complete + threadIdx.x, last);
    }
    sync_block();
    for (int32_t item = warp(); item < some * count; item += kWarps) {
      const int32_t i = item / some, head = first + item % some;
      if (!load_shared(complete + item % some)) continue;
      float* const vector = query ? q_out + (i * heads + head) * size : k_out + (i * cache.kv_heads + head) * size;
      finish_head(vector, size, head_norm, cosine, sine, load(positions + row_of(i)));
      if (query) continue;
      const float* const value = v_out + (i * cache.kv_heads + head) * size;
      scatter_vector(
          cache, load(slots + i), head, [&](int64_t e) { return load(vector + e); },
          [&](int64_t e) { return load(value + e); });
    }
  }
};

}  // namespace
}  // namespace decode

void decode_attention_input(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
                            const DeviceWorkspace& work, bool with_query, Stream stream) {
  decode::Projections stage;
  decode::fill(stage, rows, count, layer.k.weight, layer.attention_norm, work);
  stage.q = layer.q;
  stage.k = layer.k;
  stage.v = layer.v;
  stage.q_out = work.q;
  stage.k_out = work.k;
  stage.v_out = work.v;
  stage.q_tiles = with_query ? static_cast<int32_t>(decode::tiles_of(layer.q.weight)) : 0;
  stage.k_tiles = static_cast<int32_t>(decode::tiles_of(layer.k.weight));
  stage.previous = with_query ? work.previous : nullptr;
  stage.positions = rows.positions;
  stage.sequence = rows.sequence;
  stage.q_norm = layer.q_norm;
  stage.k_norm = layer.k_norm;
  stage.cosine = layer.cosine;
  stage.sine = layer.sine;
  stage.heads = static_cast<int32_t>(layer.heads);
  stage.cache = cache;
  stage.slots = rows.slots ? rows.slots : work.slots;
  stage.new_slots = rows.slots ? nullptr : work.slots;
  stage.full = work.full;
  const int64_t blocks = stage.q_tiles + stage.k_tiles + decode::tiles_of(layer.v.weight);
  decode::launch_stage("decode_attention_input", stage, blocks, stream);
}

}  // namespace quicksilver::QS_CUDA
