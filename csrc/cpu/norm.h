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

// A row's sums: column c goes to sum c % 256, in order; then the sums i and i + 16 of every 32 are added, those
// pairwise (8, 4, 2, 1 apart), and the eight results in order. A GPU's block of 256 threads gets the same bits.
struct RowSums {
  f32x16 part[16];

  QS_INLINE_MEMBER float total() const {
    float result = 0;
    for (int i = 0; i < 16; i += 2) result += sum(part[i] + part[i + 1]);
    return result;
  }
};

// The statistics of one row.
QS_INLINE NormSource norm_source(const Norm& norm, const float* x, int64_t d) {
  const float count = static_cast<float>(d);
  const bool centred = norm.kind == NormKind::layer;
  float mean = 0;
  if (centred) {
    RowSums sums;
    for (f32x16& part : sums.part) part = zeros();
    for (int64_t k = 0; k < d; k += 16) {
      f32x16& part = sums.part[k / 16 % 16];
      part = part + load(x + k, d - k < 16 ? static_cast<int>(d - k) : 16);
    }
    mean = sums.total() / count;
  }
  RowSums squares;
  for (f32x16& part : squares.part) part = zeros();
  int64_t k = 0;
  for (; k + 16 <= d; k += 16) {
    const f32x16 e = load(x + k) - broadcast(mean);
    f32x16& part = squares.part[k / 16 % 16];
    part = fma(e, e, part);
  }
  if (k < d) {  // lanes beyond the row must stay out, and 0 - mean isn't 0
    float t[16] = {};
    for (int64_t i = k; i < d; ++i) t[i - k] = x[i] - mean;
    const f32x16 e = load(t);
    f32x16& part = squares.part[k / 16 % 16];
    part = fma(e, e, part);
  }
  const float inverse = 1.0f / __builtin_sqrtf(squares.total() / count + norm.eps);
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
