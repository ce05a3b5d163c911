// One function for each PTX instruction that CUDA C++ has no name for (or none without the toolkit's number types).
//
// Fragments are named as in the PTX ISA's chapter on warp-level matrix instructions: lane = 4 * g + t.
#pragma once

#include "device.cuh"

#ifdef QS_EMULATED
#include "emulated_ptx.h"
#else

namespace quicksilver::QS_CUDA {

// --- numbers of 16 bits ----------------------------------------------------------------------------------------------
QS_DEVICE float half_to_float(uint16_t h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}
QS_DEVICE uint16_t float_to_half(float x) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}
QS_DEVICE float bfloat_to_float(uint16_t b) { return __uint_as_float(static_cast<unsigned>(b) << 16); }
QS_DEVICE uint16_t float_to_bfloat(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
  return b;
#else
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
}
// The first argument goes to the low 16 bits.
QS_DEVICE uint32_t pack_half2(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
}
QS_DEVICE uint32_t pack_bfloat2(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
#endif
}

// --- global memory ---------------------------------------------------------------------------------------------------
// For what a launch reads once and nobody writes meanwhile: weights. They leave L1 to activations.
template <class T>
QS_DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const size_t from = __cvta_generic_to_global(p);
  T v;
  if constexpr (sizeof(T) == 16) {
    uint32_t w[4];
    asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
        : "l"(from));
    memcpy(&v, w, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint32_t w[2];
    asm("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(from));
    memcpy(&v, w, 8);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t w;
    asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(w) : "l"(from));
    memcpy(&v, &w, 4);
  } else {
    uint32_t w;
    if constexpr (sizeof(T) == 2) {
      asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=r"(w) : "l"(from));
    } else {
      asm("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(w) : "l"(from));
    }
    memcpy(&v, &w, sizeof(T));
  }
  return v;
}

// The same where `wanted`, else v stays. One instruction, not a branch around one.
QS_DEVICE void load_once_if(bool wanted, const uint4* p, uint4& v) {
  asm("{\n\t.reg .pred wanted;\n\tsetp.ne.s32 wanted, %5, 0;\n\t"
      "@wanted ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(__cvta_generic_to_global(p)), "r"(static_cast<int>(wanted)));
}

// --- launches that overlap -------------------------------------------------------------------------------------------
// A kernel that is launched as `overlapping` may start before the one before it has ended. It must wait for that one's
// end before it reads or writes what others do; until then it may read what nobody writes. A kernel that says
// launch_next() lets the next one start so, when all of its own blocks have started.
QS_DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
QS_DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- asynchronous copies ---------------------------------------------------------------------------------------------
// 16 bytes from global to shared memory, past L1 and the registers; zeros where !valid, and then `global` isn't read.
// What a thread copied it sees after its cp_async_wait, others after a barrier that follows it.
QS_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(global)),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  store_shared(static_cast<uint4*>(shared), valid ? load(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0));
#endif
}
QS_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most the n groups committed last are under way.
template <int n>
QS_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// --- matrices from shared memory -------------------------------------------------------------------------------------
// 8x8 matrices of 16-bit elements. Lane 8 * i + j gives the address of row j of matrix i (x2: the addresses of lanes 16
// and up aren't used, but must be good on sm_75), and gets in r[i] elements 2t and 2t + 1 of row g; transposed: element
// g of rows 2t and 2t + 1. volatile keeps them between the barriers that order them with other lanes' stores.
QS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
QS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
QS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
QS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

// --- matrix products: d = a * b + c, and d += a * b
// ------------------------------------------------------------------------------------- d[2 * i + j] is row g + 8 * i,
// column 2t + j of 16 x 8. volatile: a warp must come here as one, so nothing may move them into a branch that only
// some lanes take.
//
// a: 16 x 32 bytes, a[i] holding row g + 8 * (i % 2), columns 4t + 16 * (i / 2) and three more;
// b: 32 x 8 bytes, b[i] holding column g, rows 4t + 16 * i and three more. sm_75 has 8 x 8 x 16 only; its fragments are
// the quarters of the large one.
#if __CUDA_ARCH__ >= 800
QS_DEVICE void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
#else
QS_DEVICE void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int32_t (&c)[4]) {
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  for (int i = 0; i < 4; ++i) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(d[2 * (i % 2)]), "+r"(d[2 * (i % 2) + 1])
                 : "r"(a[i]), "r"(b[i / 2]));
  }
}
#endif

// a: 16 x 16 halves, a[i] holding row g + 8 * (i % 2), columns 2t + 8 * (i / 2) and one more;
// b: 16 x 8 halves, b[i] holding column g, rows 2t + 8 * i and one more.
QS_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int i = 0; i < 2; ++i) {  // sm_75 has k 8
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
#endif
}

// The same with bfloat16.
QS_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // sm_75 knows no bfloat16: each lane fetches its rows and columns from the lanes that hold them, in the order of k.
  const int t = lane() % 4;
  for (int k = 0; k < 8; ++k) {  // pairs of k
    const int half = k / 4, from = k % 4;
    const uint32_t top = shuffle(a[2 * half], lane() - t + from);
    const uint32_t bottom = shuffle(a[2 * half + 1], lane() - t + from);
    for (int j = 0; j < 2; ++j) {
      const uint32_t column = shuffle(b[half], 4 * (2 * t + j) + from);
      for (int i = 0; i < 2; ++i) {
        const float y = bfloat_to_float(static_cast<uint16_t>(column >> 16 * i));
        d[j] = fma_rn(bfloat_to_float(static_cast<uint16_t>(top >> 16 * i)), y, d[j]);
        d[2 + j] = fma_rn(bfloat_to_float(static_cast<uint16_t>(bottom >> 16 * i)), y, d[2 + j]);
      }
    }
  }
#endif
}

}  // namespace quicksilver::QS_CUDA
#endif
