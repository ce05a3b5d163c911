// The integer dot products of the GEMM, the only code with a body per instruction set.
//
// With code u = 16 * hi + lo an INT8 weight is u - 136 and an INT4 weight is 16 * hi - 128, so
//   dot(weight, x) = dot(code, x) - zero * sum(x),   code = u, zero = 136   or   code = 16 * hi, zero = 128,
// where the codes are unsigned and the zero's part costs nothing per weight. (Of weights with offsets zero is 8 or 0.)
// With |x| <= 32512 and groups of at most 128, |dot(code, x)| <= 255 * 32512 * 128 < 2^31.
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

#if QS_AVX2
// --- direct: from the packed planes, for few rows of x
// -----------------------------------------------------------------
//
// A line's 32-bit lane r holds row r's eight nibbles, low ones k..k+3, high ones k+4..k+7; x is broadcast four at a
// time.

QS_INLINE ni broadcast_bytes(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return broadcast_ni(four);
}

#if QS_VNNI
QS_INLINE ni dot4(ni sum, ni code, ni x) { return (ni)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)code, (__m512i)x); }

// dot[r] += the dot products of `lines` lines with x[r].
template <int R, bool kEight>
QS_INLINE void direct_dots(const uint8_t* hi, const uint8_t* lo, const int8_t* const (&x)[R], int lines,
                           i32x16 (&dot)[R]) {
  const ni high_nibbles = broadcast_ni(static_cast<int32_t>(0xf0f0f0f0));
  const ni low_nibbles = broadcast_ni(0x0f0f0f0f);
  // Two accumulators for a line's halves, and for a single row two more for odd lines: a dpbusd takes 4 to 5 cycles.
  constexpr int kTurns = R == 1 ? 2 : 1;
  ni first[kTurns][R] = {}, second[kTurns][R] = {};
  const auto step = [&](int line, int turn) __attribute__((always_inline)) {
    const ni h = load_as<ni>(hi + line * kLineBytes);
    ni a, b;
    if constexpr (kEight) {
      const ni l = load_as<ni>(lo + line * kLineBytes);
      // Where the mask, the second operand, is set, 0xe2 takes the first one's bits and 0xb8 the third one's, else the
      // other's. The first operand is the one that is overwritten.
      const __m512i mask = (__m512i)high_nibbles;
      a = (ni)_mm512_ternarylogic_epi32(_mm512_slli_epi32((__m512i)h, 4), mask, (__m512i)l, 0xe2);
      b = (ni)_mm512_ternarylogic_epi32(_mm512_srli_epi32((__m512i)l, 4), mask, (__m512i)h, 0xb8);
    } else {
      a = h & low_nibbles;  // a sixteenth of the code
      b = h & high_nibbles;
    }
    for (int r = 0; r < R; ++r) {
      first[turn][r] = dot4(first[turn][r], a, broadcast_bytes(x[r] + line * 8));
      second[turn][r] = dot4(second[turn][r], b, broadcast_bytes(x[r] + line * 8 + 4));
    }
  };
  int line = 0;
  for (; line + 4 <= lines; line += 4) {
    step(line, 0);
    step(line + 1, kTurns - 1);
    step(line + 2, 0);
    step(line + 3, kTurns - 1);
  }
  for (; line < lines; ++line) step(line, 0);
  for (int r = 0; r < R; ++r) {
    ni a = first[0][r], b = second[0][r];
    if constexpr (kTurns == 2) {
      a += first[1][r];
      b += second[1][r];
    }
    dot[r].v[0] = (kEight ? a : a << 4) + b;
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
QS_INLINE void direct_lines(const uint8_t* hi, const uint8_t* lo, const int8_t* const (&x)[R], int lines,
                            i32x16 (&dot)[R]) {
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
        const ni x0 = broadcast_bytes(x[r] + line * 8), x1 = broadcast_bytes(x[r] + line * 8 + 4);
        high[r][part] = add16(high[r][part], add16(maddubs(h0, x0), maddubs(h1, x1)));
        in_order(high[r][part]);
        if constexpr (kEight) {
          low[r][part] = add16(low[r][part], add16(maddubs(l0, x0), maddubs(l1, x1)));
          in_order(low[r][part]);
        }
      }
    }
  }
  const ni sixteens = broadcast_ni(0x00100010), ones = broadcast_ni(0x00010001);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int part = 0; part < kCount; ++part) {
      ni& d = dot[r].v[kFirst + part];
      d += madd16(high[r][part], sixteens);
      if constexpr (kEight) d += madd16(low[r][part], ones);
    }
  }
}

template <int R, bool kEight>
QS_INLINE void direct_dots(const uint8_t* hi, const uint8_t* lo, const int8_t* const (&x)[R], int lines,
                           i32x16 (&dot)[R]) {
  // AVX2 has registers for two rows of x with all of a panel's rows, else for half of them.
  constexpr int kCount = R <= 2 ? kParts : 1;
  for (int r = 0; r < R; ++r) dot[r] = broadcast(0);
  for (int line = 0; line < lines; line += 4) {
    const uint8_t* h = hi + line * kLineBytes;
    const uint8_t* l = kEight ? lo + line * kLineBytes : nullptr;
    const int8_t* at[R];
    for (int r = 0; r < R; ++r) at[r] = x[r] + line * 8;
    const int8_t* const(&fixed)[R] = at;
    const int n = lines - line < 4 ? lines - line : 4;
    if (n == 4) {
      direct_lines<R, kEight, 0, kCount>(h, l, fixed, 4, dot);
      if constexpr (kCount < kParts) direct_lines<R, kEight, kCount, kCount>(h, l, fixed, 4, dot);
    } else {
      direct_lines<R, kEight, 0, kCount>(h, l, fixed, n, dot);
      if constexpr (kCount < kParts) direct_lines<R, kEight, kCount, kCount>(h, l, fixed, n, dot);
    }
  }
}
#endif
#endif  // QS_AVX2

// --- blocked: from unpacked codes, for many rows of x
// ------------------------------------------------------------------
//
// A step is one 32-bit lane per weight row: four bytes where dpbusd exists, else two int16 (so two planes of x cost no
// more than one). Of two int16 in a lane the values are k, k + 2 and in the next step k + 1, k + 3.
inline constexpr int kStepValues = QS_VNNI ? 4 : 2;
inline constexpr int kLineSteps = 8 / kStepValues;

// Every other byte, as int16.
QS_INLINE ni even_bytes(ni a) { return a & broadcast_ni(0x00ff00ff); }
QS_INLINE ni odd_bytes(ni a) {
  typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
  return (ni)((Words)a >> 8);
}

// Unpacks lines into steps of sixteen lanes.
template <bool kEight>
static void unpack_lines(const uint8_t* hi, const uint8_t* lo, int lines, int32_t* steps) {
  const ni high_nibbles = broadcast_ni(static_cast<int32_t>(0xf0f0f0f0));
  const ni low_nibbles = broadcast_ni(0x0f0f0f0f);
  for (int line = 0; line < lines; ++line) {
    QS_PARTS(part) {
      const int at = line * kLineBytes + part * kLanes * 4;
      const ni h = load_as<ni>(hi + at);
      ni a = (h << 4) & high_nibbles, b = h & high_nibbles;
      if constexpr (kEight) {
        const ni l = load_as<ni>(lo + at);
        a |= l & low_nibbles;
        b |= (l >> 4) & low_nibbles;
      }
      int32_t* out = steps + line * kLineSteps * 16 + part * kLanes;
#if QS_VNNI
      store_as(out, a);
      store_as(out + 16, b);
#else
      store_as(out, even_bytes(a));
      store_as(out + 16, odd_bytes(a));
      store_as(out + 32, even_bytes(b));
      store_as(out + 48, odd_bytes(b));
#endif
    }
  }
}

#if !QS_VNNI
// The steps of kValues = 8 or 16 values: x = q, or 256 * q + q_low where that is given.
template <int kValues>
QS_INLINE void spread_values(const int8_t* q, const int8_t* q_low, int32_t* steps) {
  i16x8 high = {}, low = {};
  memcpy(&high, q, kValues);
  i16x8 even = (high << 8) >> 8, odd = high >> 8;
  if (q_low) {
    memcpy(&low, q_low, kValues);
    even = (high << 8) + ((low << 8) >> 8);
    odd = (odd << 8) + (low >> 8);
  }
  const i32x4 a = (i32x4)even, b = (i32x4)odd;
  store_as(steps, QS_SHUFFLE4(a, b, 0, 4, 1, 5));
  if constexpr (kValues == 16) store_as(steps + 4, QS_SHUFFLE4(a, b, 2, 6, 3, 7));
}
#endif

// n values of a quantized row, n a multiple of 8, as steps.
QS_INLINE void spread_row(const int8_t* q, const int8_t* q_low, int64_t n, int32_t* steps) {
#if QS_VNNI
  (void)q_low;
  memcpy(steps, q, static_cast<size_t>(n));
#else
  int64_t k = 0;
  for (; k + 16 <= n; k += 16) spread_values<16>(q + k, q_low ? q_low + k : nullptr, steps + k / 2);
  if (k < n) spread_values<8>(q + k, q_low ? q_low + k : nullptr, steps + k / 2);
#endif
}

QS_INLINE ni dot_step(ni sum, ni code, ni x) {
#if QS_VNNI
  return dot4(sum, code, x);
#else
  return sum + madd16(code, x);
#endif
}

#if !QS_VNNI
// dot[r] += the dot products of `lines` INT8 lines, which are unpacked on the way, with R rows of x as steps.
template <int R>
QS_INLINE void unpacking_dots(const uint8_t* hi, const uint8_t* lo, const int32_t* x, int64_t stride, int lines,
                              i32x16 (&dot)[R]) {
  const ni high_nibbles = broadcast_ni(static_cast<int32_t>(0xf0f0f0f0));
  const ni low_nibbles = broadcast_ni(0x0f0f0f0f);
  for (int line = 0; line < lines; ++line) {
    __builtin_prefetch(hi + line * kLineBytes + kFetchAhead, 0, 0);
    __builtin_prefetch(lo + line * kLineBytes + kFetchAhead, 0, 0);
    QS_PARTS(part) {
      const int at = line * kLineBytes + part * kLanes * 4;
      const ni h = load_as<ni>(hi + at), l = load_as<ni>(lo + at);
      const ni a = ((h << 4) & high_nibbles) | (l & low_nibbles), b = (h & high_nibbles) | ((l >> 4) & low_nibbles);
      const ni codes[] = {even_bytes(a), odd_bytes(a), even_bytes(b), odd_bytes(b)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          dot[r].v[part] += madd16(codes[step], broadcast_ni(x[r * stride + line * 4 + step]));
          in_order(dot[r].v[part]);
        }
      }
    }
  }
}
#endif

// One group's dot products of R rows of x (`stride` steps apart) with sixteen unpacked weight rows, added to dot.
template <int R>
QS_INLINE void blocked_dots(const int32_t* x, int64_t stride, const int32_t* codes, int steps, i32x16 (&dot)[R]) {
#pragma GCC unroll 2
  for (int step = 0; step < steps; ++step) {
    ni code[kParts];
    QS_PARTS(part) code[part] = load_as<ni>(codes + step * 16 + part * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const ni value = broadcast_ni(x[r * stride + step]);
      QS_PARTS(part) {
        dot[r].v[part] = dot_step(dot[r].v[part], code[part], value);
        in_order(dot[r].v[part]);
      }
    }
  }
}

}  // namespace quicksilver::QS_ISA
