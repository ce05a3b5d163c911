// Quantization of rows, with or without a norm before it: a block per row.
#include "launch.cuh"
#include "quantize.cuh"

namespace quicksilver::QS_CUDA {
namespace {

struct Quantize {
  RowInput input;
  QuantizedRows out;
  const int32_t* count;
};

QS_KERNEL void __launch_bounds__(kQuantizeThreads, 2) quantize_rows_kernel(Quantize p) {
  const int64_t i = blockIdx.x;
  if (i >= (p.count ? load(p.count) : p.out.rows)) return;
  const int64_t row = p.input.index ? load(p.input.index + i) : i, k = p.out.k;
  const float* const x = p.input.x + row * p.input.stride;
  if (p.input.norm.weight) {
    quantize_row(norm_row(p.input.norm, x, k, shared_memory<float>()), p.out, i);
  } else {
    quantize_row(PlainRow{x, k}, p.out, i);
  }
  if (p.input.copy) {
    for (int64_t column = threadIdx.x; column < k; column += kQuantizeThreads) {
      store(p.input.copy + i * k + column, load(x + column));
    }
  }
  if (p.input.depth && threadIdx.x == 0) {
    int32_t* const depth = p.input.depth + (p.input.depth_index ? load(p.input.depth_index + i) : i);
    store(depth, load(depth) + 1);
  }
}

}  // namespace

void quantize_rows(const RowInput& input, const QuantizedRows& out, const int32_t* count, Stream stream) {
  launch("quantize_rows", quantize_rows_kernel, blocks_in_x(out.rows), kQuantizeThreads,
         kNormShared * static_cast<int64_t>(sizeof(float)), stream, Quantize{input, out, count});
}

void quantize_rows(const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out,
                   const int32_t* count, Stream stream) {
  RowInput input;
  input.x = x;
  input.stride = x_stride;
  input.index = index;
  quantize_rows(input, out, count, stream);
}

}  // namespace quicksilver::QS_CUDA
