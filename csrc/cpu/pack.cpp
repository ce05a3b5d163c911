// Weights into Matryoshka planes, split over the threads by panels of 16 rows.
#include "kernels.h"
#include "quantize.h"
#include "vec.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

constexpr int kPanel = 16;
constexpr int kLine = 8;

// Elements at..at+n of an array, n <= 16, the rest of the lanes zero.
template <FloatType kType>
QS_INLINE f32x16 read(const void* array, int64_t at, int n) {
  if constexpr (kType == FloatType::f32) {
    return load(static_cast<const float*>(array) + at, n);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(array) + at;
    return kType == FloatType::f16 ? load_half(p, n) : load_bfloat(p, n);
  }
}

// The value of largest magnitude among n, with its sign (the positive one where both signs reach it); NaN where one is
// NaN or Inf.
template <FloatType kType>
QS_INLINE float largest(const void* weight, int64_t at, int n) {
  i32x16 top = broadcast(0);
  f32x16 high = zeros();
  for (int i = 0; i < n; i += 16) {
    const f32x16 values = read<kType>(weight, at + i, n - i < 16 ? n - i : 16);
    top = max(top, magnitudes(values));
    high = max(high, values);
  }
  const int32_t bits = max_lane(top);
  float magnitude;
  memcpy(&magnitude, &bits, sizeof magnitude);
  if (bits >= 0x7f800000) return __builtin_nanf("");
  return max_lane(high) == magnitude ? magnitude : -magnitude;
}

// The codes of n values, to the nibbles of one row in its lines; a line has `pitch` bytes.
template <FloatType kType>
QS_INLINE void write_codes(const void* weight, int64_t at, int n, float scale, uint8_t* hi, uint8_t* lo,
                           int64_t pitch) {
  const bool zero = !(scale < 0.0f || scale > 0.0f);  // or NaN
  for (int i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? n - i : 16;
    int8_t q[16] = {};
    if (!zero) {
      const f32x16 steps = read<kType>(weight, at + i, count) / broadcast(scale);
      store_bytes(q, round_to_int(min(max(steps, broadcast(-128.0f)), broadcast(119.0f))));
    }
    for (int begin = 0; begin < count; begin += kLine) {
      // Eight codes at once: q + 128 is q with its top bit flipped, and adding 8 to at most 247 carries nowhere.
      const uint64_t codes = (load_as<uint64_t>(q + begin) ^ 0x8080808080808080u) + 0x0808080808080808u;
      const uint32_t first = static_cast<uint32_t>(codes), second = static_cast<uint32_t>(codes >> 32);
      const int64_t line = (i + begin) / kLine;
      store_as<uint32_t>(hi + line * pitch, (first >> 4 & 0x0f0f0f0fu) | (second & 0xf0f0f0f0u));
      if (lo != nullptr) {
        store_as<uint32_t>(lo + line * pitch, (first & 0x0f0f0f0fu) | (second << 4 & 0xf0f0f0f0u));
      }
    }
  }
}

// A panel's scales and codes, kSpan columns of it at a time: long enough runs of a row for the prefetcher, and few
// enough that all its rows are still in the cache when their codes are made.
template <FloatType kType>
void pack_panels(const MatryoshkaPack& p, int64_t begin, int64_t end) {
  constexpr int64_t kSpan = 512;
  const int64_t groups = (p.k + p.group - 1) / p.group, lines = (p.k + kLine - 1) / kLine;
  const auto columns = [&p](int64_t k) { return p.k - k < p.group ? static_cast<int>(p.k - k) : p.group; };
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t top = panel * kPanel;
    const int height = p.n - top < kPanel ? static_cast<int>(p.n - top) : kPanel;
    const int64_t pitch = height * 4;
    for (int64_t from = 0; from < p.k; from += kSpan) {
      const int64_t to = p.k - from < kSpan ? p.k : from + kSpan;
      float scale[kSpan / 32][kPanel] = {};
      for (int row = 0; row < height; ++row) {
        for (int64_t k = from; k < to; k += p.group) {
          scale[(k - from) / p.group][row] = largest<kType>(p.weight, (top + row) * p.k + k, columns(k));
        }
      }
      for (int64_t k = from; k < to; k += p.group) {
        float* of = scale[(k - from) / p.group];
        uint16_t half[kPanel];
        store_half(half, load(of) / broadcast(-128.0f) + zeros());  // + 0 makes the scale of a group of zeros +0
        for (uint16_t& bits : half) bits = (bits & 0x7c00) == 0x7c00 ? 0x7e00 : bits;
        store(of, load_half(half));  // codes go by the scale as it is stored
        memcpy(p.scale + top * groups + k / p.group * height, half, static_cast<size_t>(height) * sizeof(uint16_t));
      }
      for (int row = 0; row < height; ++row) {
        for (int64_t k = from; k < to; k += p.group) {
          const int64_t at = top * lines * 4 + k / kLine * pitch + row * 4;
          write_codes<kType>(p.weight, (top + row) * p.k + k, columns(k), scale[(k - from) / p.group][row], p.hi + at,
                             p.lo != nullptr ? p.lo + at : nullptr, pitch);
        }
      }
    }
  }
}

}  // namespace

void matryoshka_pack(const MatryoshkaPack& params) {
  in_parallel((params.n + kPanel - 1) / kPanel, kPanel * params.k, [&](int64_t begin, int64_t end) {
    switch (params.type) {
      case FloatType::f32:
        return pack_panels<FloatType::f32>(params, begin, end);
      case FloatType::f16:
        return pack_panels<FloatType::f16>(params, begin, end);
      case FloatType::bf16:
        return pack_panels<FloatType::bf16>(params, begin, end);
    }
  });
}

}  // namespace quicksilver::QS_ISA
