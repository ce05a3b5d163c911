// What a kernel source knows about the instruction set that it is compiled for.
//
// Each kernel source is compiled once per set with -DQS_ISA=<name> -DQS_ISA_LEVEL=<number> and puts all it defines into
// quicksilver::QS_ISA. It uses no std template: the linker may keep any one copy of an inline function, and a copy made
// with wide flags would crash a narrow machine.
#pragma once

#if !defined(QS_ISA) || !defined(QS_ISA_LEVEL)
#error "compile kernel sources with -DQS_ISA=baseline|avx2|avx512|avx512vnni and -DQS_ISA_LEVEL=0..3"
#endif

#define QS_AVX2 (QS_ISA_LEVEL >= 1)
#define QS_AVX512 (QS_ISA_LEVEL >= 2)
#define QS_VNNI (QS_ISA_LEVEL >= 3)

#define QS_INLINE static inline __attribute__((always_inline))
#define QS_INLINE_MEMBER inline __attribute__((always_inline))

#if QS_AVX512 && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12's own AVX-512 header makes undefined vectors by initialising them with themselves.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(QS_EMULATE_AVX512)
#include "avx512_by_avx2.h"  // in csrc/tests
#elif QS_AVX2
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
