// What a kernel is written in: threads, barriers, collectives of a warp, memory, arithmetic with promised bits.
//
// nvcc compiles kernels for GPUs; g++ with QS_EMULATED compiles the same sources for the emulator, where each of these
// functions also checks the rules of its use and, if asked to, counts. Therefore kernels reach memory through load and
// store alone, and no kernel declares __shared__ variables.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quicksilver/cuda.h"

// Before a loop: unrolled by nvcc, wholly or by n; the emulator's compiler decides for itself.
#ifdef QS_EMULATED
#define QS_UNROLL
#define QS_UNROLL_BY(n)
#else
#define QS_PRAGMA(text) _Pragma(#text)
#define QS_UNROLL QS_PRAGMA(unroll)
#define QS_UNROLL_BY(n) QS_PRAGMA(unroll(n))
#endif

#ifdef QS_EMULATED
#include "emulated_device.h"
#else

#define QS_DEVICE __device__ __forceinline__
#define QS_KERNEL __global__
// Where a function was called from, for the emulator's messages: parameters and arguments that a GPU has no use for.
#define QS_SITE
#define QS_AND_SITE
#define QS_PASS_SITE
#define QS_AND_PASS_SITE

namespace quicksilver::QS_CUDA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

QS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
QS_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// The block's dynamic shared memory.
template <class T>
QS_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char quicksilver_shared[];
  return reinterpret_cast<T*>(quicksilver_shared);
}

QS_DEVICE void sync_block() { __syncthreads(); }
QS_DEVICE void sync_warp() { __syncwarp(); }

// --- collectives of a warp: all 32 lanes take part ------------------------------------------------------------------
// Shuffles take any type of 4 or 8 bytes, through the integer of its size.
template <class T>
using ShuffleBits = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;

template <class T>
QS_DEVICE ShuffleBits<T> shuffle_bits(const T& v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  ShuffleBits<T> bits;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T>
QS_DEVICE T from_bits(ShuffleBits<T> bits) {
  T v;
  memcpy(&v, &bits, sizeof(T));
  return v;
}

template <class T>
QS_DEVICE T shuffle(T v, int from_lane) {
  return from_bits<T>(__shfl_sync(kAllLanes, shuffle_bits(v), from_lane));
}
template <class T>
QS_DEVICE T shuffle_xor(T v, int mask) {
  return from_bits<T>(__shfl_xor_sync(kAllLanes, shuffle_bits(v), mask));
}
// From the lane `delta` below; the lowest lanes keep their own.
template <class T>
QS_DEVICE T shuffle_up(T v, int delta) {
  return from_bits<T>(__shfl_up_sync(kAllLanes, shuffle_bits(v), static_cast<unsigned>(delta)));
}
// From the lane `delta` above; the highest lanes keep their own.
template <class T>
QS_DEVICE T shuffle_down(T v, int delta) {
  return from_bits<T>(__shfl_down_sync(kAllLanes, shuffle_bits(v), static_cast<unsigned>(delta)));
}

QS_DEVICE unsigned ballot(bool p) { return __ballot_sync(kAllLanes, p); }
QS_DEVICE bool any(bool p) { return __any_sync(kAllLanes, p); }
QS_DEVICE bool all(bool p) { return __all_sync(kAllLanes, p); }

// --- memory ----------------------------------------------------------------------------------------------------------
// Global memory, 1 to 16 bytes at an address that is a multiple of them. load_once is in ptx.cuh.
template <class T>
QS_DEVICE T load(const T* p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}
template <class T>
QS_DEVICE void store(T* p, std::type_identity_t<T> v) {
  __builtin_assume(__isGlobal(p));
  *p = v;
}
template <class T>
QS_DEVICE T load_shared(const T* p) {
  __builtin_assume(__isShared(p));
  return *p;
}
template <class T>
QS_DEVICE void store_shared(T* p, std::type_identity_t<T> v) {
  __builtin_assume(__isShared(p));
  *p = v;
}

QS_DEVICE int atomic_add(int32_t* p, int v) { return atomicAdd(p, v); }
QS_DEVICE int load_acquire(const int32_t* p) {
  return __nv_atomic_load_n(const_cast<int32_t*>(p), __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE);
}
QS_DEVICE void store_release(int32_t* p, int v) {
  __nv_atomic_store_n(p, v, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
}
QS_DEVICE void fence() { __threadfence(); }

// By one thread of a block; sync_block() then holds the others until it is through.
QS_DEVICE void wait_until_at_least(const int32_t* p, int32_t value) {
  while (load_acquire(p) < value) __nanosleep(64);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------
// Rounded one by one: nvcc may otherwise fuse a product and a sum, and bits would differ from the CPU's.
QS_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
QS_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
QS_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
QS_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
QS_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QS_DEVICE float sqrt_rn(float x) { return __fsqrt_rn(x); }
QS_DEVICE float rint(float x) { return ::rintf(x); }  // ties to even
QS_DEVICE float exp(float x) { return ::expf(x); }
QS_DEVICE float log(float x) { return ::logf(x); }
QS_DEVICE float absolute(float x) { return ::fabsf(x); }
QS_DEVICE float maximum(float a, float b) { return ::fmaxf(a, b); }  // the other one where one is NaN
QS_DEVICE float minimum(float a, float b) { return ::fminf(a, b); }

}  // namespace quicksilver::QS_CUDA
#endif

namespace quicksilver::QS_CUDA {

template <class T>
  requires std::is_integral_v<T>
QS_DEVICE T absolute(T x) {
  return x < 0 ? -x : x;
}
template <class T>
  requires std::is_integral_v<T>
QS_DEVICE T maximum(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
template <class T>
  requires std::is_integral_v<T>
QS_DEVICE T minimum(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}

QS_DEVICE float float_of_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// An integer below 2^22 in magnitude, added to the bits of 1.5 * 2^23, makes that float plus the integer. So sums that
// start there become floats by a subtraction.
constexpr int32_t kMagic = 0x4b400000;
QS_DEVICE float without_magic(int32_t sum) { return sub_rn(float_of_bits(sum), 12582912.0f); }

// The number that a group is quantized by, from the bits of its largest magnitude: rounded up to bfloat16 (matryoshka.h
// says why).
QS_DEVICE float rounded_magnitude(int32_t bits) {
  const int32_t rounded = bits > 0x7f7f0000 ? 0x7f7f0000 : (bits + 0xffff) & ~0xffff;
  return float_of_bits(rounded);
}

// segment_begin of matryoshka.h.
QS_DEVICE int32_t first_of_segment(int32_t segment, int64_t groups) {
  return static_cast<int32_t>(segment * groups / kSegments);
}

// By an xor butterfly, so that all lanes get the same bits.
template <class T>
QS_DEVICE T warp_sum(T v QS_AND_SITE) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(v, mask QS_AND_PASS_SITE);
    if constexpr (std::is_same_v<T, float>) {
      v = add_rn(v, other);
    } else {
      v += other;
    }
  }
  return v;
}
template <class T>
QS_DEVICE T warp_max(T v QS_AND_SITE) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v = maximum(v, shuffle_xor(v, mask QS_AND_PASS_SITE));
  return v;
}

// By a whole block, after what it has to say to the others is stored: true, in all of its threads, in the last of
// `blocks` blocks to come here. That block sees what the others stored and finds the counter at 0 again.
// `shared_flag` may be written over after the next barrier.
QS_DEVICE bool last_block(int32_t* counter, int blocks, bool* shared_flag QS_AND_SITE) {
  sync_block(QS_PASS_SITE);
  if (threadIdx.x == 0) {
    fence();  // covers the whole block's stores: they came before the barrier
    const bool last = atomic_add(counter, 1) == blocks - 1;
    if (last) store(counter, 0 QS_AND_PASS_SITE);
    fence();  // and what follows sees the other blocks' stores
    store_shared(shared_flag, last QS_AND_PASS_SITE);
  }
  sync_block(QS_PASS_SITE);
  return load_shared(shared_flag QS_AND_PASS_SITE);
}

// By a whole block: how many blocks came here before it. Blocks with lower numbers have started, which blockIdx doesn't
// promise: so they can be waited for. Whoever resets the counter must be the last block to end.
// `shared_slot` may be written over after the next barrier.
QS_DEVICE int block_ticket(int32_t* counter, int* shared_slot QS_AND_SITE) {
  if (threadIdx.x == 0) store_shared(shared_slot, atomic_add(counter, 1) QS_AND_PASS_SITE);
  sync_block(QS_PASS_SITE);
  return load_shared(shared_slot QS_AND_PASS_SITE);
}

}  // namespace quicksilver::QS_CUDA

#include "ptx.cuh"
