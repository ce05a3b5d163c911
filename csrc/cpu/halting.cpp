// Drift, entropy, the decision to halt, and the compaction of what goes on.
#include "distance.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {

int64_t halting_update(const HaltingUpdate& params) {
  const auto row_of = [&](int64_t i) { return params.active ? params.active[i] : static_cast<int32_t>(i); };
  in_parallel(params.count, params.d, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = row_of(i);
      const float* before = params.previous + (params.previous_compact ? i : row) * params.previous_stride;
      params.drift[i] = distance(params.hidden + row * params.stride, before, params.d, params.relative);
    }
  });

  int64_t kept = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const int32_t row = row_of(i);
    // A NaN makes either comparison false.
    bool halts = params.drift[i] < params.drift_threshold &&
                 (params.entropy == nullptr || params.entropy[i] < params.entropy_threshold);
    if (params.overrides && params.overrides[row] != 0) halts = params.overrides[row] > 0;
    if (params.sink_tokens > 0 && params.positions[row] < params.sink_tokens) halts = false;
    if (halts) {
      params.halted[row] = 1;
    } else {
      params.next_active[kept++] = row;  // never ahead of what is read: the list may be compacted in place
    }
  }
  return kept;
}

void softmax_entropy(const float* x, int64_t stride, const int32_t* index, int64_t count, int64_t d, float* out) {
  in_parallel(count, d * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + (index ? index[i] : i) * stride;
      const float lowest = -__builtin_inff();
      f32x16 top = broadcast(lowest);
      int64_t k = 0;
      for (; k + 16 <= d; k += 16) top = max(top, load(row + k));
      float largest = max_lane(top);
      for (; k < d; ++k) largest = row[k] > largest ? row[k] : largest;

      // With s = x - max and z = sum e^s: entropy = ln z - (sum s e^s) / z, two terms that are never negative.
      f32x16 z = zeros(), weighted = zeros();
      for (k = 0; k < d; k += 16) {
        const int n = d - k < 16 ? static_cast<int>(d - k) : 16;
        float padded[16];
        for (int j = n; j < 16; ++j) padded[j] = lowest;
        if (n < 16) memcpy(padded, row + k, static_cast<size_t>(n) * 4);
        // e^-104 is 0 in fp32, and 0 * -104 is 0 where 0 * -Inf is not; a NaN passes through.
        const f32x16 s = max(broadcast(-104.0f), (n < 16 ? load(padded) : load(row + k)) - broadcast(largest));
        const f32x16 e = exp(s);
        z = z + e;
        weighted = weighted + s * e;
      }
      const float total = sum(z);
      out[i] = (__builtin_logf(total) - sum(weighted) / total) * 1.44269504f;
    }
  });
}

}  // namespace quicksilver::QS_ISA
