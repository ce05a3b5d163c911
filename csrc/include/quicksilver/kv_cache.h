// The paged KV cache of one layer, and KV skipping: only the rows given are written, a skipped token leaves no hole.
#pragma once

#include <cstdint>

namespace quicksilver {

// i8: every vector (one head of one entry) is quantized on its own, x = scale * q with scale = absmax / 127, as
// matryoshka.h's rows of one plane are.
enum class KvType : int32_t { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };

// slot = block * block_size + offset. Sequence s's entry e is in block block_table[s, e / block_size].
struct KvCache {
  void* key = nullptr;         // [blocks, kv_heads, block_size, head_size] of `type`
  void* value = nullptr;       // same
  float* key_scale = nullptr;  // [blocks, kv_heads, block_size], for i8
  float* value_scale = nullptr;
  KvType type = KvType::f32;
  int64_t blocks = 0;
  int64_t block_size = 64;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  int32_t* block_table = nullptr;  // [sequences, max_blocks], -1: no block yet
  int64_t max_blocks = 0;
  int64_t sequences = 0;
  int32_t* lengths = nullptr;      // [sequences] entries present
  int32_t* positions = nullptr;    // [blocks, block_size]: an entry is visible to queries at position >= this ...
  int32_t* until = nullptr;        // ... and < this; null: no entry expires
  int32_t* blocks_used = nullptr;  // [1] blocks handed out: the next one is free_blocks[*blocks_used], and one comes
                                   // back as free_blocks[--*blocks_used]
  const int32_t* free_blocks = nullptr;  // [blocks] each block once; null: block i is i
  int32_t window = 0;           // > 0: an entry at position p is seen by queries at p .. p + window - 1; wants `until`
  int32_t* overflow = nullptr;  // [1] or null: becomes 1 where a finite number left the range of an f16 cache
};

// Gives each row's entry the next slot of its sequence, in row order: slots[i] for row index ? index[i] : i, and sets
// positions and until (INT32_MAX, or where there is a window position + window, no more than INT32_MAX). sequence and
// positions are indexed by row. Returns false, with nothing changed in the cache, where a block is wanted and none is
// left or a sequence would outgrow its row of the table; slots hold garbage then.
bool kv_allocate(KvCache& cache, const int32_t* index, int64_t count, const int32_t* sequence, const int32_t* positions,
                 int64_t* slots);

// Writes key[i], value[i] ([count, kv_heads, head_size], fp32, row strides in elements) to slots[i]; slot -1 writes
// nothing. key == nullptr writes zeros.
struct KvScatter {
  const float* key = nullptr;
  const float* value = nullptr;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
  const int64_t* slots = nullptr;
  int64_t count = 0;
  KvCache cache;
};
void kv_scatter(const KvScatter& params);

}  // namespace quicksilver
