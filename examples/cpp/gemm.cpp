// Quantizes three rows to INT8 and multiplies them by a Matryoshka weight, at 8 and at 4 bits, without torch or Python.
//
// Prints the instruction set and, for each row, what came out and what should have. Exit status 1 if they differ.
#include <quicksilver/matryoshka.h>
#include <quicksilver/runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace qs = quicksilver;

int main() {
  constexpr int64_t n = 16, k = 64, rows = 3;
  constexpr uint16_t half_one = 0x3c00, half_minus_eight = 0xc800;  // in fp16

  // One panel of 16 rows, 8 lines of 8 values. All values have hi = 10 and lo = 9: 1 * 10 - 8 = 2 at 4 bits, and
  // (8 * 10 + 9 - 8) / 8 - 8 = 2.125 at 8 bits. Both nibbles of a byte are values, so a plane of one nibble repeats it.
  const std::vector<uint8_t> hi(n * k / 2, 0xaa), lo(n * k / 2, 0x99);
  const std::vector<uint16_t> scale(n, half_one), offset(n, half_minus_eight);

  // Row i holds i + 1 everywhere: its absmax, so it becomes 127 * scale exactly.
  std::vector<float> x(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) x[i] = static_cast<float>(i / k + 1);
  const int32_t bits[rows] = {8, 4, 8};

  std::vector<uint8_t> memory(qs::quantized_rows_bytes(rows, k, 64) + 64);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
  std::vector<float> y(rows * n);

  qs::MatryoshkaGemm gemm;
  gemm.x = qs::carve_quantized_rows(aligned, rows, k, 64);
  gemm.w = {
      .hi = hi.data(), .lo = lo.data(), .scale = scale.data(), .offset = offset.data(), .n = n, .k = k, .group = 64};
  gemm.bits = bits;
  gemm.y = y.data();
  gemm.y_stride = n;
  qs::quantize_rows(x.data(), k, nullptr, gemm.x);
  qs::matryoshka_gemm(gemm);

  std::printf("%s, %d threads\n", qs::isa_name(qs::current_isa()), qs::threads());
  bool good = true;
  for (int64_t i = 0; i < rows; ++i) {
    const float want = static_cast<float>((i + 1) * k) * (bits[i] == 8 ? 2.125f : 2.0f);
    const float error = std::abs(y[i * n] - want) / want;
    std::printf("row %d at %d bits: %.1f, wanted %.1f\n", static_cast<int>(i), bits[i], y[i * n], want);
    good = good && error < 1e-5f;
  }
  return good ? 0 : 1;
}
