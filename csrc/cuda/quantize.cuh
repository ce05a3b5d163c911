// Rows as the GEMMs want them: norm and quantization, by one block of kQuantizeThreads threads per row.
//
// Every kernel that normalizes or quantizes does it by these functions, whose sums have one fixed order: a row gets the
// same bits whichever kernel takes it in, and whatever rows come with it.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.cuh"
#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA {

constexpr int kQuantizeThreads = 256;
constexpr int kNormShared = kQuantizeThreads / kWarp;  // floats of shared memory that norm_row works in

// e^x by the steps of csrc/cpu/vec.h, so that activations have the CPU's bits: to about one unit in the last place;
// overflows to Inf and underflows to 0 as it should, NaN stays NaN.
QS_DEVICE float exp_as_cpu(float a) {
  const auto power_of_two = [](int32_t n) {
    const int32_t bits = (n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  };
  if (!(a == a)) return a;
  const float x = minimum(89.0f, maximum(-104.0f, a));  // outside of these, the result is 0 or Inf anyway
  const float f = rint(mul_rn(x, 1.44269504f));
  const int32_t n = static_cast<int32_t>(f), half = n >> 1;
  // ln 2 in two parts, the first with so few bits that its multiples are exact.
  const float r = fma_rn(f, 2.12194440e-4f, fma_rn(f, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = fma_rn(p, r, c);
  }
  p = add_rn(fma_rn(p, mul_rn(r, r), r), 1.0f);
  return mul_rn(mul_rn(p, power_of_two(half)), power_of_two(n - half));  // n can be below -126 or above 127
}

// silu(gate) * up
QS_DEVICE float silu_gated(float gate, float up) { return mul_rn(div_rn(gate, add_rn(1.0f, exp_as_cpu(-gate))), up); }

// gelu(x) = x / 2 * (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
QS_DEVICE float gelu_tanh(float x) {
  const float cubic = mul_rn(fma_rn(mul_rn(x, x), 0.044715f, 1.0f), x);
  return div_rn(x, add_rn(1.0f, exp_as_cpu(mul_rn(cubic, -1.5957691216057308f))));
}

// x * Phi(x), by the steps of csrc/cpu/norm.h, which has their reasons.
QS_DEVICE float gelu(float x) {
  if (!(x == x)) return x;
  const float m = minimum(15.0f, absolute(x));
  const float high = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, m) & ~0xfff), low = sub_rn(m, high);
  const float square = mul_rn(m, m);
  const float cross = mul_rn(add_rn(high, high), low);
  const float rest = add_rn(add_rn(sub_rn(mul_rn(high, high), square), cross), mul_rn(low, low));
  const float inverse = div_rn(1.0f, add_rn(m, 4.0f));
  const float q = mul_rn(sub_rn(m, 4.0f), inverse);
  float p = -1.34195347e-4f;
  for (float c : {1.74661705e-4f, 1.56840915e-3f, -3.51021253e-3f, -7.52400514e-3f, 6.04034886e-2f, -1.86523661e-1f,
                  3.87136906e-1f, -6.07896566e-1f, 7.55285144e-1f}) {
    p = fma_rn(p, q, c);
  }
  const float e = exp_as_cpu(mul_rn(square, -0.5f));
  const float tail = mul_rn(fma_rn(mul_rn(e, rest), -0.5f, e), mul_rn(p, inverse));
  return mul_rn(x, x < 0 ? tail : sub_rn(1.0f, tail));
}

QS_DEVICE float relu(float x) { return x < 0 ? 0.0f : x; }

// What an MLP without a gate makes of its one product.
QS_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu:
      return gelu(x);
    case Activation::relu:
      return relu(x);
    default:
      return gelu_tanh(x);
  }
}

// Columns k..k+3 of a row of n; those from n on are zero.
QS_DEVICE float4 load_columns(const float* row, int64_t k, int64_t n) {
  const bool aligned = (reinterpret_cast<uintptr_t>(row) & 15) == 0;
  if (aligned && k + 4 <= n) return load(reinterpret_cast<const float4*>(row + k));
  return make_float4(k < n ? load(row + k) : 0.0f, k + 1 < n ? load(row + k + 1) : 0.0f,
                     k + 2 < n ? load(row + k + 2) : 0.0f, k + 3 < n ? load(row + k + 3) : 0.0f);
}

// What quantize_row takes its values from: source(k) gives columns k..k+3, zeros past the row's end. k % 4 == 0.
struct PlainRow {
  const float* x;
  int64_t n;

  QS_DEVICE float4 operator()(int64_t k) const { return load_columns(x, k, n); }
};

struct NormedRow {
  const float* x;
  int64_t n;
  const float* weight;
  const float* bias;  // or null
  float mean;
  float inverse;
  bool centred;

  QS_DEVICE float4 operator()(int64_t k) const {
    const float4 v = load_columns(x, k, n), w = load_columns(weight, k, n);
    if (!centred) return make_float4(scaled(v.x, w.x), scaled(v.y, w.y), scaled(v.z, w.z), scaled(v.w, w.w));
    const float4 b = bias ? load_columns(bias, k, n) : make_float4(0, 0, 0, 0);
    return make_float4(moved(v.x, w.x, b.x), moved(v.y, w.y, b.y), moved(v.z, w.z, b.z), moved(v.w, w.w, b.w));
  }

  QS_DEVICE float scaled(float v, float w) const { return mul_rn(mul_rn(v, inverse), w); }

 private:
  QS_DEVICE float moved(float v, float w, float b) const { return add_rn(scaled(sub_rn(v, mean), w), b); }
};

// The sum over the block's threads, the same in all of them. `shared`: kNormShared floats.
QS_DEVICE float block_sum(float v, float* shared) {
  v = warp_sum(v);
  if (lane() == 0) store_shared(shared + warp(), v);
  sync_block();
  float total = 0;
  for (int w = 0; w < kQuantizeThreads / kWarp; ++w) total = add_rn(total, load_shared(shared + w));
  sync_block();  // the next sum goes to the same place
  return total;
}

// The statistics of a row of d columns, with the bits of csrc/cpu/norm.h: thread t adds up columns t, t + 256, ...
QS_DEVICE NormedRow norm_row(const Norm& norm, const float* x, int64_t d, float* shared) {
  static_assert(kQuantizeThreads == 256);
  const float count = static_cast<float>(d);
  const bool centred = norm.kind == NormKind::layer;
  float mean = 0;
  if (centred) {
    float total = 0;
    QS_UNROLL_BY(16)
    for (int64_t k = threadIdx.x; k < d; k += kQuantizeThreads) total = add_rn(total, load(x + k));
    mean = div_rn(block_sum(total, shared), count);
  }
  float squares = 0;
  QS_UNROLL_BY(16)  // loads under way together
  for (int64_t k = threadIdx.x; k < d; k += kQuantizeThreads) {
    const float e = sub_rn(load(x + k), mean);
    squares = fma_rn(e, e, squares);
  }
  const float variance = div_rn(block_sum(squares, shared), count);
  return {x, d, norm.weight, norm.bias, mean, div_rn(1.0f, sqrt_rn(add_rn(variance, norm.eps))), centred};
}

// The same bits for a short row, by one warp.
QS_DEVICE NormedRow norm_row_by_warp(const Norm& norm, const float* x, int64_t d) {
  float squares = 0;
  for (int64_t first = 0; first < d && first < kQuantizeThreads; first += kWarp) {
    float sum = 0;
    for (int64_t k = first + lane(); k < d; k += kQuantizeThreads) {
      const float e = load(x + k);
      sum = fma_rn(e, e, sum);
    }
    squares = add_rn(squares, warp_sum(sum));
  }
  const float variance = div_rn(squares, static_cast<float>(d));
  return {x, d, norm.weight, nullptr, 0, div_rn(1.0f, sqrt_rn(add_rn(variance, norm.eps))), false};
}

// By one warp: a head of q or k as attention wants it, in place. RMS norm where `norm` has a weight, then the rotary
// embedding of `position` where there are cosines: pairs (e, e + size / 2). What it writes, the whole warp may read.
QS_DEVICE void finish_head(float* x, int32_t size, const Norm& norm, const float* cosine, const float* sine,
                           int64_t position) {
  if (norm.weight) {
    const NormedRow normed = norm_row_by_warp(norm, x, size);
    for (int32_t e = lane(); e < size; e += kWarp) store(x + e, normed.scaled(load(x + e), load(norm.weight + e)));
    sync_warp();
  }
  if (cosine == nullptr) return;
  const int32_t half = size / 2;
  for (int32_t e = lane(); e < half; e += kWarp) {
    const float a = load(x + e), b = load(x + half + e);
    const float c = load(cosine + position * half + e), s = load(sine + position * half + e);
    store(x + e, sub_rn(mul_rn(a, c), mul_rn(b, s)));
    store(x + half + e, add_rn(mul_rn(b, c), mul_rn(a, s)));
  }
  sync_warp();
}

namespace detail {

// The largest or the sum over `lanes` neighbouring lanes, a power of two.
QS_DEVICE int32_t max_of_lanes(int32_t v, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v = maximum(v, shuffle_xor(v, mask));
  return v;
}
QS_DEVICE int32_t sum_of_lanes(int32_t v, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

QS_DEVICE int32_t magnitude_bits(float v) {
  int32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits & 0x7fffffff;
}

QS_DEVICE uint32_t pack_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
  const auto byte = [](int32_t v) { return static_cast<uint32_t>(v) & 255; };
  return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
}

// One value of a group, quantized. Of a group so small that the inverse is Inf, zeros stay zero; of one that isn't
// finite (the inverse is 0), all are.
QS_DEVICE int32_t quantized(float v, float inverse, float limit) {
  const float product = mul_rn(v, inverse);
  return product == product ? static_cast<int32_t>(rint(minimum(maximum(product, -limit), limit))) : 0;
}

}  // namespace detail

// Values begin .. begin + kWords * kPartValues of row `row` of `out`, as matryoshka.h says, pads (up to k_padded) zero.
constexpr int kPartValues = 4 * kQuantizeThreads;
template <int kWords, class Source>
QS_DEVICE void quantize_part(const Source& source, const QuantizedRows& out, int64_t row, int64_t begin) {
  // The order of fp32 magnitudes is that of their bits, NaN above Inf above all.
  constexpr int32_t kInfinity = 0x7f800000;
  constexpr float kLimit = 127.0f;
  const int lanes = out.group / 4;  // of a group
  const int shift = out.group == 32 ? 5 : out.group == 64 ? 6 : 7;
  float4 value[kWords];  // their loads are under way together
  for (int i = 0; i < kWords; ++i) {
    value[i] = source(begin + i * kPartValues + static_cast<int>(threadIdx.x) * 4);
  }
  for (int i = 0; i < kWords; ++i) {
    const int64_t first = begin + i * kPartValues;
    if (first >= out.k_padded) break;
    const int64_t k = first + static_cast<int>(threadIdx.x) * 4;
    const float4 v = value[i];
    const int32_t xy = maximum(detail::magnitude_bits(v.x), detail::magnitude_bits(v.y));
    const int32_t zw = maximum(detail::magnitude_bits(v.z), detail::magnitude_bits(v.w));
    const int32_t top = detail::max_of_lanes(maximum(xy, zw), lanes);
    const float largest = rounded_magnitude(top);
    const bool finite = top < kInfinity;
    const float inverse = finite && top != 0 ? div_rn(kLimit, largest) : 0.0f;
    const int32_t a = detail::quantized(v.x, inverse, kLimit), b = detail::quantized(v.y, inverse, kLimit);
    const int32_t c = detail::quantized(v.z, inverse, kLimit), d = detail::quantized(v.w, inverse, kLimit);
    const int32_t sum = detail::sum_of_lanes(a + b + c + d, lanes);

    if (k < out.k_padded) {
      const int64_t at = row * out.k_padded + k;
      store(reinterpret_cast<uint32_t*>(out.q + at), detail::pack_bytes(a, b, c, d));
      const int64_t group = k >> shift;
      if (k == group << shift && group < out.groups) {
        store(out.scale + row * out.groups + group, finite ? div_rn(largest, kLimit) : __builtin_nanf(""));
        store(out.sum + row * out.groups + group, sum);
      }
    }
  }
}

QS_DEVICE int32_t parts_of(const QuantizedRows& rows) {
  return static_cast<int32_t>((rows.k_padded + kPartValues - 1) / kPartValues);
}

// The whole row.
template <class Source>
QS_DEVICE void quantize_row(const Source& source, const QuantizedRows& out, int64_t row) {
  constexpr int kWords = 4;
  for (int64_t begin = 0; begin < out.k_padded; begin += kWords * kPartValues) {
    quantize_part<kWords>(source, out, row, begin);
  }
}

// --- host ------------------------------------------------------------------------------------------------------------
// Where a stage's rows come from, and what else is done with them on the way.
struct RowInput {
  const float* x = nullptr;
  int64_t stride = 0;
  const int32_t* index = nullptr;  // row i is x[index[i]], or where null x[i]
  Norm norm;                       // no weight: none
  float* copy = nullptr;           // [rows, k]: gets the rows as they are, or null
  int32_t* depth = nullptr;        // depth[depth_index ? depth_index[i] : i] goes up by one for row i; or null
  const int32_t* depth_index = nullptr;
};
void quantize_rows(const RowInput& input, const QuantizedRows& out, const int32_t* count, Stream stream);

}  // namespace quicksilver::QS_CUDA
