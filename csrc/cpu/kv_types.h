// Elements and vectors of the KV cache, in any of its types, as fp32 lanes.
#pragma once

#include "quantize.h"
#include "quicksilver/kv_cache.h"
#include "vec.h"

namespace quicksilver::QS_ISA {

// Elements at..at+n of a cache array, n <= 16, the rest of the lanes zero; i8: the integers, without their
// scale.
template <KvType kType>
QS_INLINE f32x16 kv_load(const void* array, int64_t at, int n = 16) {
  if constexpr (kType == KvType::f32) {
    return load(static_cast<const float*>(array) + at, n);
  } else if constexpr (kType == KvType::i8) {
    return load_bytes(static_cast<const int8_t*>(array) + at, n);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(array) + at;
    return kType == KvType::f16 ? load_half(p, n) : load_bfloat(p, n);
  }
}

// As many elements, from at on, as a machine vector has lanes: for where all of sixteen would take too many registers.
template <KvType kType>
QS_INLINE nf kv_load_part(const void* array, int64_t at) {
  if constexpr (kType == KvType::f32) {
    return load_as<nf>(static_cast<const float*>(array) + at);
  } else if constexpr (kType == KvType::i8) {
    return bytes_to_nf(static_cast<const int8_t*>(array) + at);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(array) + at;
    return kType == KvType::f16 ? half_to_nf(p) : bfloat_to_nf(p);
  }
}

template <KvType kType>
QS_INLINE void kv_store(void* array, int64_t at, const f32x16& a, int n) {
  if constexpr (kType == KvType::f32) {
    store(static_cast<float*>(array) + at, a, n);
  } else {
    uint16_t t[16];
    if constexpr (kType == KvType::f16) {
      store_half(t, a);
    } else {
      store_bfloat(t, a);
    }
    memcpy(static_cast<uint16_t*>(array) + at, t, static_cast<size_t>(n < 16 ? n : 16) * 2);
  }
}

// Writes vector number `vector` of a cache array, source(k, n) being its elements k..k+n, and its scale. Returns
// whether a finite element left fp16's range and was stored as an infinity.
template <KvType kType, class Source>
QS_INLINE bool kv_store(void* array, float* scales, int64_t vector, int64_t size, const Source& source) {
  const int64_t at = vector * size;
  const auto columns = [size](int64_t k) { return size - k < 16 ? static_cast<int>(size - k) : 16; };
  if constexpr (kType == KvType::i8) {
    i32x16 top = broadcast(0);
    for (int64_t k = 0; k < size; k += 16) top = max(top, magnitudes(source(k, columns(k))));
    const Quantizer quantizer(max_lane(top));
    scales[vector] = quantizer.scale;
    int8_t* q = static_cast<int8_t*>(array) + at;
    for (int64_t k = 0; k < size; k += 16) store_bytes(q + k, quantizer(source(k, columns(k))), columns(k));
  } else if constexpr (kType == KvType::f16) {
    // From the first number that rounds to 65536 up to the last finite one, as bits; a lane that saw one loses its
    // sign. (Without comparisons: GCC 12 takes two of them in AVX-512 apart, lane by lane.)
    constexpr int32_t kFirst = 0x477ff000, kLast = 0x7f7fffff;
    i32x16 inside = broadcast(-1);
    for (int64_t k = 0; k < size; k += 16) {
      const f32x16 x = source(k, columns(k));
      const i32x16 bits = magnitudes(x);
      QS_PARTS(i) inside.v[i] &= (bits.v[i] - kFirst) | (kLast - bits.v[i]);
      kv_store<kType>(array, at + k, x, columns(k));
    }
    return max_lane(inside) >= 0;
  } else {
    for (int64_t k = 0; k < size; k += 16) kv_store<kType>(array, at + k, source(k, columns(k)), columns(k));
  }
  return false;
}

// From several threads.
QS_INLINE void note_overflow(const KvCache& cache) {
  if (cache.overflow) __atomic_store_n(cache.overflow, 1, __ATOMIC_RELAXED);
}

// Where an entry at a position stops being seen.
QS_INLINE int32_t kv_until(const KvCache& cache, int32_t position) {
  return cache.window > 0 && position < INT32_MAX - cache.window ? position + cache.window : INT32_MAX;
}

// f(type as a template argument): f.template operator()<KvType::f32>() and so on.
template <class F>
QS_INLINE void for_kv_type(KvType type, const F& f) {
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

// Where an entry's vector for one head begins, counted in vectors of head_size elements.
QS_INLINE int64_t kv_vector(const KvCache& cache, int64_t slot, int64_t head) {
  return (slot / cache.block_size * cache.kv_heads + head) * cache.block_size + slot % cache.block_size;
}

}  // namespace quicksilver::QS_ISA
