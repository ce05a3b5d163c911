// The distance that halting calls drift and fusion calls closeness.
#pragma once

#include "vec.h"

namespace quicksilver::QS_ISA {

// ||x - y||, divided by ||y|| if relative (0 / 0 is 0). Sums of squares in 16 lanes, lane = column % 16, then pairwise;
// products and sums are rounded separately, so that every instruction set decides alike.
QS_INLINE float distance(const float* x, const float* y, int64_t d, bool relative) {
  f32x16 difference = zeros(), base = zeros();
  for (int64_t k = 0; k < d; k += 16) {
    const int n = d - k < 16 ? static_cast<int>(d - k) : 16;
    const f32x16 b = load(y + k, n);
    const f32x16 e = load(x + k, n) - b;
    difference = difference + e * e;
    base = base + b * b;
  }
  const float length = __builtin_sqrtf(sum(difference));
  if (!relative) return length;
  const float norm = __builtin_sqrtf(sum(base));
  return length == 0 && norm == 0 ? 0.0f : length / norm;
}

}  // namespace quicksilver::QS_ISA
