// Numbers of 16 bits: to fp32, which is exact, and from it, rounded to nearest with ties to even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace quicksilver::emulator {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // A float with the half's exponent field is 2^112 times too small, subnormals included.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;          // the NaN that cvt.rn.f16.f32 gives
  if (rest >= 0x477ff000u) return sign | 0x7c00;  // 65520 and up
  if (rest < 0x38800000u) {                       // below 2^-14: the sum with 0.5 ends at the last bit of a half
    const float sum = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfff + (rest >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

inline float bfloat_to_float(uint16_t b) { return std::bit_cast<float>(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // the NaN that cvt.rn.bf16.f32 gives
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace quicksilver::emulator
