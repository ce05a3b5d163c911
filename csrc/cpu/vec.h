// Sixteen lanes of fp32 or int32, on any instruction set: every kernel is written once on these.
//
// A lane's result is the same on every set. (Baseline's fma() rounds to fp64 on its way: one in some 2^29 differs.)
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define QS_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef QS_SHUFFLE4
#define QS_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, i32x4{i, j, k, l})
#endif

namespace quicksilver::QS_ISA {

inline constexpr int kLanes = QS_AVX512 ? 16 : QS_AVX2 ? 8 : 4;  // of the machine's vectors
inline constexpr int kParts = 16 / kLanes;                       // machine vectors per sixteen lanes

typedef float nf __attribute__((vector_size(4 * kLanes)));
typedef int32_t ni __attribute__((vector_size(4 * kLanes)));
typedef uint32_t nu __attribute__((vector_size(4 * kLanes)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int16_t i16x8 __attribute__((vector_size(16)));

struct f32x16 {
  nf v[kParts];
};
struct i32x16 {
  ni v[kParts];
};

#define QS_PARTS(i) _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)
#define QS_LANEWISE(T, name, expression)     \
  QS_INLINE T name(const T& a, const T& b) { \
    T r;                                     \
    QS_PARTS(i) r.v[i] = expression;         \
    return r;                                \
  }

// --- machine vectors
// ---------------------------------------------------------------------------------------------------
template <class V>
QS_INLINE V load_as(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
QS_INLINE void store_as(void* p, const V& v) {
  memcpy(p, &v, sizeof v);
}
QS_INLINE ni broadcast_ni(int32_t x) { return ni{} + x; }
QS_INLINE nf broadcast_nf(float x) { return x - nf{}; }  // of -0 too that is x, so nothing is left of the subtraction

// max(a, b), b where either is NaN
QS_INLINE nf max_nf(nf a, nf b) {
#if QS_AVX512
  return _mm512_max_ps(a, b);
#elif QS_AVX2
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
QS_INLINE nf min_nf(nf a, nf b) {
#if QS_AVX512
  return _mm512_min_ps(a, b);
#elif QS_AVX2
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
QS_INLINE nf fma_nf(nf a, nf b, nf c) {
#if QS_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif QS_AVX2
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  nf r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  typedef double Wide __attribute__((vector_size(8 * kLanes)));
  const Wide x = __builtin_convertvector(a, Wide), y = __builtin_convertvector(b, Wide);
  return __builtin_convertvector(x * y + __builtin_convertvector(c, Wide), nf);
#endif
}
// To the nearest integer, ties to even; |a| < 2^22.
QS_INLINE ni round_ni(nf a) {
#if QS_AVX512
  return (ni)_mm512_cvtps_epi32(a);
#elif QS_AVX2
  return (ni)_mm256_cvtps_epi32(a);
#elif defined(__SSE2__)
  return (ni)_mm_cvtps_epi32(a);
#else
  return __builtin_convertvector((a + 12582912.0f) - 12582912.0f, ni);
#endif
}
QS_INLINE nf to_nf(ni a) {
#if QS_AVX512
  return _mm512_cvtepi32_ps((__m512i)a);
#elif QS_AVX2
  return _mm256_cvtepi32_ps((__m256i)a);
#elif defined(__SSE2__)
  return _mm_cvtepi32_ps((__m128i)a);
#else
  return __builtin_convertvector(a, nf);
#endif
}
// Pairs of int16 products, added up: lane = a.low * b.low + a.high * b.high.
QS_INLINE ni madd16(ni a, ni b) {
#if QS_AVX512
  return (ni)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif QS_AVX2
  return (ni)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (ni)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
QS_INLINE nf half_to_nf(const uint16_t* p) {
#if QS_AVX512
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif QS_AVX2
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const ni h = {p[0], p[1], p[2], p[3]};
  const ni magnitude = h & 0x7fff;
  // 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  ni bits = (ni)((nf)(magnitude << 13) * 0x1p112f);
  bits |= (magnitude > 0x7bff) & 0x7f800000;
  return (nf)(bits | ((h & 0x8000) << 16));
#endif
}
QS_INLINE nf bfloat_to_nf(const uint16_t* p) {
#if QS_AVX512
  return (nf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif QS_AVX2
  return (nf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (nf)(ni{p[0], p[1], p[2], p[3]} << 16);
#endif
}

QS_INLINE nf bytes_to_nf(const int8_t* p) {
#if QS_AVX512
  return to_nf((ni)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif QS_AVX2
  return to_nf((ni)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__SSE2__)
  const __m128i once = _mm_cvtsi32_si128(load_as<int32_t>(p));
  const __m128i twice = _mm_unpacklo_epi8(once, once);
  return to_nf((ni)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
#else
  return to_nf(ni{p[0], p[1], p[2], p[3]});
#endif
}

// body<n>() for n in 1..kMost.
template <int kMost, class Body>
QS_INLINE void with_constant(int n, const Body& body) {
  if constexpr (kMost > 0) {
    if (n == kMost) return body.template operator()<kMost>();
    with_constant<kMost - 1>(n, body);
  }
}

// --- sixteen lanes
// -----------------------------------------------------------------------------------------------------
QS_LANEWISE(f32x16, operator+, a.v[i] + b.v[i])
QS_LANEWISE(f32x16, operator-, a.v[i] - b.v[i])
QS_LANEWISE(f32x16, operator*, a.v[i] * b.v[i])
QS_LANEWISE(f32x16, operator/, a.v[i] / b.v[i])
QS_LANEWISE(f32x16, max, max_nf(a.v[i], b.v[i]))
QS_LANEWISE(f32x16, min, min_nf(a.v[i], b.v[i]))
QS_LANEWISE(i32x16, operator+, a.v[i] + b.v[i])
QS_LANEWISE(i32x16, operator-, a.v[i] - b.v[i])
QS_LANEWISE(i32x16, operator&, a.v[i] & b.v[i])
QS_LANEWISE(i32x16, max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])

QS_INLINE f32x16 broadcast(float x) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = broadcast_nf(x);
  return r;
}
QS_INLINE i32x16 broadcast(int32_t x) {
  i32x16 r;
  QS_PARTS(i) r.v[i] = broadcast_ni(x);
  return r;
}
QS_INLINE f32x16 zeros() {
  f32x16 r;
  QS_PARTS(i) r.v[i] = nf{};
  return r;
}
QS_INLINE f32x16 load(const float* p) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = load_as<nf>(p + i * kLanes);
  return r;
}
QS_INLINE void store(float* p, const f32x16& a) { QS_PARTS(i) store_as(p + i * kLanes, a.v[i]); }
QS_INLINE void store(int32_t* p, const i32x16& a) { QS_PARTS(i) store_as(p + i * kLanes, a.v[i]); }
// The first n of sixteen, the rest zero.
QS_INLINE f32x16 load(const float* p, int n) {
  if (n >= 16) return load(p);
  float t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}
QS_INLINE void store(float* p, const f32x16& a, int n) {
  if (n >= 16) return store(p, a);
  float t[16];
  store(t, a);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}
QS_INLINE f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = fma_nf(a.v[i], b.v[i], c.v[i]);
  return r;
}
QS_INLINE f32x16 to_float(const i32x16& a) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = to_nf(a.v[i]);
  return r;
}
QS_INLINE i32x16 round_to_int(const f32x16& a) {
  i32x16 r;
  QS_PARTS(i) r.v[i] = round_ni(a.v[i]);
  return r;
}
QS_INLINE i32x16 bits_of(const f32x16& a) {
  i32x16 r;
  QS_PARTS(i) r.v[i] = (ni)a.v[i];
  return r;
}
QS_INLINE f32x16 float_of(const i32x16& a) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = (nf)a.v[i];
  return r;
}
template <int kBits>
QS_INLINE i32x16 shift_left(const i32x16& a) {
  i32x16 r;
  QS_PARTS(i) r.v[i] = a.v[i] << kBits;
  return r;
}
template <int kBits>
QS_INLINE i32x16 shift_right(const i32x16& a) {  // arithmetic
  i32x16 r;
  QS_PARTS(i) r.v[i] = a.v[i] >> kBits;
  return r;
}
// All bits set where a is a number, none where it is NaN.
QS_INLINE i32x16 ordered(const f32x16& a) {
  i32x16 r;
  QS_PARTS(i) r.v[i] = a.v[i] == a.v[i];
  return r;
}

// --- narrow types
// -----------------------------------------------------------------------------------------------------
QS_INLINE f32x16 load_half(const uint16_t* p) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = half_to_nf(p + i * kLanes);
  return r;
}
QS_INLINE f32x16 load_bfloat(const uint16_t* p) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = bfloat_to_nf(p + i * kLanes);
  return r;
}
QS_INLINE f32x16 load_bytes(const int8_t* p) {
  f32x16 r;
  QS_PARTS(i) r.v[i] = bytes_to_nf(p + i * kLanes);
  return r;
}
// The first n of sixteen, the rest zero.
QS_INLINE f32x16 load_half(const uint16_t* p, int n) {
  if (n >= 16) return load_half(p);
  uint16_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_half(t);
}
QS_INLINE f32x16 load_bfloat(const uint16_t* p, int n) {
  if (n >= 16) return load_bfloat(p);
  uint16_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_bfloat(t);
}
QS_INLINE f32x16 load_bytes(const int8_t* p, int n) {
  if (n >= 16) return load_bytes(p);
  int8_t t[16] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load_bytes(t);
}
// Rounded to nearest, ties to even.
QS_INLINE uint16_t to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (bits < 0x38800000) {                                              // subnormal: let an addition do the rounding
    float magnitude;
    memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;  // whose last place is 2^-24, the subnormals' unit
    memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}
QS_INLINE uint16_t to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}
QS_INLINE void store_half(uint16_t* p, const f32x16& a) {
#if QS_AVX2
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; i += 8) {
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(t + i), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) p[i] = to_half(t[i]);
#endif
}
QS_INLINE void store_bfloat(uint16_t* p, const f32x16& a) {
  float t[16];
  store(t, a);
  for (int i = 0; i < 16; ++i) p[i] = to_bfloat(t[i]);
}

// --- across lanes, always pairwise: 8 apart, then 4, 2, 1
// --------------------------------------------------------------
QS_INLINE f32x4 sum_to_four(const f32x16& a) {
#if QS_AVX512
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v[0]), 1));
  const __m256 t = _mm256_add_ps(_mm512_castps512_ps256(a.v[0]), high);
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#elif QS_AVX2
  const __m256 t = a.v[0] + a.v[1];
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#else
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
#endif
}
QS_INLINE float sum(const f32x16& a) {
  const f32x4 t = sum_to_four(a);
  return (t[0] + t[2]) + (t[1] + t[3]);
}
// The sums of four vectors, in the same order each.
QS_INLINE f32x4 sum(const f32x16& a, const f32x16& b, const f32x16& c, const f32x16& d) {
#if QS_AVX512
  const auto halves = [](nf x, nf y) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
  };
  const nf ab = halves(a.v[0], b.v[0]), cd = halves(c.v[0], d.v[0]);
  const nf fours = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  const nf twos = fours + _mm512_shuffle_ps(fours, fours, 0x4e), ones = twos + _mm512_shuffle_ps(twos, twos, 0xb1);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps((__m512i)ni{0, 4, 8, 12}, ones));
#else
  const f32x4 p = sum_to_four(a), q = sum_to_four(b), r = sum_to_four(c), s = sum_to_four(d);
  const f32x4 pq = QS_SHUFFLE4(p, q, 0, 1, 4, 5) + QS_SHUFFLE4(p, q, 2, 3, 6, 7);
  const f32x4 rs = QS_SHUFFLE4(r, s, 0, 1, 4, 5) + QS_SHUFFLE4(r, s, 2, 3, 6, 7);
  return QS_SHUFFLE4(pq, rs, 0, 2, 4, 6) + QS_SHUFFLE4(pq, rs, 1, 3, 5, 7);
#endif
}
QS_INLINE int32_t sum(const i32x16& a) {
  int32_t t[16];
  store(t, a);
  const i32x4 s = load_as<i32x4>(t) + load_as<i32x4>(t + 4) + load_as<i32x4>(t + 8) + load_as<i32x4>(t + 12);
  return s[0] + s[1] + s[2] + s[3];
}
QS_INLINE int32_t max_lane(const i32x16& a) {
  int32_t t[16];
  store(t, a);
  int32_t m = t[0];
  for (int i = 1; i < 16; ++i) m = t[i] > m ? t[i] : m;
  return m;
}
QS_INLINE float max_lane(const f32x16& a) {
  float t[16];
  store(t, a);
  float m = t[0];
  for (int i = 1; i < 16; ++i) m = t[i] > m ? t[i] : m;
  return m;
}

// e^x to about one unit in the last place; overflows to Inf and underflows to 0 as it should, NaN stays NaN.
QS_INLINE f32x16 exp(const f32x16& a) {
  // Outside of these, the result is 0 or Inf anyway. The bound comes first, so that max and min give back a NaN.
  const f32x16 x = min(broadcast(89.0f), max(broadcast(-104.0f), a));
  const i32x16 n = round_to_int(x * broadcast(1.44269504f));
  const f32x16 f = to_float(n);
  // ln 2 in two parts, the first with so few bits that its multiples are exact.
  const f32x16 r = fma(f, broadcast(2.12194440e-4f), fma(f, broadcast(-0.693359375f), x));
  f32x16 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  // 2^n in two steps, since n can be below -126 or above 127; a NaN's n is whatever it is, p stays NaN.
  const i32x16 half = shift_right<1>(n);
  const f32x16 a_scale = float_of(shift_left<23>(half + broadcast(127)));
  const f32x16 b_scale = float_of(shift_left<23>(n - half + broadcast(127)));
  return p * a_scale * b_scale;
}

}  // namespace quicksilver::QS_ISA
