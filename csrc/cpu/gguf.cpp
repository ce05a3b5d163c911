// Blocks of GGUF files to fp32, split over the threads. Products and sums are rounded one by one.
#include "quicksilver/gguf.h"

#include "kernels.h"
#include "vec.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

QS_INLINE float half_at(const uint8_t* p) {
  const uint16_t half = load_as<uint16_t>(p);
  return load_half(&half, 1).v[0][0];
}

template <GgufType kType>
QS_INLINE void dequantize_block(const uint8_t* block, float* out) {
  if constexpr (kType == GgufType::q4_0) {
    const float d = half_at(block);
    for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>((block[2 + i] & 15) - 8);
    for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>((block[2 + i] >> 4) - 8);
  } else if constexpr (kType == GgufType::q4_1) {
    const float d = half_at(block), m = half_at(block + 2);
    for (int i = 0; i < 16; ++i) out[i] = d * static_cast<float>(block[4 + i] & 15) + m;
    for (int i = 0; i < 16; ++i) out[16 + i] = d * static_cast<float>(block[4 + i] >> 4) + m;
  } else if constexpr (kType == GgufType::q8_0) {
    const float d = half_at(block);
    for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
  } else if constexpr (kType == GgufType::q4_k) {
    const float d = half_at(block), m = half_at(block + 2);
    const uint8_t* scales = block + 4;  // eight scales and eight minima of six bits, the last four of each in pieces
    for (int part = 0; part < 8; ++part) {
      const int j = part % 4;
      const int scale = part < 4 ? scales[j] & 63 : (scales[8 + j] & 15) | (scales[j] >> 2 & 0x30);
      const int least = part < 4 ? scales[4 + j] & 63 : scales[8 + j] >> 4 | (scales[4 + j] >> 2 & 0x30);
      const float step = d * static_cast<float>(scale), offset = m * static_cast<float>(least);
      const uint8_t* q = block + 16 + part / 2 * 32;
      const int shift = part % 2 * 4;
      for (int i = 0; i < 32; ++i) out[part * 32 + i] = step * static_cast<float>(q[i] >> shift & 15) - offset;
    }
  } else {
    static_assert(kType == GgufType::q6_k);
    const float d = half_at(block + 208);
    for (int part = 0; part < 16; ++part) {
      const float step = d * static_cast<float>(static_cast<int8_t>(block[192 + part]));
      const int at = part * 16;  // of 256 values: low nibbles in runs of 64, the two high bits in runs of 32
      const uint8_t* low = block + at / 128 * 64 + at % 64;
      const uint8_t* high = block + 128 + at / 128 * 32 + at % 32;
      const int low_shift = at % 128 / 64 * 4, high_shift = at % 128 / 32 * 2;
      for (int i = 0; i < 16; ++i) {
        const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        out[at + i] = step * static_cast<float>(q - 32);
      }
    }
  }
}

template <GgufType kType>
void dequantize_blocks(const uint8_t* blocks, int64_t count, float* values) {
  constexpr GgufBlock kBlock = gguf_block(kType);
  in_parallel(count, kBlock.values, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      dequantize_block<kType>(blocks + i * kBlock.bytes, values + i * kBlock.values);
  });
}

}  // namespace

void gguf_dequantize(const uint8_t* blocks, int64_t count, GgufType type, float* values) {
  switch (type) {
    case GgufType::q4_0:
      return dequantize_blocks<GgufType::q4_0>(blocks, count, values);
    case GgufType::q4_1:
      return dequantize_blocks<GgufType::q4_1>(blocks, count, values);
    case GgufType::q8_0:
      return dequantize_blocks<GgufType::q8_0>(blocks, count, values);
    case GgufType::q4_k:
      return dequantize_blocks<GgufType::q4_k>(blocks, count, values);
    case GgufType::q6_k:
      return dequantize_blocks<GgufType::q6_k>(blocks, count, values);
  }
}

}  // namespace quicksilver::QS_ISA
