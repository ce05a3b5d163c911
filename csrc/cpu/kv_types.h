// Elements of the KV cache, in any of its types, as fp32 lanes.
#pragma once

#include "quicksilver/kv_cache.h"
#include "vec.h"

namespace quicksilver::QS_ISA {

// Elements at..at+n of a cache array, n <= 16, the rest of the lanes zero.
template <KvType kType>
QS_INLINE f32x16 kv_load(const void* array, int64_t at, int n = 16) {
  if constexpr (kType == KvType::f32) {
    return load(static_cast<const float*>(array) + at, n);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(array) + at;
    uint16_t t[16] = {};
    if (n < 16) {
      for (int i = 0; i < n; ++i) t[i] = p[i];
      p = t;
    }
    return kType == KvType::f16 ? load_half(p) : load_bfloat(p);
  }
}

template <KvType kType>
QS_INLINE void kv_store(void* array, int64_t at, const f32x16& a, int n = 16) {
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
  }
}

// Where an entry's vector for one head begins, counted in vectors of head_size elements.
QS_INLINE int64_t kv_vector(const KvCache& cache, int64_t slot, int64_t head) {
  return (slot / cache.block_size * cache.kv_heads + head) * cache.block_size + slot % cache.block_size;
}

}  // namespace quicksilver::QS_ISA
