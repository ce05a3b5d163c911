// The device functions of device.cuh on the host.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "quicksilver/cuda.h"

#define QS_DEVICE inline __attribute__((always_inline))
#define QS_KERNEL
#define __launch_bounds__(...)
// Where a function was called from: the last parameter, and how to hand it on.
#define QS_SITE ::quicksilver::emulator::Site site = ::quicksilver::emulator::Site::current()
#define QS_AND_SITE , QS_SITE
#define QS_PASS_SITE site
#define QS_AND_PASS_SITE , site

#define threadIdx (::quicksilver::emulator::position().thread)
#define blockIdx (::quicksilver::emulator::position().block)
#define blockDim (::quicksilver::emulator::position().block_dim)
#define gridDim (::quicksilver::emulator::position().grid_dim)

namespace quicksilver::QS_CUDA {

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int kWarp = emulator::kLanes;

QS_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
QS_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

template <class T>
QS_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

QS_DEVICE void sync_block(QS_SITE) { emulator::sync_block(site); }
QS_DEVICE void sync_warp(QS_SITE) { emulator::sync_warp(site); }

// --- collectives -----------------------------------------------------------------------------------------------------
// `from(lane, parameter)` is the lane whose value `lane` gets.
template <class T, class From>
T exchange(const char* what, T v, int parameter, From, const emulator::Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Input {
    T v;
    int parameter;
  };
  const Input input{v, parameter};
  T result{};
  emulator::collective(
      what, &input, &result,
      [](const void* const* in, void* const* out) {
        for (int i = 0; i < kWarp; ++i) {
          const int from = From()(i, static_cast<const Input*>(in[i])->parameter);
          *static_cast<T*>(out[i]) = static_cast<const Input*>(in[from])->v;
        }
      },
      site);
  return result;
}

template <class T>
QS_DEVICE T shuffle(T v, int from_lane QS_AND_SITE) {
  const auto from = [](int, int parameter) { return parameter & (kWarp - 1); };
  return exchange("shuffle", v, from_lane, from, site);
}
template <class T>
QS_DEVICE T shuffle_xor(T v, int mask QS_AND_SITE) {
  const auto from = [](int i, int parameter) { return (i ^ parameter) < kWarp ? i ^ parameter : i; };
  return exchange("shuffle_xor", v, mask, from, site);
}
template <class T>
QS_DEVICE T shuffle_up(T v, int delta QS_AND_SITE) {
  const auto from = [](int i, int parameter) { return i - parameter >= 0 ? i - parameter : i; };
  return exchange("shuffle_up", v, delta, from, site);
}
template <class T>
QS_DEVICE T shuffle_down(T v, int delta QS_AND_SITE) {
  const auto from = [](int i, int parameter) { return i + parameter < kWarp ? i + parameter : i; };
  return exchange("shuffle_down", v, delta, from, site);
}

QS_DEVICE unsigned ballot(bool p QS_AND_SITE) {
  unsigned result = 0;
  emulator::collective(
      "ballot", &p, &result,
      [](const void* const* in, void* const* out) {
        unsigned lanes = 0;
        for (int i = 0; i < kWarp; ++i) lanes |= static_cast<unsigned>(*static_cast<const bool*>(in[i])) << i;
        for (int i = 0; i < kWarp; ++i) *static_cast<unsigned*>(out[i]) = lanes;
      },
      site);
  return result;
}
QS_DEVICE bool any(bool p QS_AND_SITE) { return ballot(p, site) != 0; }
QS_DEVICE bool all(bool p QS_AND_SITE) { return ballot(p, site) == ~0u; }

// --- memory ----------------------------------------------------------------------------------------------------------
// By memcpy, as kernels look at memory as what they like: vectors of bytes, integers of floats.
template <class T>
QS_DEVICE T copy_of(const T* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

template <class T>
QS_DEVICE T load(const T* p QS_AND_SITE) {
  emulator::global_access(emulator::Access::load, p, sizeof(T), site);
  return copy_of(p);
}
template <class T>
QS_DEVICE T load_once(const T* p QS_AND_SITE) {
  return load(p, site);
}
template <class T>
QS_DEVICE void store(T* p, std::type_identity_t<T> v QS_AND_SITE) {
  emulator::global_access(emulator::Access::store, p, sizeof(T), site);
  std::memcpy(p, &v, sizeof(T));
}
template <class T>
QS_DEVICE T load_shared(const T* p QS_AND_SITE) {
  emulator::shared_access(emulator::Access::load, p, sizeof(T), site);
  return copy_of(p);
}
template <class T>
QS_DEVICE void store_shared(T* p, std::type_identity_t<T> v QS_AND_SITE) {
  emulator::shared_access(emulator::Access::store, p, sizeof(T), site);
  std::memcpy(p, &v, sizeof(T));
}

QS_DEVICE int atomic_add(int32_t* p, int v) { return std::atomic_ref(*p).fetch_add(v, std::memory_order_relaxed); }
QS_DEVICE int load_acquire(const int32_t* p) {
  return std::atomic_ref(*const_cast<int32_t*>(p)).load(std::memory_order_acquire);
}
QS_DEVICE void store_release(int32_t* p, int v) { std::atomic_ref(*p).store(v, std::memory_order_release); }
QS_DEVICE void fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
QS_DEVICE void wait_until_at_least(const int32_t* p, int32_t value QS_AND_SITE) {
  emulator::wait_until_at_least(p, value, site);
}

// --- arithmetic: built with -ffp-contract=off ------------------------------------------------------------------------
QS_DEVICE float add_rn(float a, float b) { return a + b; }
QS_DEVICE float sub_rn(float a, float b) { return a - b; }
QS_DEVICE float mul_rn(float a, float b) { return a * b; }
QS_DEVICE float div_rn(float a, float b) { return a / b; }
QS_DEVICE float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
QS_DEVICE float sqrt_rn(float x) { return std::sqrt(x); }
QS_DEVICE float rint(float x) { return std::nearbyint(x); }
QS_DEVICE float exp(float x) { return std::exp(x); }
QS_DEVICE float log(float x) { return std::log(x); }
QS_DEVICE float absolute(float x) { return std::fabs(x); }
QS_DEVICE float maximum(float a, float b) { return std::fmax(a, b); }
QS_DEVICE float minimum(float a, float b) { return std::fmin(a, b); }

}  // namespace quicksilver::QS_CUDA
