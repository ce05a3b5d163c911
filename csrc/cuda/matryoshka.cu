// Which of the GEMMs runs.
#include "matryoshka_decode.cuh"
#include "matryoshka_prefill.cuh"

namespace quicksilver::QS_CUDA {

void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream) {
  if (params.x.rows <= 0) return;
  if (params.x.rows <= kDecodeRows) return decode_gemm(params, count, stream);
  PrefillGemm gemm;
  gemm.products[0] = params;
  gemm.count = 1;
  prefill_gemm(gemm, count, stream);
}

}  // namespace quicksilver::QS_CUDA
