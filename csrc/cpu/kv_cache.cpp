// Slots for new entries, and the writing of keys and values to them.
#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {

bool kv_allocate(KvCache& cache, const int32_t* index, int64_t count, const int32_t* sequence, const int32_t* positions,
                 int64_t* slots) {
  const int32_t blocks_before = *cache.blocks_used;
  const auto row_of = [index](int64_t i) { return index ? index[i] : i; };
  int64_t done = 0;
  for (; done < count; ++done) {
    const int32_t s = sequence[row_of(done)];
    const int64_t entry = cache.lengths[s];
    const int64_t column = entry / cache.block_size;
    if (column >= cache.max_blocks) break;
    int32_t& block = cache.block_table[s * cache.max_blocks + column];
    const bool takes = block < 0;
    if (takes) {
      if (*cache.blocks_used >= cache.blocks) break;
      block = cache.free_blocks ? cache.free_blocks[*cache.blocks_used] : *cache.blocks_used;
      ++*cache.blocks_used;
    }
    const int64_t slot = block * cache.block_size + entry % cache.block_size;
    slots[done] = takes ? ~slot : slot;  // so that a block which a row took can be taken back
    ++cache.lengths[s];
  }
  if (done < count) {
    while (done-- > 0) {
      const int32_t s = sequence[row_of(done)];
      const int64_t entry = --cache.lengths[s];
      if (slots[done] < 0) cache.block_table[s * cache.max_blocks + entry / cache.block_size] = -1;
    }
    *cache.blocks_used = blocks_before;
    return false;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] < 0) slots[i] = ~slots[i];
    const int32_t position = positions[row_of(i)];
    cache.positions[slots[i]] = position;
    if (cache.until) cache.until[slots[i]] = kv_until(cache, position);
  }
  return true;
}

void kv_scatter_heads(const KvScatter& params, int64_t i, int64_t begin, int64_t end) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size;
  if (params.slots[i] < 0) return;
  bool left_range = false;
  for_kv_type(cache.type, [&]<KvType kType>() {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t to = kv_vector(cache, params.slots[i], head);
      const auto write = [&](void* array, float* scales, const float* rows, int64_t stride) {
        const float* row = rows ? rows + i * stride + head * size : nullptr;
        const auto source = [row](int64_t k, int n) { return row ? load(row + k, n) : zeros(); };
        left_range |= kv_store<kType>(array, scales, to, size, source);
      };
      write(cache.key, cache.key_scale, params.key, params.key_stride);
      write(cache.value, cache.value_scale, params.value, params.value_stride);
    }
  });
  if (left_range) note_overflow(cache);
}

void kv_scatter(const KvScatter& params) {
  in_parallel(params.count, params.cache.kv_heads * params.cache.head_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kv_scatter_heads(params, i, 0, params.cache.kv_heads);
  });
}

}  // namespace quicksilver::QS_ISA
