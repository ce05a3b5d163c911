// The integer dot products of the GEMM, the only code with a body per instruction set.
//
// An INT8 code is 8 * hi + lo, 0..135, an INT4 code 8 * hi: unsigned bytes. What an INT8 code's zero, 8, takes from a
// dot product is the same for all weights, so sums start with it. With |x| <= 127 and groups of at most 128,
// |dot| <= 135 * 127 * 128 < 2^31.
#pragma once

#include "vec.h"

namespace quicksilver::QS_ISA {

inline constexpr int kLineBytes = 64;  // of a full panel: 16 rows x 8 values

// How far ahead, in bytes, packed weights are fetched. The hardware's own prefetch stops short of the read ceiling,
// most of all with the single stream of one plane. Weights are used once, so they pass by the larger caches, which keep
// what the next stage and the caller want. 1 KiB ahead was better than 2 or 4, this hint (0) than one that fills all
// caches.
inline constexpr int kFetchAhead = 1024;

// Pins a sum to a register at this point. Left alone, GCC reorders a chain of integer additions into a tree, which
// wants all of its terms at once: more registers than there are.
QS_INLINE void in_order(ni& sum) {
#if defined(__GNUC__) && defined(__SSE2__) && !defined(QS_EMULATE_AVX512)
  __asm__("" : "+v"(sum));
#else
  (void)sum;
#endif
}

// The codes of values k..k+3 (a) and k+4..k+7 (b) of each row of a line, as bytes. No sum carries out of its byte.
template <bool kEight>
QS_INLINE void codes_of(ni h, ni l, ni& a, ni& b) {
  const ni high = broadcast_ni(0x78787878), low = broadcast_ni(0x0f0f0f0f);
  a = (h << 3) & high;
  b = (h >> 1) & high;
  if constexpr (kEight) {
    a += l & low;
    b += (l >> 4) & low;
  }
}

#if QS_AVX2
// --- direct: from the packed planes, for few rows of x
// -----------------------------------------------------------------
//
// A line's 32-bit lane r holds row r's eight nibbles, low ones k..k+3, high ones k+4..k+7; x is broadcast four at a
// time.

// Rows of x side by side: of each line all of them, eight values each, the next line's `stride` words later.
struct DirectX {
  const int64_t* words;
  int64_t stride;

  // Values k..k + 3 of row r's part of a line (part 0), or k + 4..k + 7 (part 1).
  QS_INLINE_MEMBER ni four(int line, int r, int part) const {
    int32_t values;
    memcpy(&values, reinterpret_cast<const char*>(words + line * stride + r) + part * 4, sizeof values);
    return broadcast_ni(values);
  }
};

#if QS_VNNI
QS_INLINE ni dot4(ni sum, ni code, ni x) { return (ni)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)code, (__m512i)x); }

// dot[r] += the dot products of `lines` lines with x[r].
template <int R, bool kEight>
QS_INLINE void direct_dots(const uint8_t* hi, const uint8_t* lo, const DirectX& x, int lines, i32x16 (&dot)[R]) {
  // A dpbusd takes 4 to 5 cycles and two can start in each, so few rows take several sums in turn.
  constexpr int kTurns = R == 1 ? 4 : R <= 3 ? 2 : 1;
  ni sums[kTurns][R] = {};
  const auto step = [&](int line, int turn) __attribute__((always_inline)) {
    const int at = line * kLineBytes;
    __builtin_prefetch(hi + at + kFetchAhead, 0, 0);
    if constexpr (kEight) __builtin_prefetch(lo + at + kFetchAhead, 0, 0);
    ni a, b;
    codes_of<kEight>(load_as<ni>(hi + at), kEight ? load_as<ni>(lo + at) : ni{}, a, b);
    const int second = (turn + 1) % kTurns;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[turn][r] = dot4(sums[turn][r], a, x.four(line, r, 0));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[second][r] = dot4(sums[second][r], b, x.four(line, r, 1));
  };
  int line = 0;
  for (; line + 2 <= lines; line += 2) {
    step(line, 0);
    step(line + 1, kTurns == 4 ? 2 : 0);
  }
  if (line < lines) step(line, 0);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int turn = 0; turn < kTurns; ++turn) dot[r].v[0] += sums[turn][r];
  }
}
#else  // AVX2, AVX-512
// Unsigned times signed bytes, neighbours added up, to int16.
QS_INLINE ni maddubs(ni code, ni x) {
#if QS_AVX512
  return (ni)_mm512_maddubs_epi16((__m512i)code, (__m512i)x);
#else
  return (ni)_mm256_maddubs_epi16((__m256i)code, (__m256i)x);
#endif
}
QS_INLINE ni add16(ni a, ni b) {
#if QS_AVX512
  return (ni)_mm512_add_epi16((__m512i)a, (__m512i)b);
#else
  return (ni)_mm256_add_epi16((__m256i)a, (__m256i)b);
#endif
}

// Parts kFirst..kFirst + kCount of the sixteen rows, for up to 4 lines: 8 additions of at most 2 * 15 * 128 fit int16.
template <int R, bool kEight, int kFirst, int kCount>
QS_INLINE void direct_lines(const uint8_t* hi, const uint8_t* lo, const DirectX& x, int lines, i32x16 (&dot)[R]) {
  const ni nibbles = broadcast_ni(0x0f0f0f0f);
  ni high[R][kCount] = {}, low[R][kCount] = {};
#pragma GCC unroll 4
  for (int line = 0; line < lines; ++line) {
#pragma GCC unroll 2
    for (int part = 0; part < kCount; ++part) {
      const int at = line * kLineBytes + (kFirst + part) * kLanes * 4;
      if (kFirst + part == 0) {
        __builtin_prefetch(hi + at + kFetchAhead, 0, 0);
        if (kEight) __builtin_prefetch(lo + at + kFetchAhead, 0, 0);
      }
      const ni h = load_as<ni>(hi + at);
      const ni h0 = h & nibbles, h1 = (h >> 4) & nibbles;
      ni l0 = {}, l1 = {};
      if constexpr (kEight) {
        const ni l = load_as<ni>(lo + at);
        l0 = l & nibbles;
        l1 = (l >> 4) & nibbles;
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const ni x0 = x.four(line, r, 0), x1 = x.four(line, r, 1);
        high[r][part] = add16(high[r][part], add16(maddubs(h0, x0), maddubs(h1, x1)));
        in_order(high[r][part]);
        if constexpr (kEight) {
          low[r][part] = add16(low[r][part], add16(maddubs(l0, x0), maddubs(l1, x1)));
          in_order(low[r][part]);
        }
      }
    }
  }
  const ni eights = broadcast_ni(0x00080008), ones = broadcast_ni(0x00010001);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int part = 0; part < kCount; ++part) {
      ni& d = dot[r].v[kFirst + part];
      d += madd16(high[r][part], eights);
      if constexpr (kEight) d += madd16(low[r][part], ones);
    }
  }
}

// dot[r] += the dot products of `lines` lines with x[r].
template <int R, bool kEight>
QS_INLINE void direct_dots(const uint8_t* hi, const uint8_t* lo, const DirectX& x, int lines, i32x16 (&dot)[R]) {
  // AVX2 has registers for two rows of x with all of a panel's rows, else for half of them.
  constexpr int kCount = R <= 2 ? kParts : 1;
  for (int line = 0; line < lines; line += 4) {
    const uint8_t* h = hi + line * kLineBytes;
    const uint8_t* l = kEight ? lo + line * kLineBytes : nullptr;
    const DirectX at{x.words + line * x.stride, x.stride};
    const int n = lines - line < 4 ? lines - line : 4;
    if (n == 4) {
      direct_lines<R, kEight, 0, kCount>(h, l, at, 4, dot);
      if constexpr (kCount < kParts) direct_lines<R, kEight, kCount, kCount>(h, l, at, 4, dot);
    } else {
      direct_lines<R, kEight, 0, kCount>(h, l, at, n, dot);
      if constexpr (kCount < kParts) direct_lines<R, kEight, kCount, kCount>(h, l, at, n, dot);
    }
  }
}
#endif
#endif  // QS_AVX2

// --- blocked: from unpacked codes, for many rows of x
// ------------------------------------------------------------------
//
// A step is one 32-bit lane per weight row: four bytes where dpbusd exists, else two int16. Of two int16 in a lane the
// values are k, k + 2 and in the next step k + 1, k + 3.
inline constexpr int kStepValues = QS_VNNI ? 4 : 2;
inline constexpr int kLineSteps = 8 / kStepValues;
inline constexpr int kPanels = QS_AVX512 ? 2 : 1;  // side by side: x is loaded once for both

// Every other byte, as int16.
QS_INLINE ni even_bytes(ni a) { return a & broadcast_ni(0x00ff00ff); }
QS_INLINE ni odd_bytes(ni a) {
  typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
  return (ni)((Words)a >> 8);
}

// Unpacks lines into steps of kPanels times sixteen lanes, of which these are one panel's.
template <bool kEight>
static void unpack_lines(const uint8_t* hi, const uint8_t* lo, int lines, int32_t* steps) {
  constexpr int kStep = 16 * kPanels;
  for (int line = 0; line < lines; ++line) {
    QS_PARTS(part) {
      const int at = line * kLineBytes + part * kLanes * 4;
      ni a, b;
      codes_of<kEight>(load_as<ni>(hi + at), kEight ? load_as<ni>(lo + at) : ni{}, a, b);
      int32_t* out = steps + line * kLineSteps * kStep + part * kLanes;
#if QS_VNNI
      store_as(out, a);
      store_as(out + kStep, b);
#else
      store_as(out, even_bytes(a));
      store_as(out + kStep, odd_bytes(a));
      store_as(out + 2 * kStep, even_bytes(b));
      store_as(out + 3 * kStep, odd_bytes(b));
#endif
    }
  }
}

// n values of a quantized row, n a multiple of 8, as steps.
QS_INLINE void spread_row(const int8_t* q, int64_t n, int32_t* steps) {
#if QS_VNNI
  memcpy(steps, q, static_cast<size_t>(n));
#else
  for (int64_t k = 0; k < n; k += 8) {
    i16x8 values = {};
    memcpy(&values, q + k, 8);
    const i32x4 even = (i32x4)((values << 8) >> 8), odd = (i32x4)(values >> 8);
    store_as(steps + k / 2, QS_SHUFFLE4(even, odd, 0, 4, 1, 5));
  }
#endif
}

QS_INLINE ni dot_step(ni sum, ni code, ni x) {
#if QS_VNNI
  return dot4(sum, code, x);
#else
  return sum + madd16(code, x);
#endif
}

// dot[r] += the dot products of R rows of x, `stride` steps apart, with kP panels' unpacked codes.
template <int R, int kP>
QS_INLINE void blocked_dots(const int32_t* x, int64_t stride, const int32_t* codes, int steps, i32x16 (&dot)[R][kP]) {
#pragma GCC unroll 2
  for (int step = 0; step < steps; ++step) {
    ni code[kP][kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      QS_PARTS(part) code[p][part] = load_as<ni>(codes + (step * kPanels + p) * 16 + part * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const ni value = broadcast_ni(x[r * stride + step]);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) {
        QS_PARTS(part) {
          dot[r][p].v[part] = dot_step(dot[r][p].v[part], code[p][part], value);
          in_order(dot[r][p].v[part]);
        }
      }
    }
  }
}

}  // namespace quicksilver::QS_ISA
