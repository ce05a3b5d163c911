// Products of more rows than a decode step has (matryoshka_prefill.cu).
#pragma once

#include <cstdint>

#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA {

// What becomes of a product, bias included, on its way to y.
enum class Finish : int32_t {
  none = 0,
  silu_gated = 1,  // silu(gate) * product
  activation = 2,  // PrefillGemm's, of the product alone
};

constexpr int kPrefillProducts = 3;

// Up to three products of the same rows: `x`, `residual` and `out_index` of all are those of the first. `bits` is
// indexed by bits_index[i] for row i, where that isn't null. `gate` is shaped as the only product's y.
struct PrefillGemm {
  MatryoshkaGemm products[kPrefillProducts];
  int count = 0;
  const int32_t* bits_index = nullptr;
  Finish finish = Finish::none;
  Activation activation = Activation::gelu_tanh;
  const float* gate = nullptr;
};
void prefill_gemm(const PrefillGemm& gemm, const int32_t* count, Stream stream);

}  // namespace quicksilver::QS_CUDA
