// What all attention kernels share: splits, how they are merged, and the host's choice among the kernels.
//
// A sequence's entries are cut into splits of kSplit. Within a split a query's softmax goes its own way; the splits'
// results are merged in order by merge(), whether one block has them all or each comes from a block of its own. So the
// bits of a result don't depend on how the work was spread.
#pragma once

#include "kv_cache.cuh"
#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA {

constexpr int kSplit = 256;  // entries
constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr float kMinusInfinity = -__builtin_inff();

// Results of single splits. Those of query i, head h begin at (i * heads + h) * splits.
struct AttentionScratch {
  int32_t* counters = nullptr;  // one per query and head; zero between launches
  float2* softmax = nullptr;    // top and sum
  float* values = nullptr;      // [.., head_size], not yet divided by the sum
  int64_t splits = 0;           // the most that a sequence can have
  int32_t blocks = 1;           // that share them among themselves
};

// sum == 0: nothing was visible.
struct Softmax {
  float top = kMinusInfinity;  // the largest score
  float sum = 0;               // of exp(score - top)
};

struct MergeFactors {
  float before, split;
};

// Adds a split in which something was visible to those before it.
QS_DEVICE MergeFactors merge(Softmax& total, const Softmax& split) {
  const float top = maximum(total.top, split.top);
  const MergeFactors factors = {exp(sub_rn(total.top, top)), exp(sub_rn(split.top, top))};
  total.sum = fma_rn(split.sum, factors.split, mul_rn(total.sum, factors.before));
  total.top = top;
  return factors;
}
QS_DEVICE float merge(float total, float split, const MergeFactors& factors) {
  return fma_rn(split, factors.split, mul_rn(total, factors.before));
}

// What a merged value is multiplied by.
QS_DEVICE float inverse_sum(const Softmax& total) { return total.sum == 0 ? 0.0f : div_rn(1.0f, total.sum); }
QS_DEVICE float log_sum_exp(const Softmax& total) {
  return total.sum == 0 ? kMinusInfinity : add_rn(total.top, log(total.sum));
}

QS_DEVICE int64_t row_count(const Attention& params, const int32_t* count) {
  if (count == nullptr) return params.count;
  const int64_t rows = load(count);
  return rows < params.count ? rows : params.count;
}
QS_DEVICE int32_t batch_row(const Attention& params, int64_t i) {
  return params.index ? load(params.index + i) : static_cast<int32_t>(i);
}

// Entries of a sequence: none of one that doesn't exist, and no more than the table can tell of.
QS_DEVICE int length_of(const KvCache& cache, int32_t sequence) {
  if (!has_sequence(cache, sequence)) return 0;
  const int64_t most = cache.max_blocks * cache.block_size, length = load(cache.lengths + sequence);
  return static_cast<int>(length < 0 ? 0 : length < most ? length : most);
}

// Merges the splits of `heads` heads of query i. The whole block.
QS_DEVICE void merge_splits(const Attention& params, const AttentionScratch& scratch, int64_t i, int64_t first_head,
                            int heads, int splits) {
  const int size = static_cast<int>(params.cache.head_size);
  for (int j = static_cast<int>(threadIdx.x); j < heads * size; j += kAttentionThreads) {
    const int64_t head = first_head + j / size;
    const int column = j % size;
    const int64_t first = (i * params.heads + head) * scratch.splits;
    Softmax total;
    float value = 0;
    for (int s = 0; s < splits; ++s) {
      const float2 part = load(scratch.softmax + first + s);
      const float part_value = load(scratch.values + (first + s) * size + column);
      if (part.y != 0) value = merge(value, part_value, merge(total, {part.x, part.y}));
    }
    store(params.out + i * params.out_stride + head * size + column, mul_rn(value, inverse_sum(total)));
    if (params.log_sum_exp && column == 0) store(params.log_sum_exp + i * params.heads + head, log_sum_exp(total));
  }
}

// --- host ------------------------------------------------------------------------------------------------------------
// Blocks that share the splits of a query and KV head among them.
int32_t split_blocks(const AttentionScratch& scratch, int64_t others);

// Head sizes 64, 80, 96 and 128; f16, bf16 and i8. For few queries per sequence, and for many; the same bits.
void decode_attention(const Attention& params, const int32_t* count, const AttentionScratch& scratch, Stream stream);
void prefill_attention(const Attention& params, const int32_t* count, Stream stream);
// Every type and head size up to 256. spread: splits may go to blocks of their own.
void plain_attention(const Attention& params, const int32_t* count, const AttentionScratch& scratch, bool spread,
                     Stream stream);

}  // namespace quicksilver::QS_CUDA
