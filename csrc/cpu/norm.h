// Norms and activations as sources of a quantized row: computed where they are consumed, sixteen columns at a time.
#pragma once

#include "quantize.h"
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

// gelu(x) = x * Phi(x), Phi being the normal distribution's integral, (1 + erf(x / sqrt(2))) / 2. Its lower tail is
//   Phi(-m) = e^(-m^2 / 2) / (m + 4) * P((m - 4) / (m + 4)),  m >= 0
// with P fitted to 1e-8 of what it stands for; the upper tail is 1 - Phi(-m). m^2 is taken with what its rounding
// leaves, so the result is within 6 units in the last place wherever it is a normal number, far down the tail too.
constexpr float kNormalTail[] = {-1.34195347e-4f, 1.74661705e-4f,  1.56840915e-3f, -3.51021253e-3f, -7.52400514e-3f,
                                 6.04034886e-2f,  -1.86523661e-1f, 3.87136906e-1f, -6.07896566e-1f, 7.55285144e-1f};
struct ErfGeluSource {
  const float* x;

  QS_INLINE_MEMBER f32x16 operator()(int64_t k, int n) const {
    const f32x16 v = load(x + k, n);
    // Beyond 15 the tail is 0; min() gives back a NaN.
    const f32x16 m = min(broadcast(15.0f), float_of(magnitudes(v)));
    const f32x16 high = float_of(bits_of(m) & broadcast(static_cast<int32_t>(0xfffff000)));
    const f32x16 low = m - high;
    const f32x16 square = m * m;
    const f32x16 rest = ((high * high - square) + (high + high) * low) + low * low;
    const f32x16 inverse = broadcast(1.0f) / (m + broadcast(4.0f));
    const f32x16 q = (m - broadcast(4.0f)) * inverse;
    f32x16 p = broadcast(kNormalTail[0]);
    for (int i = 1; i < 10; ++i) p = fma(p, q, broadcast(kNormalTail[i]));
    const f32x16 e = exp(square * broadcast(-0.5f));
    const f32x16 tail = fma(e * rest, broadcast(-0.5f), e) * (p * inverse);
    f32x16 y;
    QS_PARTS(i) y.v[i] = v.v[i] * (v.v[i] < 0 ? tail.v[i] : 1.0f - tail.v[i]);
    return y;
  }
};

struct ReluSource {
  const float* x;

  QS_INLINE_MEMBER f32x16 operator()(int64_t k, int n) const { return max(zeros(), load(x + k, n)); }  // NaN stays
};

}  // namespace quicksilver::QS_ISA
