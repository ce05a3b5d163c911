// The decode GEMM alone, of rows that are quantized already.
#include "matryoshka_decode.cuh"

namespace quicksilver::QS_CUDA {
namespace decode {
namespace {

struct Product : Gemm {
  static constexpr bool kPaired = false;
  static constexpr bool kPerforms = false;
  MatryoshkaWeight weight;
  const float* bias = nullptr;
  const float* residual = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  const int32_t* out_index = nullptr;

  QS_DEVICE Panel panel(int p) const { return panel_of(weight, x, 2 * blockIdx.x + p); }

  QS_DEVICE void write(int32_t i, int64_t column, float sum, bool valid) const {
    if (!valid) return;
    const int64_t at = (out_index ? load(out_index + i) : i) * y_stride + column;
    float value = sum;
    if (bias) value = add_rn(value, load(bias + column));
    if (residual) value = add_rn(load(residual + at), value);
    store(y + at, value);
  }
};

}  // namespace
}  // namespace decode

void decode_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream) {
  decode::Product product;
  product.x = params.x;
  product.device_count = count;
  product.bits = params.bits;
  product.weight = params.w;
  product.bias = params.bias;
  product.residual = params.residual;
  product.y = params.y;
  product.y_stride = params.y_stride;
  product.out_index = params.out_index;
  decode::launch_stage("decode_gemm", product, decode::tiles_of(params.w), stream);
}

}  // namespace quicksilver::QS_CUDA
