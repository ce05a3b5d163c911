// Rows to INT8 groups, split over the threads by row.
#include "quantize.h"

#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {

void quantize_rows(const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out) {
  in_parallel(out.rows, out.k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + (index ? index[i] : i) * x_stride;
      quantize_row(out, i, [row](int64_t k, int n) { return load(row + k, n); }, [] {});
    }
  });
}

}  // namespace quicksilver::QS_ISA
