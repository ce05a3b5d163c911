// Quantizing fp32 values, wherever they come from.
#pragma once

#include "quicksilver/matryoshka.h"
#include "vec.h"

namespace quicksilver::QS_ISA {

// Sixteen int8 of sixteen int32 that fit.
QS_INLINE void store_bytes(int8_t* p, const i32x16& a) {
#if QS_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)a.v[0]));
#elif QS_AVX2
  const __m256i words = _mm256_packs_epi32((__m256i)a.v[0], (__m256i)a.v[1]);  // the quarters 0, 2, 1, 3
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
#elif defined(__SSE2__)
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm_packs_epi32((__m128i)a.v[0], (__m128i)a.v[1]),
                                                _mm_packs_epi32((__m128i)a.v[2], (__m128i)a.v[3])));
#else
  int32_t t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(t[i]);
#endif
}

QS_INLINE void store_bytes(int8_t* p, const i32x16& a, int n) {
  if (n >= 16) return store_bytes(p, a);
  int8_t t[16];
  store_bytes(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

// What a group's largest magnitude is found by: the order of fp32 magnitudes is that of their bits, NaN above Inf above
// all.
QS_INLINE i32x16 magnitudes(const f32x16& a) { return bits_of(a) & broadcast(0x7fffffff); }

// x = scale * q with |q| <= 127; q is 0 and scale NaN where `top`, the largest of magnitudes(x), is no finite number.
struct Quantizer {
  static constexpr float kLimit = 127.0f;
  float scale;
  float inverse;

  QS_INLINE_MEMBER explicit Quantizer(int32_t top) {
    const bool finite = top < 0x7f800000;
    const int32_t rounded = top > 0x7f7f0000 ? 0x7f7f0000 : (top + 0xffff) & ~0xffff;  // up, to bfloat16
    float largest;
    memcpy(&largest, &rounded, sizeof largest);
    scale = finite ? largest / kLimit : __builtin_nanf("");
    inverse = finite && top != 0 ? kLimit / largest : 0.0f;
  }
  QS_INLINE_MEMBER i32x16 operator()(const f32x16& a) const {
    // Of a group so small that the inverse is Inf, zeros stay zero.
    const f32x16 product = a * broadcast(inverse);
    const f32x16 scaled = float_of(bits_of(product) & ordered(product));
    return round_to_int(min(max(scaled, broadcast(-kLimit)), broadcast(kLimit)));
  }
};

// Row `row` of `out` from source(k, n): the values of columns k..k+n, n <= 16, the rest of the lanes zero. meanwhile()
// is called once for every sixteen columns.
template <class Source, class Meanwhile>
static void quantize_row(const QuantizedRows& out, int64_t row, const Source& source, const Meanwhile& meanwhile) {
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t begin = g * out.group;
    const int64_t left = out.k - begin;
    const int n = left < out.group ? static_cast<int>(left) : out.group;
    f32x16 values[8];
    i32x16 top = broadcast(0);
    for (int i = 0; i < n; i += 16) {
      meanwhile();
      values[i / 16] = source(begin + i, n - i < 16 ? n - i : 16);
      top = max(top, magnitudes(values[i / 16]));
    }
    const Quantizer quantizer(max_lane(top));
    int8_t* q = out.q + row * out.k_padded + begin;
    i32x16 total = broadcast(0);
    for (int i = 0; i < n; i += 16) {
      const i32x16 v = quantizer(values[i / 16]);
      total = total + v;
      store_bytes(q + i, v, static_cast<int>(out.k_padded - begin) - i);
    }
    out.scale[row * out.groups + g] = quantizer.scale;
    out.sum[row * out.groups + g] = sum(total);
  }
}

}  // namespace quicksilver::QS_ISA
