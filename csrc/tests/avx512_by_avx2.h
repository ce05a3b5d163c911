// The AVX-512 intrinsics that the kernels use, made of AVX2 halves, so that the AVX-512 kernels' logic runs on machines
// that have only AVX2. For tests alone: slow, but equal to the bit.
#pragma once

#include <immintrin.h>

namespace avx512_by_avx2 {

template <class V, class W>
static inline V half(const W& wide, int i) {
  V v;
  __builtin_memcpy(&v, reinterpret_cast<const char*>(&wide) + 32 * i, sizeof v);
  return v;
}
template <class W, class V>
static inline W join(V low, V high) {
  W w;
  __builtin_memcpy(&w, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&w) + sizeof low, &high, sizeof high);
  return w;
}
// f on both halves
template <class W, class V, class F, class... Wide>
static inline W each(F f, const Wide&... wide) {
  return join<W>(f(half<V>(wide, 0)...), f(half<V>(wide, 1)...));
}

using F = __m512;
using I = __m512i;

#define QS_FLOAT(name, ...) each<F, __m256>([](auto... v) { return name(v...); }, __VA_ARGS__)
#define QS_INT(name, ...) each<I, __m256i>([](auto... v) { return name(v...); }, __VA_ARGS__)

static inline F max_ps(F a, F b) { return QS_FLOAT(_mm256_max_ps, a, b); }
static inline F min_ps(F a, F b) { return QS_FLOAT(_mm256_min_ps, a, b); }
static inline F fmadd_ps(F a, F b, F c) { return QS_FLOAT(_mm256_fmadd_ps, a, b, c); }
static inline I cvtps_epi32(F a) {
  return each<I, __m256>([](__m256 v) { return _mm256_cvtps_epi32(v); }, a);
}
static inline F cvtepi32_ps(I a) {
  return each<F, __m256i>([](__m256i v) { return _mm256_cvtepi32_ps(v); }, a);
}
static inline I madd_epi16(I a, I b) { return QS_INT(_mm256_madd_epi16, a, b); }
static inline I maddubs_epi16(I a, I b) { return QS_INT(_mm256_maddubs_epi16, a, b); }
static inline I add_epi16(I a, I b) { return QS_INT(_mm256_add_epi16, a, b); }
static inline I slli_epi32(I a, int n) {
  return each<I, __m256i>([n](__m256i v) { return _mm256_slli_epi32(v, n); }, a);
}
static inline I srli_epi32(I a, int n) {
  return each<I, __m256i>([n](__m256i v) { return _mm256_srli_epi32(v, n); }, a);
}
static inline F cvtph_ps(__m256i a) {
  return join<F>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
static inline I cvtepi8_epi32(__m128i a) {
  return join<I>(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
static inline I cvtepu16_epi32(__m256i a) {
  return join<I>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                 _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
static inline __m256 castps512_ps256(F a) { return half<__m256>(a, 0); }
static inline __m512d castps_pd(F a) { return reinterpret_cast<const __m512d&>(a); }
static inline __m256d extractf64x4_pd(__m512d a, int i) { return half<__m256d>(a, i); }

#undef QS_FLOAT
#undef QS_INT

// Lane by lane, from the manual's description.
struct Bytes {
  unsigned char b[64];
};
static inline __m128i cvtepi32_epi8(I a) {
  Bytes in;
  __builtin_memcpy(&in, &a, 64);
  unsigned char out[16];
  for (int i = 0; i < 16; ++i) out[i] = in.b[4 * i];
  __m128i r;
  __builtin_memcpy(&r, out, sizeof r);
  return r;
}
static inline I ternarylogic_epi32(I a, I b, I c, int table) {
  Bytes x, y, z, r{};
  __builtin_memcpy(&x, &a, 64);
  __builtin_memcpy(&y, &b, 64);
  __builtin_memcpy(&z, &c, 64);
  for (int i = 0; i < 64; ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      const int row = (x.b[i] >> bit & 1) << 2 | (y.b[i] >> bit & 1) << 1 | (z.b[i] >> bit & 1);
      r.b[i] = static_cast<unsigned char>(r.b[i] | (table >> row & 1) << bit);
    }
  }
  I out;
  __builtin_memcpy(&out, &r, 64);
  return out;
}
struct Lanes {
  float f[16];
};
template <class Pick>
static inline F picked(F a, F b, Pick pick) {  // lane i is lane pick(i) of a, or, from 16 on, of b
  Lanes in[2], out;
  __builtin_memcpy(&in[0], &a, 64);
  __builtin_memcpy(&in[1], &b, 64);
  for (int i = 0; i < 16; ++i) out.f[i] = in[pick(i) / 16].f[pick(i) % 16];
  F r;
  __builtin_memcpy(&r, &out, 64);
  return r;
}
static inline F shuffle_f32x4(F a, F b, int pieces) {
  return picked(a, b, [=](int i) { return i / 8 * 16 + (pieces >> i / 4 * 2 & 3) * 4 + i % 4; });
}
static inline F shuffle_ps(F a, F b, int lanes) {
  return picked(a, b, [=](int i) { return i % 4 / 2 * 16 + i / 4 * 4 + (lanes >> i % 4 * 2 & 3); });
}
static inline F permutexvar_ps(I index, F a) {
  int from[16];
  __builtin_memcpy(from, &index, 64);
  return picked(a, a, [&](int i) { return from[i] & 15; });
}
static inline __m128 castps512_ps128(F a) { return _mm256_castps256_ps128(half<__m256>(a, 0)); }
static inline I dpbusd_epi32(I sum, I a, I b) {  // unsigned bytes of a, signed bytes of b, no saturation
  int lanes[16];
  Bytes x;
  signed char y[64];
  __builtin_memcpy(lanes, &sum, 64);
  __builtin_memcpy(&x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  for (int i = 0; i < 64; ++i) lanes[i / 4] += x.b[i] * y[i];
  I out;
  __builtin_memcpy(&out, lanes, 64);
  return out;
}

}  // namespace avx512_by_avx2

#define _mm512_max_ps avx512_by_avx2::max_ps
#define _mm512_min_ps avx512_by_avx2::min_ps
#define _mm512_fmadd_ps avx512_by_avx2::fmadd_ps
#define _mm512_cvtps_epi32 avx512_by_avx2::cvtps_epi32
#define _mm512_cvtepi32_ps avx512_by_avx2::cvtepi32_ps
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 avx512_by_avx2::madd_epi16
#define _mm512_maddubs_epi16 avx512_by_avx2::maddubs_epi16
#define _mm512_add_epi16 avx512_by_avx2::add_epi16
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 avx512_by_avx2::shuffle_f32x4
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps avx512_by_avx2::shuffle_ps
#define _mm512_permutexvar_ps avx512_by_avx2::permutexvar_ps
#define _mm512_castps512_ps128 avx512_by_avx2::castps512_ps128
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_slli_epi32 avx512_by_avx2::slli_epi32
#define _mm512_srli_epi32 avx512_by_avx2::srli_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps avx512_by_avx2::cvtph_ps
#define _mm512_cvtepi8_epi32 avx512_by_avx2::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 avx512_by_avx2::cvtepu16_epi32
#define _mm512_castps512_ps256 avx512_by_avx2::castps512_ps256
#define _mm512_castps_pd avx512_by_avx2::castps_pd
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd avx512_by_avx2::extractf64x4_pd
#define _mm512_cvtepi32_epi8 avx512_by_avx2::cvtepi32_epi8
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 avx512_by_avx2::ternarylogic_epi32
#define _mm512_dpbusd_epi32 avx512_by_avx2::dpbusd_epi32
