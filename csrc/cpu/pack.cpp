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

// What is tried of a group's range: its ends are worth less than what lies between. Then, of the best, a bit more and
// a bit less at either end.
constexpr float kShares[] = {1.0f, 0.9f, 0.8f, 0.7f};
constexpr float kBit = 0.1f;
// What a squared error of the INT8 value weighs beside one of the INT4 value: a residual doesn't reach what was cut off
// too far.
constexpr float kEightWeighs = 4.0f;

// A group of one row, and what an error of each value weighs: of the lanes behind them nothing.
struct Group {
  f32x16 value[8];
  f32x16 weight[8];
  int vectors = 0;
  float low = 0, high = 0;
  bool finite = true;
};

struct Grid {
  uint16_t scale = 0, offset = 0;  // fp16
  float step = 0, start = 0;       // the same
};

Grid grid_of(float step, float start) {
  Grid grid;
  const float both[16] = {step, start};
  uint16_t half[16];
  float rounded[16];
  store_half(half, load(both));
  store(rounded, load_half(half));
  grid.scale = half[0];
  grid.offset = half[1];
  grid.step = rounded[0];
  grid.start = rounded[1];
  return grid;
}

template <FloatType kType>
QS_INLINE Group read_group(const MatryoshkaPack& p, int64_t row, int64_t k, int n) {
  Group group;
  f32x16 low = broadcast(__builtin_inff()), high = broadcast(-__builtin_inff());
  i32x16 top = broadcast(0);
  float first = 0;
  for (int i = 0; i < n; i += 16) {
    const int count = n - i < 16 ? n - i : 16;
    float value[16], weight[16] = {};
    store(value, read<kType>(p.weight, row * p.k + k + i, count));
    for (int j = 0; j < count; ++j) weight[j] = p.importance ? p.importance[k + i + j] : 1.0f;
    if (i == 0) first = value[0];
    for (int j = count; j < 16; ++j) value[j] = first;  // which leaves the range alone
    group.value[group.vectors] = load(value);
    group.weight[group.vectors] = load(weight);
    const f32x16& values = group.value[group.vectors++];
    top = max(top, magnitudes(values));
    low = min(low, values);
    high = max(high, values);
  }
  group.finite = max_lane(top) < 0x7f800000;
  group.low = -max_lane(zeros() - low);
  group.high = max_lane(high);
  return group;
}

// A value in steps, its code and its residual in eighths of a step, less 8.
struct Code {
  f32x16 code, residual;
  QS_INLINE_MEMBER Code(const f32x16& value, const Grid& grid, float inverse) {
    const f32x16 steps = (value - broadcast(grid.start)) * broadcast(inverse);
    code = to_float(round_to_int(min(max(steps, zeros()), broadcast(15.0f))));
    const f32x16 rest = (steps - code) * broadcast(8.0f) + broadcast(8.0f);
    residual = to_float(round_to_int(min(max(rest, zeros()), broadcast(15.0f))));
  }
};

float inverse_of(const Grid& grid) { return grid.step > 0.0f ? 1.0f / grid.step : 0.0f; }

// The grid that is nearest to the values, their codes given by another one: a least squares fit. That one where there
// is none.
Grid refined(const Group& group, const Grid& grid) {
  f32x16 of_1 = zeros(), of_q = zeros(), of_qq = zeros(), of_w = zeros(), of_wq = zeros();
  for (int i = 0; i < group.vectors; ++i) {
    const f32x16 q = Code(group.value[i], grid, inverse_of(grid)).code, h = group.weight[i];
    const f32x16 hq = h * q, w = group.value[i] - broadcast(group.low);
    of_1 = of_1 + h;
    of_q = of_q + hq;
    of_qq = of_qq + hq * q;
    of_w = of_w + h * w;
    of_wq = of_wq + hq * w;
  }
  const float h = sum(of_1), q = sum(of_q), w = sum(of_w);
  const float determinant = h * sum(of_qq) - q * q;
  const float step = (h * sum(of_wq) - q * w) / determinant;
  if (!(determinant > 0.0f && step > 0.0f)) return grid;
  return grid_of(step, group.low + (w - step * q) / h);
}

float error_of(const Group& group, const Grid& grid) {
  f32x16 four = zeros(), eight = zeros();
  for (int i = 0; i < group.vectors; ++i) {
    const Code code(group.value[i], grid, inverse_of(grid));
    const f32x16 rest = (group.value[i] - broadcast(grid.start)) - broadcast(grid.step) * code.code;
    const f32x16 finer = rest - broadcast(grid.step * kCodeUnit) * (code.residual - broadcast(8.0f));
    four = four + group.weight[i] * (rest * rest);
    eight = eight + group.weight[i] * (finer * finer);
  }
  return sum(four) + kEightWeighs * sum(eight);
}

struct Best {
  Grid grid;
  float error = __builtin_inff();

  // Takes a grid if it is better, after some refinements.
  bool consider(const Group& group, Grid other, int refinements) {
    for (int i = 0; i < refinements; ++i) other = refined(group, other);
    const float its = error_of(group, other);
    if (!(its < error)) return false;
    grid = other;
    error = its;
    return true;
  }
};

// The grid that spans so much of either half of the group's range. The smallest step is one that an offset in fp16 is
// precise to.
Grid spanning(const Group& group, float lower, float upper) {
  const float half = (group.high - group.low) * 0.5f, middle = group.low + half;
  const float low = middle - half * lower, high = middle + half * upper;
  const float largest = -group.low > group.high ? -group.low : group.high;
  float step = (high - low) * (1.0f / 15);
  if (step < largest * 0x1p-11f) step = largest * 0x1p-11f;
  return grid_of(step, (low + high) * 0.5f - 7.5f * step);
}

Grid best_grid(const Group& group) {
  Best best;
  float share = 1;
  for (const float each : kShares) {
    if (best.consider(group, spanning(group, each, each), 1)) share = each;
  }
  for (const float other : {share - kBit, share + kBit}) {
    best.consider(group, spanning(group, other, share), 2);
    best.consider(group, spanning(group, share, other), 2);
  }
  if (best.error < __builtin_inff()) {
    best.consider(group, best.grid, 2);
  } else {
    best.grid.scale = 0x7e00;  // NaN: beyond fp16's range
  }
  return best.grid;
}

// A group's codes, to the nibbles of one row in its lines; a line has `pitch` bytes.
QS_INLINE void write_codes(const Group& group, int n, const Grid& grid, uint8_t* hi, uint8_t* lo, int64_t pitch) {
  for (int i = 0; i < n; i += 16) {
    const Code code(group.value[i / 16], grid, inverse_of(grid));
    int8_t high[16], low[16];
    store_bytes(high, round_to_int(code.code));
    store_bytes(low, round_to_int(code.residual));
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
        const Group group = read_group<kType>(p, top + row, k, n);
        Grid grid;
        grid.scale = 0x7e00;
        if (group.finite) grid = best_grid(group);
        const int64_t of = top * groups + g * height + row, at = top * lines * 4 + k / kLine * pitch + row * 4;
        p.scale[of] = grid.scale;
        p.offset[of] = grid.offset;
        write_codes(group, n, grid, p.hi + at, p.lo != nullptr ? p.lo + at : nullptr, pitch);
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
