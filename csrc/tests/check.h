// What the kernel tests share: the kernels of every instruction set that can run here, random data, comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace check {

struct Variant {
  std::string name;
  const quicksilver::Kernels* kernels;
};
// With QS_AVX512_BY_AVX2, the AVX-512 variants are those made of AVX2 (avx512_by_avx2.h), which any AVX2 machine can
// run.
std::vector<Variant> variants();

inline int failures = 0;
inline void report(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 40) std::printf("FAILED %s\n", what.c_str());
}

struct Random {
  explicit Random(uint32_t seed) : engine(seed) {}
  std::mt19937 engine;
  int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }  // both included
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<float> normals(int64_t n, float scale = 1) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal() * scale;
    return x;
  }
};

// Equal to the bit, any NaN counting as any other.
inline bool same(const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return false;
    if (!std::isnan(a[i]) && std::memcmp(a + i, b + i, 4) != 0) return false;
  }
  return true;
}
inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same(a.data(), b.data(), static_cast<int64_t>(a.size()));
}
// The number that a group is quantized by: matryoshka.h's absmax, the largest magnitude rounded up to bfloat16.
inline float rounded_magnitude(float largest) {
  int exponent;
  const float mantissa = std::frexp(largest, &exponent);
  const int bits = exponent < -125 ? 8 - (-125 - exponent) : 8;  // a subnormal number has fewer
  const float rounded = std::ldexp(std::ceil(std::ldexp(mantissa, bits)), exponent - bits);
  return std::isinf(rounded) && !std::isinf(largest) ? std::ldexp(255.0f, 120) : rounded;
}

// Relative error in the 2-norm.
inline double error(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, base = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    base += want[i] * want[i];
  }
  return base == 0 ? std::sqrt(difference) : std::sqrt(difference / base);
}

inline std::vector<float> poisoned(int64_t n) { return std::vector<float>(static_cast<size_t>(n), std::nanf("")); }

float half_to_float(uint16_t h);
uint16_t float_to_half(float x);

// Quantized rows in memory of their own, at first full of garbage.
struct OwnedRows {
  std::vector<char> memory;
  quicksilver::QuantizedRows rows;
  OwnedRows(int64_t count, int64_t k, int group)
      : memory(static_cast<size_t>(quicksilver::quantized_rows_bytes(count, k, group) + 64), char(0x5a)) {
    void* start = memory.data();
    size_t space = memory.size();
    rows = quicksilver::carve_quantized_rows(std::align(64, 1, start, space), count, k, group);
  }
};

// A packed weight and the codes that it was packed from.
struct Weight {
  int64_t n, k;
  int group;
  std::vector<uint8_t> codes;  // [n, k], hi in the high nibble
  std::vector<uint8_t> hi, lo;
  std::vector<uint16_t> scale, offset;     // in storage order
  std::vector<float> scale_of, offset_of;  // [n, groups]
  quicksilver::MatryoshkaWeight view(bool low = true) const {
    return {hi.data(), low ? lo.data() : nullptr, scale.data(), offset.data(), n, k, group};
  }
};
Weight random_weight(Random& random, int64_t n, int64_t k, int group);

void test_gemm(const Variant& variant);
void test_attention(const Variant& variant);
void test_mechanisms(const Variant& variant);
void test_layer(const Variant& variant);
// Results of one variant that others must repeat to the bit; baseline only those without fused multiply-adds.
void compare_with_others(const Variant& variant, const std::string& what, const std::vector<float>& x, bool fused);

}  // namespace check
