// Grouping of adjacent tokens, and weighted means of hidden rows and KV entries.
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

namespace {

// One head's part of one item. Lanes are read before they are written, so the destination may be one of the two.
template <KvType kType>
void merge_head(const KvMerge& params, int64_t item, int64_t head) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size, half = size / 2;
  const int64_t to = kv_vector(cache, params.destination[item], head) * size;
  const int64_t a = kv_vector(cache, params.first[item], head) * size;
  const int64_t b = kv_vector(cache, params.second[item], head) * size;
  const f32x16 first = broadcast(params.weight_first[item]), second = broadcast(params.weight_second[item]);
  const f32x16 total = first + second;
  const auto mean = [&](const f32x16& x, const f32x16& y) { return (first * x + second * y) / total; };

  for (int64_t k = 0; k < size; k += 16) {
    const int n = size - k < 16 ? static_cast<int>(size - k) : 16;
    kv_store<kType>(cache.value, to + k,
                    mean(kv_load<kType>(cache.value, a + k, n), kv_load<kType>(cache.value, b + k, n)), n);
    if (!params.cosine) {
      kv_store<kType>(cache.key, to + k, mean(kv_load<kType>(cache.key, a + k, n), kv_load<kType>(cache.key, b + k, n)),
                      n);
    }
  }
  if (!params.cosine) return;
  const float* cosine = params.cosine + params.distance[item] * half;
  const float* sine = params.sine + params.distance[item] * half;
  for (int64_t k = 0; k < half; k += 16) {
    const int n = half - k < 16 ? static_cast<int>(half - k) : 16;
    const f32x16 x = kv_load<kType>(cache.key, a + k, n), y = kv_load<kType>(cache.key, a + half + k, n);
    const f32x16 c = load(cosine + k, n), s = load(sine + k, n);
    const f32x16 low = mean(x * c - y * s, kv_load<kType>(cache.key, b + k, n));
    const f32x16 high = mean(y * c + x * s, kv_load<kType>(cache.key, b + half + k, n));
    kv_store<kType>(cache.key, to + k, low, n);
    kv_store<kType>(cache.key, to + half + k, high, n);
  }
}

}  // namespace

void kv_merge(const KvMerge& params) {
  // Split by head: items depend on earlier items, heads on nothing.
  in_parallel(params.cache.kv_heads, params.count * params.cache.head_size, [&](int64_t begin, int64_t end) {
    for_kv_type(params.cache.type, [&]<KvType kType>() {
      for (int64_t item = 0; item < params.count; ++item) {
        for (int64_t head = begin; head < end; ++head) merge_head<kType>(params, item, head);
      }
    });
  });
}

}  // namespace quicksilver::QS_ISA
