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

// A group of one row: its values, the lanes behind them zero.
struct Group {
  f32x16 value[8];
  int vectors = 0;
  float low = 0, high = 0;
  bool finite = true;
};

template <FloatType kType>
QS_INLINE Group read_group(const void* weight, int64_t at, int n) {
  Group group;
  f32x16 low = broadcast(__builtin_inff()), high = broadcast(-__builtin_inff());
  i32x16 top = broadcast(0);
  for (int i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? n - i : 16;
    const f32x16 values = read<kType>(weight, at + i, count);
    group.value[group.vectors++] = values;
    top = max(top, magnitudes(values));
    low = min(low, values);
    high = max(high, values);
  }
  group.finite = max_lane(top) < 0x7f800000;
  group.low = -max_lane(zeros() - low);
  group.high = max_lane(high);
  return group;
}

// The codes of n values, to the nibbles of one row in its lines; a line has `pitch` bytes.
QS_INLINE void write_codes(const Group& group, int n, float scale, float offset, uint8_t* hi, uint8_t* lo,
                           int64_t pitch) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; i += 16) {
    const f32x16 steps = (group.value[i / 16] - broadcast(offset)) * broadcast(inverse);
    const i32x16 code = round_to_int(min(max(steps, zeros()), broadcast(15.0f)));
    const f32x16 rest = (steps - to_float(code)) * broadcast(8.0f) + broadcast(8.0f);
    const i32x16 residual = round_to_int(min(max(rest, zeros()), broadcast(15.0f)));
    int8_t high[16], low[16];
    store_bytes(high, code);
    store_bytes(low, residual);
    for (int begin = 0; begin < 16 && i + begin < n; begin += kLine) {
      const int64_t line = (i + begin) / kLine;
      const uint32_t h0 = load_as<uint32_t>(high + begin), h1 = load_as<uint32_t>(high + begin + 4);
      const uint32_t l0 = load_as<uint32_t>(low + begin), l1 = load_as<uint32_t>(low + begin + 4);
      store_as<uint32_t>(hi + line * pitch, h0 | h1 << 4);
      if (lo != nullptr) store_as<uint32_t>(lo + line * pitch, l0 | l1 << 4);
    }
  }
}

template <FloatType kType>
void pack_panels(const MatryoshkaPack& p, int64_t begin, int64_t end) {
  const int64_t groups = (p.k + p.group - 1) / p.group, lines = (p.k + kLine - 1) / kLine;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t top = panel * kPanel;
    const int height = p.n - top < kPanel ? static_cast<int>(p.n - top) : kPanel;
    const int64_t pitch = height * 4;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * p.group;
      const int n = p.k - k < p.group ? static_cast<int>(p.k - k) : p.group;
      for (int row = 0; row < height; ++row) {
        const Group group = read_group<kType>(p.weight, (top + row) * p.k + k, n);
        uint16_t scale = to_half((group.high - group.low) / 15.0f), offset = to_half(group.low);
        if (!group.finite) scale = 0x7e00;
        const int64_t of = top * groups + g * height + row, at = top * lines * 4 + k / kLine * pitch + row * 4;
        p.scale[of] = scale;
        p.offset[of] = offset;
        float halves[16] = {};
        uint16_t both[16] = {scale, offset};
        store(halves, load_half(both));
        write_codes(group, n, halves[0], halves[1], p.hi + at, p.lo != nullptr ? p.lo + at : nullptr, pitch);
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
