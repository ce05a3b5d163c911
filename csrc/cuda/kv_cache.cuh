// What kernels that touch the paged KV cache share: where a vector is, its elements as fp32, new slots.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"
#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA {

// Where an entry's vector for one head begins, counted in vectors of head_size elements: its index in the scales too.
QS_DEVICE int64_t kv_vector(const KvCache& cache, int64_t slot, int64_t head) {
  return (slot / cache.block_size * cache.kv_heads + head) * cache.block_size + slot % cache.block_size;
}

QS_DEVICE bool has_slot(const KvCache& cache, int64_t slot) {
  return slot >= 0 && slot < cache.blocks * cache.block_size;
}
QS_DEVICE bool has_block(const KvCache& cache, int64_t block) { return block >= 0 && block < cache.blocks; }
QS_DEVICE bool has_sequence(const KvCache& cache, int64_t sequence) {
  return sequence >= 0 && sequence < cache.sequences;
}

// f(type as a template argument): f.template operator()<KvType::f32>() and so on.
template <class F>
QS_DEVICE void for_kv_type(KvType type, const F& f) {
  switch (type) {
    case KvType::f32:
      return f.template operator()<KvType::f32>();
    case KvType::f16:
      return f.template operator()<KvType::f16>();
    case KvType::bf16:
      return f.template operator()<KvType::bf16>();
    case KvType::i8:
      return f.template operator()<KvType::i8>();
  }
}

// Element `at` of a cache array, without the scale that i8 wants.
template <KvType kType>
QS_DEVICE float load_element(const void* array, int64_t at) {
  if constexpr (kType == KvType::f32) return load(static_cast<const float*>(array) + at);
  if constexpr (kType == KvType::f16) return half_to_float(load(static_cast<const uint16_t*>(array) + at));
  if constexpr (kType == KvType::bf16) return bfloat_to_float(load(static_cast<const uint16_t*>(array) + at));
  if constexpr (kType == KvType::i8) return static_cast<float>(load(static_cast<const int8_t*>(array) + at));
}

// By one warp: a whole vector of `size` elements, element k being value_of(k). Lane k % 32 asks for element k, for i8
// twice. *overflow (may be null) becomes 1 where a finite element left fp16's range and was stored as an infinity.
template <KvType kType, class ValueOf>
QS_DEVICE void store_vector(void* array, float* scales, int64_t vector, int64_t size, int32_t* overflow,
                            ValueOf value_of) {
  const int64_t base = vector * size;
  float inverse = 0;
  if constexpr (kType == KvType::i8) {  // as matryoshka.h's rows of one plane
    int32_t top = 0;                    // the order of fp32 magnitudes is that of their bits, NaN above Inf above all
    for (int64_t k = lane(); k < size; k += kWarp) {
      const float value = value_of(k);
      int32_t bits;
      memcpy(&bits, &value, sizeof bits);
      bits &= 0x7fffffff;
      top = bits > top ? bits : top;
    }
    top = warp_max(top);
    const float largest = rounded_magnitude(top);
    const bool finite = top < 0x7f800000;
    if (finite && top != 0) inverse = div_rn(127.0f, largest);
    if (lane() == 0) store(scales + vector, finite ? div_rn(largest, 127.0f) : __builtin_nanf(""));
  }
  for (int64_t k = lane(); k < size; k += kWarp) {
    const float value = value_of(k);
    if constexpr (kType == KvType::f32) store(static_cast<float*>(array) + base + k, value);
    if constexpr (kType == KvType::f16) {
      const float magnitude = absolute(value);
      if (magnitude >= 65520.0f && magnitude < __builtin_inff() && overflow) store(overflow, 1);
      store(static_cast<uint16_t*>(array) + base + k, float_to_half(value));
    }
    if constexpr (kType == KvType::bf16) store(static_cast<uint16_t*>(array) + base + k, float_to_bfloat(value));
    if constexpr (kType == KvType::i8) {
      const float scaled = mul_rn(value, inverse);
      // Of a vector so small that the inverse is Inf, zeros stay zero; of one that isn't finite, all are.
      const float clamped = scaled == scaled ? minimum(maximum(scaled, -127.0f), 127.0f) : 0.0f;
      store(static_cast<int8_t*>(array) + base + k, static_cast<int8_t>(rint(clamped)));
    }
  }
}

// By one warp: writes one head of the entry at `slot`, from fp32 values that are rotated already. Slot -1, or one that
// doesn't exist, writes nothing. key_of(k), value_of(k): element k of either vector.
template <class KeyOf, class ValueOf>
QS_DEVICE void scatter_vector(const KvCache& cache, int64_t slot, int64_t head, KeyOf key_of, ValueOf value_of) {
  if (!has_slot(cache, slot)) return;
  const int64_t vector = kv_vector(cache, slot, head);
  for_kv_type(cache.type, [&]<KvType kType>() {
    store_vector<kType>(cache.key, cache.key_scale, vector, cache.head_size, cache.overflow, key_of);
    store_vector<kType>(cache.value, cache.value_scale, vector, cache.head_size, cache.overflow, value_of);
  });
}

constexpr int kAllocateThreads = 256;
constexpr int kAllocateShared = kAllocateThreads + kAllocateThreads / kWarp;  // int32_t

// By one whole block of kAllocateThreads: gives rows 0..count-1 (of `index`, or themselves) the next slots of their
// sequences, the blocks handed out in row order, as quicksilver::kv_allocate does. A row without room gets slot -1 and
// sets *full (may be null), as does one whose sequence, length or block isn't there; the others are served. Nobody else
// may allocate in this cache meanwhile. Ends with a barrier, after which all threads of the block may read what was
// written. `shared`: kAllocateShared values.
QS_DEVICE void allocate_slots(const KvCache& cache, const int32_t* index, int64_t count, const int32_t* sequence,
                              const int32_t* positions, int64_t* slots, int32_t* full, int32_t* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  int32_t* const sequences = shared;
  int32_t* const takers = shared + kAllocateThreads;
  int32_t used = load(cache.blocks_used);
  bool left_out = false;

  for (int64_t base = 0; base < count; base += kAllocateThreads) {
    const int64_t i = base + thread;
    const bool listed = i < count;
    const int64_t row = listed && index ? load(index + i) : i;
    const int32_t s = listed ? load(sequence + row) : -1;
    const bool valid = s >= 0 && s < cache.sequences;
    store_shared(sequences + thread, s);
    sync_block();
    int32_t earlier = 0;  // rows of this chunk that are of the same sequence and come first
    if (valid) {
      for (int j = 0; j < thread; ++j) earlier += load_shared(sequences + j) == s;
    }
    const bool exists = valid && has_sequence(cache, s);
    const int64_t entry = exists ? load(cache.lengths + s) + earlier : 0;
    const int64_t column = entry / cache.block_size, offset = entry % cache.block_size;
    const bool fits = exists && entry >= 0 && column < cache.max_blocks;
    int32_t* const place = cache.block_table + (fits ? s * cache.max_blocks + column : 0);

    // The first row to need a block that the table doesn't have takes it. A row that is left without one leaves none to
    // the later rows of its sequence either, so what a sequence gets has no gap.
    const bool takes = fits && (earlier == 0 || offset == 0) && load(place) < 0;
    const unsigned votes = ballot(takes);
    if (lane() == 0) store_shared(takers + warp(), __builtin_popcount(votes));
    sync_block();
    int32_t before = used;
    for (int w = 0; w < kAllocateThreads / kWarp; ++w) {
      const int32_t of_warp = load_shared(takers + w);
      if (w < warp()) before += of_warp;
      used += of_warp;
    }
    const int64_t block = before + __builtin_popcount(votes & ((1u << lane()) - 1));
    if (takes && has_block(cache, block)) {
      store(place, cache.free_blocks ? load(cache.free_blocks + block) : static_cast<int32_t>(block));
    }
    if (used > cache.blocks) used = static_cast<int32_t>(cache.blocks);
    sync_block();

    if (listed) {
      const int64_t got = fits ? load(place) : -1;
      if (has_block(cache, got)) {
        const int64_t slot = got * cache.block_size + offset;
        const int32_t position = load(positions + row);
        store(slots + i, slot);
        store(cache.positions + slot, position);
        if (cache.until) {
          const bool ends = cache.window > 0 && position < INT32_MAX - cache.window;
          store(cache.until + slot, ends ? position + cache.window : INT32_MAX);
        }
        atomic_add(cache.lengths + s, 1);
      } else {
        store(slots + i, int64_t{-1});
        left_out = true;
      }
    }
    sync_block();
  }
  const bool of_warp = any(left_out);
  if (lane() == 0) store_shared(takers + warp(), static_cast<int32_t>(of_warp));
  sync_block();
  if (thread == 0) {
    bool some = false;
    for (int w = 0; w < kAllocateThreads / kWarp; ++w) some |= load_shared(takers + w) != 0;
    if (some && full) store(full, 1);
    store(cache.blocks_used, used);
  }
}

}  // namespace quicksilver::QS_CUDA
