// Norms and activations as sources of a quantized row: computed where they are consumed, sixteen columns at a time.
#pragma once

#include "quicksilver/layer.h"
#include "vec.h"

namespace quicksilver::QS_ISA {

struct NormSource {
  const float* x;
  const float* weight;
  const float* bias;
  float mean;  // 0 for RMS norm
  float inverse;
  bool centred;

  QS_INLINE_MEMBER f32x16 operator()(int64_t k, int n) const {
    const f32x16 w = load(weight + k, n);
    if (!centred) return load(x + k, n) * broadcast(inverse) * w;
    const f32x16 y = (load(x + k, n) - broadcast(mean)) * broadcast(inverse) * w;
    return bias ? y + load(bias + k, n) : y;
  }
};

// The statistics of one row: sums in 16 lanes, lane = column % 16, then pairwise.
QS_INLINE NormSource norm_source(const Norm& norm, const float* x, int64_t d) {
  const float count = static_cast<float>(d);
  const bool centred = norm.kind == NormKind::layer;
  float mean = 0;
  if (centred) {
    f32x16 total = zeros();
    for (int64_t k = 0; k < d; k += 16) total = total + load(x + k, d - k < 16 ? static_cast<int>(d - k) : 16);
    mean = sum(total) / count;
  }
  f32x16 squares = zeros();
  int64_t k = 0;
  for (; k + 16 <= d; k += 16) {
    const f32x16 e = load(x + k) - broadcast(mean);
    squares = fma(e, e, squares);
  }
  if (k < d) {  // lanes beyond the row must stay out, and 0 - mean isn't 0
    float t[16] = {};
    for (int64_t i = k; i < d; ++i) t[i - k] = x[i] - mean;
    const f32x16 e = load(t);
    squares = fma(e, e, squares);
  }
  const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / count + norm.eps);
  return {x, norm.weight, norm.bias, mean, inverse, centred};
}

// silu(gate) * up
struct SiluSource {
  const float* gate;
  const float* up;

  QS_INLINE_MEMBER f32x16 operator()(int64_t k, int n) const {
    const f32x16 g = load(gate + k, n);
    return g / (broadcast(1.0f) + exp(zeros() - g)) * load(up + k, n);
  }
};

// gelu(x) = x / 2 * (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
struct GeluSource {
  const float* x;

  QS_INLINE_MEMBER f32x16 operator()(int64_t k, int n) const {
    const f32x16 v = load(x + k, n);
    const f32x16 cubic = fma(v * v, broadcast(0.044715f), broadcast(1.0f)) * v;
    return v / (broadcast(1.0f) + exp(cubic * broadcast(-1.5957691216057308f)));
  }
};

}  // namespace quicksilver::QS_ISA
