// The instructions of ptx.cuh on the host.
#pragma once

#include "emulated_device.h"
#include "half.h"

namespace quicksilver::QS_CUDA {

QS_DEVICE float half_to_float(uint16_t h) { return emulator::half_to_float(h); }
QS_DEVICE uint16_t float_to_half(float x) { return emulator::float_to_half(x); }
QS_DEVICE float bfloat_to_float(uint16_t b) { return emulator::bfloat_to_float(b); }
QS_DEVICE uint16_t float_to_bfloat(float x) { return emulator::float_to_bfloat(x); }
QS_DEVICE uint32_t pack_half2(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
QS_DEVICE uint32_t pack_bfloat2(float low, float high) {
  return float_to_bfloat(low) | static_cast<uint32_t>(float_to_bfloat(high)) << 16;
}

QS_DEVICE void load_once_if(bool wanted, const uint4* p, uint4& v QS_AND_SITE) {
  if (wanted) v = load_once(p QS_AND_PASS_SITE);
}

// One kernel runs at a time.
QS_DEVICE void wait_for_launch_before() {}
QS_DEVICE void launch_next() {}

QS_DEVICE void cp_async16(void* shared, const void* global, bool valid QS_AND_SITE) {
  if (valid) {
    // Read here too, in vain, so that AddressSanitizer finds a bad address where it came from.
    const volatile auto first = *static_cast<const unsigned char*>(global);
    const volatile auto last = static_cast<const unsigned char*>(global)[15];
    (void)first, (void)last;
  }
  emulator::cp_async16(shared, global, valid, site);
}
QS_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int n>
QS_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(n);
}

QS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row QS_AND_SITE) {
  emulator::ldmatrix(r, row, 4, false, site);
}
QS_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row QS_AND_SITE) {
  emulator::ldmatrix(r, row, 2, false, site);
}
QS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row QS_AND_SITE) {
  emulator::ldmatrix(r, row, 4, true, site);
}
QS_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row QS_AND_SITE) {
  emulator::ldmatrix(r, row, 2, true, site);
}

QS_DEVICE void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const int32_t (&c)[4] QS_AND_SITE) {
  int32_t sum[4] = {c[0], c[1], c[2], c[3]};
  emulator::mma_u8s8(sum, a, b, site);
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}
QS_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QS_AND_SITE) {
  emulator::mma_f16(d, a, b, site);
}
QS_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] QS_AND_SITE) {
  emulator::mma_bf16(d, a, b, site);
}

}  // namespace quicksilver::QS_CUDA
