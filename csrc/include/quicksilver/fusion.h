// Contextual Token Fusion: grouping of adjacent tokens, weighted means of hidden rows and of KV entries.
#pragma once

#include <cstdint>

#include "quicksilver/kv_cache.h"

namespace quicksilver {

// Row t joins row t-1's group where both are fusible, of one sequence, at consecutive positions, closer than
// `threshold` (||h_t - h_(t-1)||, divided by ||h_(t-1)|| if relative) and the group has fewer than max_group rows.
// group[t] counts from 0 in row order. Returns the number of groups.
struct FusionGroups {
  const float* hidden = nullptr;
  int64_t stride = 0;
  int64_t count = 0;
  int64_t d = 0;
  const int32_t* positions = nullptr;
  const int32_t* sequence = nullptr;
  const uint8_t* fusible = nullptr;
  float threshold = 0;
  bool relative = true;
  int32_t max_group = 4;
  int32_t* group = nullptr;
};
int64_t fusion_groups(const FusionGroups& params);

// fused[g] = sum over rows t of group g, in order, of weight[t] * hidden[t], divided by the sum of their weights.
void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                   int64_t d, float* fused, int64_t groups);

// The map back: hidden[t] = fused[group[t]], so every member of a group gets its row.
void fusion_expand(const float* fused, const int32_t* group, int64_t count, int64_t d, float* hidden, int64_t stride);

// Merges KV entries: destination = (weight_first * first + weight_second * second) / (weight_first + weight_second) for
// keys and values, in fp32, rounded to the cache's type (i8: quantized anew). The first key is turned ahead by
// `distance` positions of the rotary embedding before (cosine, sine: [max_distance + 1, head_size / 2], pairs (i, i +
// head_size / 2); null: no rotary). Items in order, so an item may read what an earlier one wrote.
struct KvMerge {
  const int64_t* destination = nullptr;
  const int64_t* first = nullptr;
  const int64_t* second = nullptr;
  const float* weight_first = nullptr;
  const float* weight_second = nullptr;
  const int32_t* distance = nullptr;
  int64_t count = 0;
  const float* cosine = nullptr;
  const float* sine = nullptr;
  KvCache cache;
};
void kv_merge(const KvMerge& params);

}  // namespace quicksilver
