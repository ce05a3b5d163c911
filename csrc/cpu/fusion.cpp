// Grouping of adjacent tokens, and weighted means of hidden rows and KV entries.
#include <new>

#include "distance.h"
#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {

int64_t fusion_groups(const FusionGroups& params) {
  int64_t groups = 0;
  int32_t members = 0;
  for (int64_t t = 0; t < params.count; ++t) {
    bool joins = t > 0 && members < params.max_group && params.fusible[t] && params.fusible[t - 1] &&
                 params.sequence[t] == params.sequence[t - 1] && params.positions[t] == params.positions[t - 1] + 1;
    if (joins) {
      const float* row = params.hidden + t * params.stride;
      joins = distance(row, row - params.stride, params.d, params.relative) < params.threshold;
    }
    members = joins ? members + 1 : 1;
    if (!joins) ++groups;
    params.group[t] = static_cast<int32_t>(groups - 1);
  }
  return groups;
}

void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                   int64_t d, float* fused, int64_t groups) {
  int64_t t = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = t;
    float total = 0;
    for (; t < count && group[t] == g; ++t) total += weight[t];
    for (int64_t k = 0; k < d; k += 16) {
      const int n = d - k < 16 ? static_cast<int>(d - k) : 16;
      f32x16 acc = zeros();
      for (int64_t i = begin; i < t; ++i) acc = acc + broadcast(weight[i]) * load(hidden + i * stride + k, n);
      store(fused + g * d + k, acc / broadcast(total), n);
    }
  }
}

void fusion_expand(const float* fused, const int32_t* group, int64_t count, int64_t d, float* hidden, int64_t stride) {
  in_parallel(count, d, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      memcpy(hidden + t * stride, fused + group[t] * d, static_cast<size_t>(d) * 4);
    }
  });
}

namespace {

// One head's part of one item. `merged`: [head_size], so that the destination may be one of the two. Returns what
// kv_store does.
template <KvType kType>
bool merge_head(const KvMerge& params, int64_t item, int64_t head, float* merged) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size, half = size / 2;
  const int64_t to = kv_vector(cache, params.destination[item], head);
  const int64_t a = kv_vector(cache, params.first[item], head);
  const int64_t b = kv_vector(cache, params.second[item], head);
  const f32x16 first = broadcast(params.weight_first[item]), second = broadcast(params.weight_second[item]);
  const f32x16 total = first + second;
  const auto mean = [&](const f32x16& x, const f32x16& y) { return (first * x + second * y) / total; };
  const auto read = [&](const void* array, const float* scales, int64_t vector, int64_t k, int n) {
    const f32x16 x = kv_load<kType>(array, vector * size + k, n);
    return kType == KvType::i8 ? x * broadcast(scales[vector]) : x;
  };
  const auto key = [&](int64_t vector, int64_t k, int n) { return read(cache.key, cache.key_scale, vector, k, n); };
  const auto value = [&](int64_t vector, int64_t k, int n) {
    return read(cache.value, cache.value_scale, vector, k, n);
  };
  const auto columns = [](int64_t k, int64_t end) { return end - k < 16 ? static_cast<int>(end - k) : 16; };
  const auto source = [merged](int64_t k, int n) { return load(merged + k, n); };

  for (int64_t k = 0; k < size; k += 16) {
    const int n = columns(k, size);
    store(merged + k, mean(value(a, k, n), value(b, k, n)), n);
  }
  const bool of_value = kv_store<kType>(cache.value, cache.value_scale, to, size, source);

  if (params.cosine) {
    const float* cosine = params.cosine + params.distance[item] * half;
    const float* sine = params.sine + params.distance[item] * half;
    for (int64_t k = 0; k < half; k += 16) {
      const int n = columns(k, half);
      const f32x16 x = key(a, k, n), y = key(a, half + k, n);
      const f32x16 c = load(cosine + k, n), s = load(sine + k, n);
      store(merged + k, mean(x * c - y * s, key(b, k, n)), n);
      store(merged + half + k, mean(y * c + x * s, key(b, half + k, n)), n);
    }
  } else {
    for (int64_t k = 0; k < size; k += 16) {
      const int n = columns(k, size);
      store(merged + k, mean(key(a, k, n), key(b, k, n)), n);
    }
  }
  return kv_store<kType>(cache.key, cache.key_scale, to, size, source) || of_value;
}

}  // namespace

void kv_merge(const KvMerge& params) {
  // Split by head: items depend on earlier items, heads on nothing.
  in_parallel(params.cache.kv_heads, params.count * params.cache.head_size, [&](int64_t begin, int64_t end) {
    float* merged = static_cast<float*>(::operator new(static_cast<size_t>(params.cache.head_size) * 4));
    bool left_range = false;
    for_kv_type(params.cache.type, [&]<KvType kType>() {
      for (int64_t item = 0; item < params.count; ++item) {
        for (int64_t head = begin; head < end; ++head) left_range |= merge_head<kType>(params, item, head, merged);
      }
    });
    if (left_range) note_overflow(params.cache);
    ::operator delete(merged);
  });
}

}  // namespace quicksilver::QS_ISA
