// Quantized values as GGUF files store them, in blocks.
#pragma once

#include <cstdint>

namespace quicksilver {

// By GGUF's own numbers. The block formats are those of llama.cpp's ggml.
enum class GgufType { q4_0 = 2, q4_1 = 3, q8_0 = 8, q4_k = 12, q6_k = 14 };

struct GgufBlock {
  int64_t values;
  int64_t bytes;
};
// Sizes of a type's blocks; zeros for a type that isn't one of these.
constexpr GgufBlock gguf_block(GgufType type) {
  switch (type) {
    case GgufType::q4_0:
      return {32, 18};
    case GgufType::q4_1:
      return {32, 20};
    case GgufType::q8_0:
      return {32, 34};
    case GgufType::q4_k:
      return {256, 144};
    case GgufType::q6_k:
      return {256, 210};
  }
  return {0, 0};
}

// `count` blocks to fp32, to the same bits as the gguf package's, NaN's aside.
void gguf_dequantize(const uint8_t* blocks, int64_t count, GgufType type, float* values);

}  // namespace quicksilver
