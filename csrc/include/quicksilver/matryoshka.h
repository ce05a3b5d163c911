// Adaptive Matryoshka Quantization: INT8 weights whose top four bits are the INT4 weights.
//
// Grid: per row n and group of `group` values along K, scale s = -w_max / 128 (w_max: the element of largest magnitude,
// with its sign), q = clamp(round(w / s), -128, 119), u = q + 136 in 8..255, hi = u >> 4, lo = u & 15.
// INT8 value: s * (16 * hi + lo - 136). INT4 value: s * (16 * hi - 128).
//
// A weight that was quantized to 4 bits elsewhere keeps its codes, scales and offsets: with the scale s of a step of
// hi, and an offset z per group, INT8: s * (hi + (lo - 8) / 16) + z, INT4: s * hi + z. Where it has a low plane, lo
// is 8.
//
// Storage of a plane of N x K nibbles: panels of 16 rows (the last one has N % 16 rows if that isn't 0), each panel all
// of K in lines of 8 values; a line holds 4 bytes per row of the panel; byte i of a row has value k = 8 * line + i in
// its low nibble and k + 4 in its high nibble. K is padded to a multiple of 8 with u = 136 (value zero). So a full
// panel's line is 64 bytes, and the plane has N * ceil(K / 8) * 4 bytes in all. Storage of the scales (fp16): per
// panel, per group, one value per row of the panel. That of the offsets (fp16) is the same.
#pragma once

#include <cstdint>

namespace quicksilver {

// What a code's unit is of the scale of a weight with offsets.
inline constexpr float kStepUnit = 1.0f / 16;

struct MatryoshkaWeight {
  const uint8_t* hi = nullptr;
  const uint8_t* lo = nullptr;  // null: INT4 only
  const uint16_t* scale = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  int32_t group = 64;                // 32, 64 or 128
  const uint16_t* offset = nullptr;  // or null

  // What is to be subtracted from the codes of rows of 8 or 4 bits.
  int32_t zero8() const { return offset ? 8 : 136; }
  int32_t zero4() const { return offset ? 0 : 128; }
  float unit() const { return offset ? kStepUnit : 1.0f; }
};

// Quantizes a matrix to that grid, with the scale as fp16 holds it, and stores it in that order. A scale that
// underflows to zero makes its group zeros; a group that holds NaN, Inf or a value beyond 128 times fp16's range gets
// scale NaN and zeros. The bits are the same on every instruction set.
enum class FloatType { f32, f16, bf16 };
struct MatryoshkaPack {
  const void* weight = nullptr;  // [n, k] in rows, contiguous
  FloatType type = FloatType::f32;
  int64_t n = 0;
  int64_t k = 0;
  int32_t group = 64;  // 32, 64 or 128
  uint8_t* hi = nullptr;
  uint8_t* lo = nullptr;  // null: INT4 only
  uint16_t* scale = nullptr;
};
void matryoshka_pack(const MatryoshkaPack& params);

// Rows quantized to INT8 per group: x = scale * q, or with two planes x = scale * (256 * q + q_low).
//   one plane:  scale = absmax / 127,   q = rint(x * (127 / absmax)) clamped to +-127
//   two planes: scale = absmax / 32512, v = rint(x * (32512 / absmax)) clamped to +-32512, q = (v + 128) >> 8,
//               q_low = v - 256 * q
// absmax: the largest magnitude of the group, rounded up to 8 significant bits (bfloat16; at most its largest number),
// so that rows which differ in their last bits mostly become the same integers with the same scale, and what follows is
// equal to the bit. All in fp32. A group of zeros has scale 0 and q 0; a group that holds NaN or Inf has scale NaN and
// q 0.
struct QuantizedRows {
  int8_t* q = nullptr;      // [rows, k_padded], the pad being 0
  int8_t* q_low = nullptr;  // the same shape, or null for one plane
  float* scale = nullptr;   // [rows, groups]
  int32_t* sum = nullptr;   // [rows, groups]: sum over the group of q, or of 256 * q + q_low
  int64_t rows = 0;
  int64_t k = 0;
  int64_t k_padded = 0;  // k rounded up to a multiple of 8
  int64_t groups = 0;    // ceil(k / group)
  int32_t group = 64;
};

// Bytes of one buffer that holds all arrays of QuantizedRows, each 64-byte aligned, and the carving of it.
int64_t quantized_rows_bytes(int64_t rows, int64_t k, int32_t group, int planes);
QuantizedRows carve_quantized_rows(void* buffer, int64_t rows, int64_t k, int32_t group, int planes);

// Quantizes x[index ? index[i] : i, 0..k) for i in 0..out.rows.
void quantize_rows(const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out);

// y[o, n] = bias[n] + sum over groups in order of (x_scale * w_scale) * float(integer dot product), then + residual,
// with o = out_index ? out_index[i] : i for row i. All fp32, multiplications and additions separately rounded, in this
// order: acc = 0; for each group acc = acc + float(dot) * (x_scale * w_scale), or with offsets acc = acc +
// (float(dot) * ((x_scale / 16) * w_scale) + (float(sum) * x_scale) * offset); then acc + bias; then residual + acc.
// So a row's bits depend neither on the other rows nor on the instruction set.
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
