// Attention of active (compacted) queries over the entries that are present.
#pragma once

#include <cstdint>

#include "quicksilver/kv_cache.h"

namespace quicksilver {

// out[i] = softmax over visible entries e of (scale * q . k_e), times v_e. Query row i belongs to sequence
// query_sequence[r] and position query_positions[r], r = index ? index[i] : i, and sees the entries of that sequence
// with positions[slot] <= position < until[slot]. Query head h reads KV head h / (heads / kv_heads). No visible entry:
// zeros.
//
// Order, for each query and head: scores over the list of visible entries; the maximum; exp(score - max); their sum in
// 16 lanes by place in that list; p * v added up entry by entry in splits of 512 entries, then the splits. So neither
// other queries nor entries that can't be seen change a bit. q . k: 16 lanes over the head's dimensions, then pairwise
// (8, 4, 2, 1).
//
// An i8 cache's integers are used as they are: the score is scale * (key_scale * (q . integers)), and what is added up
// is (p * value_scale) * integers.
struct Attention {
  const float* query = nullptr;  // [count, heads, head_size]
  int64_t query_stride = 0;
  int64_t heads = 0;
  int64_t count = 0;
  const int32_t* index = nullptr;
  const int32_t* query_positions = nullptr;
  const int32_t* query_sequence = nullptr;
  float scale = 1;
  KvCache cache;
  float* out = nullptr;  // [count, heads, head_size]
  int64_t out_stride = 0;
  float* log_sum_exp = nullptr;  // [count, heads] or null
};
void compacted_attention(const Attention& params);

}  // namespace quicksilver
