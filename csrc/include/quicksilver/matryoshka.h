// Adaptive Matryoshka Quantization: a weight of 4 bits, and a residual that makes 8 of them.
//
// Grid: per row n and group of `group` values along K a scale s and an offset z, both fp16, and per value two nibbles:
// hi, the 4-bit code, and lo, the residual in eighths of a step, less 8. INT4 value: s * hi + z. INT8 value:
// (s / 8) * (8 * hi + lo - 8) + z. The residual reaches a step down and 7/8 of one up, so it overlaps with the
// neighbouring codes: hi can be chosen for 4 bits alone, by any quantizer, and the INT8 value is still near the weight.
//
// Storage of a plane of N x K nibbles: panels of 16 rows (the last one has N % 16 rows if that isn't 0), each panel all
// of K in lines of 8 values; a line holds 4 bytes per row of the panel; byte i of a row has value k = 8 * line + i in
// its low nibble and k + 4 in its high nibble. K is padded to a multiple of 8 with nibbles of 8. So a full panel's line
// is 64 bytes, and the plane has N * ceil(K / 8) * 4 bytes in all. Storage of the scales, and of the offsets: per
// panel, per group, one value per row of the panel.
#pragma once

#include <cstdint>

namespace quicksilver {

inline constexpr int32_t kStepCodes = 8;  // INT8 codes to a step of INT4
inline constexpr float kCodeUnit = 1.0f / kStepCodes;

struct MatryoshkaWeight {
  const uint8_t* hi = nullptr;
  const uint8_t* lo = nullptr;  // null: INT4 only
  const uint16_t* scale = nullptr;
  const uint16_t* offset = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  int32_t group = 64;  // 32, 64 or 128
};

// Quantizes a matrix to that grid and stores it in that order; pack.cpp says how scale, offset and codes are found.
// A group that holds NaN, Inf or a value that fp16 scales and offsets can't reach gets scale NaN. The bits are the same
// on every instruction set.
enum class FloatType { f32, f16, bf16 };
struct MatryoshkaPack {
  const void* weight = nullptr;  // [n, k] in rows, contiguous
  FloatType type = FloatType::f32;
  const float* importance = nullptr;  // [k], what a squared error in a column weighs, above 0; null: the same for all
  int64_t n = 0;
  int64_t k = 0;
  int32_t group = 64;  // 32, 64 or 128
  uint8_t* hi = nullptr;
  uint8_t* lo = nullptr;  // null: INT4 only
  uint16_t* scale = nullptr;
  uint16_t* offset = nullptr;
};
void matryoshka_pack(const MatryoshkaPack& params);

// Rows quantized to INT8 per group: x = scale * q, scale = absmax / 127, q = rint(x * (127 / absmax)) clamped to +-127.
// absmax: the largest magnitude of the group, rounded up to 8 significant bits (bfloat16; at most its largest number),
// so that rows which differ in their last bits mostly become the same integers with the same scale, and what follows is
// equal to the bit. All in fp32. A group of zeros has scale 0 and q 0; a group that holds NaN or Inf has scale NaN and
// q 0.
struct QuantizedRows {
  int8_t* q = nullptr;     // [rows, k_padded], the pad being 0
  float* scale = nullptr;  // [rows, groups]
  int32_t* sum = nullptr;  // [rows, groups]: sum of q over the group
  int64_t rows = 0;
  int64_t k = 0;
  int64_t k_padded = 0;  // k rounded up to a multiple of 8
  int64_t groups = 0;    // ceil(k / group)
  int32_t group = 64;
};

// Bytes of one buffer that holds all arrays of QuantizedRows, each 64-byte aligned, and the carving of it.
int64_t quantized_rows_bytes(int64_t rows, int64_t k, int32_t group);
QuantizedRows carve_quantized_rows(void* buffer, int64_t rows, int64_t k, int32_t group);

// Quantizes x[index ? index[i] : i, 0..k) for i in 0..out.rows.
void quantize_rows(const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out);

// The groups of K are added up in eight segments, those of segment s from segment_begin(s) on: so many warps of a GPU
// share a row of few products, and no output waits for another one's sums.
inline constexpr int kSegments = 8;
constexpr int64_t segment_begin(int64_t segment, int64_t groups) { return segment * groups / kSegments; }

// y[o, n] = bias[n] + sum over groups of x_scale * (w_scale * dot + w_offset * sum), then + residual, with
// o = out_index ? out_index[i] : i for row i, and dot = sum of q * (8 * hi + lo - 8) or, of rows of 4 bits, of
// q * 8 * hi, an integer. All fp32, in this order: of a segment acc = 0; for each group
// acc = fma(float(dot), (x_scale / 8) * w_scale, acc), then acc = fma(float(sum) * x_scale, w_offset, acc); the
// segments one after the other, from 0; then + bias; then residual + that. So a row's bits depend neither on the other
// rows nor on the instruction set nor on the backend.
struct MatryoshkaGemm {
  QuantizedRows x;
  MatryoshkaWeight w;
  const int32_t* bits = nullptr;    // [x.rows], 8 or 4 per row; null: 8 for all (4 for all where w.lo is null)
  const float* bias = nullptr;      // [n] or null
  const float* residual = nullptr;  // rows indexed as y, same stride, may be y itself; or null
  float* y = nullptr;
  int64_t y_stride = 0;
  const int32_t* out_index = nullptr;
};
void matryoshka_gemm(const MatryoshkaGemm& params);

// Several products of the same quantized rows (q, k and v; gate and up) in one parallel region. `x` and `bits` of each
// must be the same. At most 4.
void matryoshka_gemm_many(const MatryoshkaGemm* params, int count);

}  // namespace quicksilver
