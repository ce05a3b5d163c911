// Slots for new entries, and the writing of keys and values to them.
#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {

bool kv_allocate(KvCache& cache, const int32_t* index, int64_t count, const int32_t* sequence, const int32_t* positions,
                 int64_t* slots) {
  const int32_t blocks_before = *cache.blocks_used;
  int64_t done = 0;
  for (; done < count; ++done) {
    const int32_t s = sequence[index ? index[done] : done];
    const int64_t entry = cache.lengths[s];
    const int64_t column = entry / cache.block_size;
    if (column >= cache.max_blocks) break;
    int32_t& block = cache.block_table[s * cache.max_blocks + column];
    if (block < 0) {
      if (*cache.blocks_used >= cache.blocks) break;
      block = (*cache.blocks_used)++;
    }
    slots[done] = block * cache.block_size + entry % cache.block_size;
    ++cache.lengths[s];
  }
  if (done < count) {  // take it all back, the blocks that were free before included
    while (done-- > 0) --cache.lengths[sequence[index ? index[done] : done]];
    for (int64_t i = 0; i < cache.sequences * cache.max_blocks && *cache.blocks_used != blocks_before; ++i) {
      if (cache.block_table[i] >= blocks_before) cache.block_table[i] = -1;
    }
    *cache.blocks_used = blocks_before;
    return false;
  }
  for (int64_t i = 0; i < count; ++i) {
    cache.positions[slots[i]] = positions[index ? index[i] : i];
    if (cache.until) cache.until[slots[i]] = INT32_MAX;
  }
  return true;
}

void kv_scatter_heads(const KvScatter& params, int64_t i, int64_t begin, int64_t end) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size;
  if (params.slots[i] < 0) return;
  for_kv_type(cache.type, [&]<KvType kType>() {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t to = kv_vector(cache, params.slots[i], head);
      const auto write = [&](void* array, float* scales, const float* rows, int64_t stride) {
        const float* row = rows ? rows + i * stride + head * size : nullptr;
        kv_store<kType>(array, scales, to, size, [row](int64_t k, int n) { return row ? load(row + k, n) : zeros(); });
      };
      write(cache.key, cache.key_scale, params.key, params.key_stride);
      write(cache.value, cache.value_scale, params.value, params.value_stride);
    }
  });
}

void kv_scatter(const KvScatter& params) {
  in_parallel(params.count, params.cache.kv_heads * params.cache.head_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kv_scatter_heads(params, i, 0, params.cache.kv_heads);
  });
}

}  // namespace quicksilver::QS_ISA
