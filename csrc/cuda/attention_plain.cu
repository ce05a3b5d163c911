// Attention in fp32 FMAs, for caches of any type and heads of up to kMaxSize values: what tensor cores don't take. A
// block has one query and head, and one or more splits of its sequence.
#include "attention.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kMaxSize = 256;
constexpr int kTogether = 4;  // entries whose loads a warp has under way at once

struct PlainShared {
  float query[kMaxSize];
  int64_t vector[kSplit];  // -1: not visible
  float weight[kSplit];    // the score, then the probability
  float parts[kAttentionWarps][kMaxSize];
  float top[kAttentionWarps], sum[kAttentionWarps];
  bool last;
};

template <KvType kType>
QS_DEVICE float element(const void* array, int64_t at) {
  if constexpr (kType == KvType::f32) return load(static_cast<const float*>(array) + at);
  if constexpr (kType == KvType::f16) return half_to_float(load(static_cast<const uint16_t*>(array) + at));
  if constexpr (kType == KvType::bf16) return bfloat_to_float(load(static_cast<const uint16_t*>(array) + at));
  return static_cast<float>(load(static_cast<const int8_t*>(array) + at));
}

QS_DEVICE void find_visible(const KvCache& cache, int64_t sequence, int64_t kv_head, int32_t position, int split,
                            int entries, int64_t* vectors) {
  const unsigned block_size = static_cast<unsigned>(cache.block_size);
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kAttentionThreads) {
    const unsigned entry = static_cast<unsigned>(split * kSplit + i);
    const int64_t block = load(cache.block_table + sequence * cache.max_blocks + entry / block_size);
    const int64_t slot = block * block_size + entry % block_size;
    const bool visible = has_block(cache, block) && load(cache.positions + slot) <= position &&
                         (!cache.until || position < load(cache.until + slot));
    store_shared(vectors + i, visible ? (block * cache.kv_heads + kv_head) * block_size + entry % block_size : -1);
  }
}

// One split. Every thread gets the softmax; out: of columns threadIdx.x and threadIdx.x + 128. Barriers inside, one of
// them before anything is written to shared memory, none at the end.
template <KvType kType>
QS_DEVICE Softmax attend_split(const Attention& params, int64_t sequence, int64_t kv_head, int32_t position, int split,
                               int entries, PlainShared* shared, float (&out)[kMaxSize / kAttentionThreads]) {
  const KvCache& cache = params.cache;
  const int size = static_cast<int>(cache.head_size);
  sync_block();
  find_visible(cache, sequence, kv_head, position, split, entries, shared->vector);
  sync_block();

  for (int first = warp() * kTogether; first < entries; first += kAttentionWarps * kTogether) {
    int64_t vector[kTogether];
    float dot[kTogether] = {};
    QS_UNROLL
    for (int e = 0; e < kTogether; ++e) {
      vector[e] = first + e < entries ? load_shared(&shared->vector[first + e]) : -1;
    }
    for (int k = lane(); k < size; k += kWarp) {
      const float q = load_shared(&shared->query[k]);
      QS_UNROLL
      for (int e = 0; e < kTogether; ++e) {
        if (vector[e] >= 0) dot[e] = fma_rn(q, element<kType>(cache.key, vector[e] * size + k), dot[e]);
      }
    }
    QS_UNROLL
    for (int e = 0; e < kTogether; ++e) {
      float score = mul_rn(warp_sum(dot[e]), params.scale);
      if (kType == KvType::i8 && vector[e] >= 0) score = mul_rn(score, load(cache.key_scale + vector[e]));
      if (lane() == 0 && first + e < entries) store_shared(&shared->weight[first + e], score);
    }
  }
  sync_block();

  Softmax softmax;
  float score[kSplit / kAttentionThreads];
  QS_UNROLL
  for (int j = 0; j < kSplit / kAttentionThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kAttentionThreads;
    const bool visible = i < entries && load_shared(&shared->vector[i]) >= 0;
    score[j] = visible ? load_shared(&shared->weight[i]) : kMinusInfinity;
    softmax.top = maximum(softmax.top, score[j]);
  }
  softmax.top = warp_max(softmax.top);
  if (lane() == 0) store_shared(&shared->top[warp()], softmax.top);
  sync_block();
  QS_UNROLL
  for (int w = 0; w < kAttentionWarps; ++w) softmax.top = maximum(softmax.top, load_shared(&shared->top[w]));
  QS_UNROLL
  for (int j = 0; j < kSplit / kAttentionThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kAttentionThreads;
    if (i >= entries || load_shared(&shared->vector[i]) < 0) continue;
    float weight = exp(sub_rn(score[j], softmax.top));
    softmax.sum = add_rn(softmax.sum, weight);
    if (kType == KvType::i8) weight = mul_rn(weight, load(cache.value_scale + load_shared(&shared->vector[i])));
    store_shared(&shared->weight[i], weight);
  }
  softmax.sum = warp_sum(softmax.sum);
  if (lane() == 0) store_shared(&shared->sum[warp()], softmax.sum);
  sync_block();
  softmax.sum = 0;
  QS_UNROLL
  for (int w = 0; w < kAttentionWarps; ++w) softmax.sum = add_rn(softmax.sum, load_shared(&shared->sum[w]));

  // Each warp adds up a quarter of the entries' values, and then the warps' sums are added in order.
  for (int k = lane(); k - lane() < size; k += kWarp) {
    float sum = 0;
    for (int first = warp() * kTogether; first < entries; first += kAttentionWarps * kTogether) {
      float value[kTogether], weight[kTogether];
      QS_UNROLL
      for (int e = 0; e < kTogether; ++e) {
        const int64_t vector = first + e < entries ? load_shared(&shared->vector[first + e]) : -1;
        const bool visible = vector >= 0 && k < size;
        value[e] = visible ? element<kType>(cache.value, vector * size + k) : 0.0f;
        weight[e] = visible ? load_shared(&shared->weight[first + e]) : 0.0f;
      }
      QS_UNROLL
      for (int e = 0; e < kTogether; ++e) sum = fma_rn(weight[e], value[e], sum);
    }
    store_shared(&shared->parts[warp()][k], sum);
  }
  sync_block();
  QS_UNROLL
  for (int j = 0; j < kMaxSize / kAttentionThreads; ++j) {
    const int k = static_cast<int>(threadIdx.x) + j * kAttentionThreads;
    if (k >= size) continue;
    out[j] = load_shared(&shared->parts[0][k]);
    QS_UNROLL
    for (int w = 1; w < kAttentionWarps; ++w) out[j] = add_rn(out[j], load_shared(&shared->parts[w][k]));
  }
  return softmax;
}

template <KvType kType>
QS_KERNEL void __launch_bounds__(kAttentionThreads, 6)
    attention_plain_kernel(Attention params, const int32_t* count, AttentionScratch scratch) {
  const KvCache& cache = params.cache;
  PlainShared* shared = shared_memory<PlainShared>();
  // In the grid: head by head, in it query by query, and then the blocks that share the splits.
  const int share = static_cast<int>(blockIdx.x) % scratch.blocks, rest = static_cast<int>(blockIdx.x) / scratch.blocks;
  const int queries = static_cast<int>(params.count);
  const int64_t i = rest % queries, head = rest / queries;
  if (i >= row_count(params, count)) return;
  const int size = static_cast<int>(cache.head_size);
  const int64_t kv_head = head / (params.heads / cache.kv_heads);
  const int32_t row = batch_row(params, i);
  const int32_t sequence = load(params.query_sequence + row), position = load(params.query_positions + row);
  const int length = length_of(cache, sequence);
  const int splits = (length + kSplit - 1) / kSplit;
  const int blocks = splits < 1 ? 1 : splits < scratch.blocks ? splits : scratch.blocks;
  if (share >= blocks) return;
  for (int k = static_cast<int>(threadIdx.x); k < size; k += kAttentionThreads) {
    store_shared(&shared->query[k], load(params.query + i * params.query_stride + head * size + k));
  }

  // A block that has all splits merges them as it goes.
  const bool alone = blocks == 1;
  Softmax total;
  float merged[kMaxSize / kAttentionThreads] = {};
  for (int split = share; split < splits; split += blocks) {
    const int entries = length - split * kSplit < kSplit ? length - split * kSplit : kSplit;
    float out[kMaxSize / kAttentionThreads];
    const Softmax softmax = attend_split<kType>(params, sequence, kv_head, position, split, entries, shared, out);
    const int64_t part = (i * params.heads + head) * scratch.splits + split;
    MergeFactors factors = {1, 0};
    if (alone && softmax.sum != 0) factors = merge(total, softmax);
    if (!alone && threadIdx.x == 0) store(scratch.softmax + part, make_float2(softmax.top, softmax.sum));
    QS_UNROLL
    for (int j = 0; j < kMaxSize / kAttentionThreads; ++j) {
      const int k = static_cast<int>(threadIdx.x) + j * kAttentionThreads;
      if (k >= size) continue;
      if (!alone) {
        store(scratch.values + part * size + k, out[j]);
      } else if (softmax.sum != 0) {
        merged[j] = merge(merged[j], out[j], factors);
      }
    }
  }
  if (!alone) {
    if (last_block(scratch.counters + i * params.heads + head, blocks, &shared->last)) {
      merge_splits(params, scratch, i, head, 1, splits);
    }
    return;
  }
  QS_UNROLL
  for (int j = 0; j < kMaxSize / kAttentionThreads; ++j) {
    const int k = static_cast<int>(threadIdx.x) + j * kAttentionThreads;
    if (k < size) store(params.out + i * params.out_stride + head * size + k, mul_rn(merged[j], inverse_sum(total)));
  }
  if (params.log_sum_exp && threadIdx.x == 0) {
    store(params.log_sum_exp + i * params.heads + head, log_sum_exp(total));
  }
}

}  // namespace

void plain_attention(const Attention& params, const int32_t* count, const AttentionScratch& scratch, bool spread,
                     Stream stream) {
  AttentionScratch shared = scratch;
  shared.blocks = spread ? split_blocks(scratch, params.count * params.heads) : 1;
  const Dim grid = blocks_in_x(params.count * params.heads * shared.blocks);
  const auto run = [&]<KvType kType>() {
    launch("attention_plain_kernel", attention_plain_kernel<kType>, grid, kAttentionThreads, sizeof(PlainShared),
           stream, params, count, shared);
  };
  switch (params.cache.type) {
    case KvType::f32:
      return run.template operator()<KvType::f32>();
    case KvType::f16:
      return run.template operator()<KvType::f16>();
    case KvType::bf16:
      return run.template operator()<KvType::bf16>();
    case KvType::i8:
      return run.template operator()<KvType::i8>();
  }
}

}  // namespace quicksilver::QS_CUDA
