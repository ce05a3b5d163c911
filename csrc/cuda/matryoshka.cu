// Which of the GEMMs runs.
#include "matryoshka_decode.cuh"
#include "matryoshka_prefill.cuh"

namespace quicksilver::QS_CUDA {

// Neither kernel wants any: counters are for the decode stages, which have work before and after their products.
int64_t gemm_scratch_bytes(const MatryoshkaGemm&) { return 0; }

void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count, void*, Stream stream) {
  if (params.x.rows <= 0) return;
  if (params.x.rows <= kDecodeRows) return decode_gemm(params, count, nullptr, stream);
  PrefillGemm gemm;
  gemm.products[0] = params;
  gemm.count = 1;
  prefill_gemm(gemm, count, stream);
}

}  // namespace quicksilver::QS_CUDA
