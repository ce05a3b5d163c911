// The stages for at most kDecodeRows rows, one launch each.
#pragma once

#include "matryoshka_decode.cuh"

namespace quicksilver::QS_CUDA {

// with_query = false: write_kv
void decode_attention_input(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
                            const DeviceWorkspace& work, bool with_query, Stream stream);
void decode_attention_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                             Stream stream);
void decode_mlp_input(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                      Stream stream);
void decode_mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                       int32_t* depth, const DeviceHalting* halting, Stream stream);
void decode_lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d,
                    float* logits, int64_t logits_stride, const DeviceWorkspace& work, Stream stream);

namespace decode {

// What the stages that start with a norm have in common.
struct NormedGemm : Gemm {
  static constexpr bool kPerforms = true;
  Norm norm;
  const float* hidden = nullptr;
  const int32_t* active = nullptr;

  QS_DEVICE int32_t row_of(int32_t i) const { return active ? load(active + i) : i; }
  QS_DEVICE const float* input(int32_t i) const { return hidden + row_of(i) * x.k; }

  // A row's parts are quantized by blocks of their own, each of which finds the statistics of the whole row.
  QS_DEVICE int32_t tasks(int32_t count) const { return count * parts_of(x); }
  QS_DEVICE void perform(int32_t task, int32_t, void* scratch) const {
    const int32_t row = task / parts_of(x), part = task % parts_of(x);
    quantize_part<1>(norm_row(norm, input(row), x.k, static_cast<float*>(scratch)), x, row, part * kPartValues);
  }
  QS_DEVICE void finish(int64_t, int64_t, int32_t, void*) const {}
};

// A product with `weight` of the rows that take part.
inline void fill(Gemm& gemm, const Rows& rows, const int32_t* count, const MatryoshkaWeight& weight,
                 const DeviceWorkspace& work) {
  gemm.x = carve_quantized_rows(work.quantized, rows.count, weight.k, weight.group);
  gemm.device_count = count;
  gemm.bits = rows.bits;
  gemm.bits_index = rows.active;
  gemm.counters = work.counters;
}

inline void fill(NormedGemm& gemm, const Rows& rows, const int32_t* count, const MatryoshkaWeight& weight,
                 const Norm& norm, const DeviceWorkspace& work) {
  fill(gemm, rows, count, weight, work);
  gemm.norm = norm;
  gemm.hidden = rows.hidden;
  gemm.active = rows.active;
}

}  // namespace decode
}  // namespace quicksilver::QS_CUDA
