// GEMM of INT8 rows with INT8 or INT4 Matryoshka weights.
//
// Few rows read the packed planes directly: one pass over the bytes, which is all that decoding costs. Many rows work
// on panels unpacked into the cache. Both give a row the same integers and the same order of fp32 operations.
#include "gemm_micro.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

// Rows of a batch, those of 4 bits first.
struct Order {
  int32_t* row;
  int four = 0;
  int all = 0;
};

bool has_eight(const MatryoshkaGemm& gemm, int64_t i) {
  return gemm.w.lo != nullptr && (gemm.bits == nullptr || gemm.bits[i] == 8);
}

Order order_rows(const MatryoshkaGemm& gemm, int64_t begin, int64_t end, int32_t* row) {
  Order order{row};
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = begin; i < end; ++i) {
      if (has_eight(gemm, i) == (pass == 1)) row[order.all++] = static_cast<int32_t>(i);
    }
    if (pass == 0) order.four = order.all;
  }
  return order;
}

// Sixteen rows of the weight, or those of the last panel.
struct Panel {
  const uint8_t* hi;
  const uint8_t* lo;
  const uint16_t* scale;
  int64_t n;  // first row
  int rows;
};

Panel panel_of(const MatryoshkaGemm& gemm, int64_t index) {
  const int64_t n = index * 16;
  const int64_t bytes = gemm.x.k_padded / 2 * n;
  return {gemm.w.hi + bytes, gemm.w.lo ? gemm.w.lo + bytes : nullptr, gemm.w.scale + gemm.x.groups * n, n,
          gemm.w.n - n < 16 ? static_cast<int>(gemm.w.n - n) : 16};
}

// Copies `count` pieces of `bytes` bytes to places `stride` bytes apart, the gaps zero.
__attribute__((noinline)) void widen(const void* from, int count, int bytes, int stride, void* to) {
  memset(to, 0, static_cast<size_t>(count) * static_cast<size_t>(stride));
  for (int i = 0; i < count; ++i) {
    memcpy(static_cast<char*>(to) + i * stride, static_cast<const char*>(from) + i * bytes, static_cast<size_t>(bytes));
  }
}

// `lines` lines of a panel from line `first` on; those of a narrow panel are widened into `buffer`.
QS_INLINE const uint8_t* lines_of(const uint8_t* plane, int rows, int64_t first, int lines, uint8_t* buffer) {
  if (rows == 16) [[likely]]
    return plane + first * kLineBytes;
  widen(plane + first * rows * 4, lines, rows * 4, kLineBytes, buffer);
  return buffer;
}

QS_INLINE f32x16 scales_of(const Panel& panel, int64_t group) {
  if (panel.rows == 16) [[likely]]
    return load_half(panel.scale + group * 16);
  uint16_t wide[16];
  widen(panel.scale + group * panel.rows, 1, panel.rows * 2, sizeof wide, wide);
  return load_half(wide);
}

QS_INLINE void write_out(const MatryoshkaGemm& gemm, const Panel& panel, int64_t i, f32x16 acc) {
  const int64_t at = (gemm.out_index ? gemm.out_index[i] : i) * gemm.y_stride + panel.n;
  if (gemm.bias) acc = acc + load(gemm.bias + panel.n, panel.rows);
  if (gemm.residual) acc = load(gemm.residual + at, panel.rows) + acc;
  store(gemm.y + at, acc, panel.rows);
}

#if QS_AVX2
// --- few rows
// ----------------------------------------------------------------------------------------------------------

template <int R, int kPlanes, bool kEight>
void direct_tile(const MatryoshkaGemm& gemm, const Panel& panel, const int32_t* rows) {
  const QuantizedRows& q = gemm.x;
  f32x16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zeros();
  alignas(64) uint8_t wide[2][16 * kLineBytes];
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t k = g * q.group;
    const int lines = static_cast<int>(((q.k_padded - k < q.group) ? q.k_padded - k : q.group) / 8);
    const int8_t* x[R * kPlanes];
    for (int r = 0; r < R; ++r) {
      x[r * kPlanes] = q.q + rows[r] * q.k_padded + k;
      if constexpr (kPlanes == 2) x[r * 2 + 1] = q.q_low + rows[r] * q.k_padded + k;
    }
    const uint8_t* hi = lines_of(panel.hi, panel.rows, k / 8, lines, wide[0]);
    const uint8_t* lo = kEight ? lines_of(panel.lo, panel.rows, k / 8, lines, wide[1]) : nullptr;
    const int8_t* const(&fixed)[R * kPlanes] = x;
    i32x16 dot[R * kPlanes];
    direct_dots<R * kPlanes, kEight>(hi, lo, fixed, lines, dot);
    const f32x16 weight_scale = scales_of(panel, g);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = rows[r] * q.groups + g;
      i32x16 total = dot[r * kPlanes];
      if constexpr (kPlanes == 2) total = shift_left<8>(total) + dot[r * 2 + 1];
      total = total - broadcast((kEight ? 136 : 128) * q.sum[at]);
      acc[r] = acc[r] + to_float(total) * (broadcast(q.scale[at]) * weight_scale);
    }
  }
  for (int r = 0; r < R; ++r) write_out(gemm, panel, rows[r], acc[r]);
}

template <int kPlanes, bool kEight>
void direct_rows(const MatryoshkaGemm& gemm, const Panel& panel, const int32_t* rows, int count) {
  int i = 0;
  if constexpr (kPlanes == 1) {
    for (; i + 4 <= count; i += 4) direct_tile<4, kPlanes, kEight>(gemm, panel, rows + i);
  }
  for (; i + 2 <= count; i += 2) direct_tile<2, kPlanes, kEight>(gemm, panel, rows + i);
  for (; i < count; ++i) direct_tile<1, kPlanes, kEight>(gemm, panel, rows + i);
}

// Beyond these, unpacking once for all rows costs less than unpacking for each few (measured on AVX2).
constexpr int kDirectRows = 8;
constexpr int kDirectRowsOfTwoPlanes = 3;

void direct_panels(const MatryoshkaGemm& gemm, int64_t begin, int64_t end) {
  int32_t row[kDirectRows];
  const Order order = order_rows(gemm, 0, gemm.x.rows, row);
  const bool two = gemm.x.q_low != nullptr;
  for (int64_t p = begin; p < end; ++p) {
    const Panel panel = panel_of(gemm, p);
    if (order.four > 0) (two ? direct_rows<2, false> : direct_rows<1, false>)(gemm, panel, row, order.four);
    const int eight = order.all - order.four;
    if (eight > 0) (two ? direct_rows<2, true> : direct_rows<1, true>)(gemm, panel, row + order.four, eight);
  }
}
#endif

// --- many rows
// ---------------------------------------------------------------------------------------------------------

constexpr int kTileRows = QS_AVX512 ? 12 : QS_AVX2 ? 6 : 2;  // as many as there are registers for
constexpr int kBlockRows = 48;
constexpr int kBlockPanels = 8;
constexpr int kBlockValues = 256;  // of K; a multiple of every group size
constexpr int kBlockGroups = kBlockValues / 32;
constexpr int kBlockSteps = kBlockValues / kStepValues;

// A worker's scratch: rows of x, unpacked panels, sums so far. It stays in the second-level cache, the part that a tile
// works on in the first. With two planes dpbusd sees a row as two, first 256 times the high bytes, then the low ones.
struct Block {
  alignas(64) int32_t x[kBlockRows][kBlockSteps];
  alignas(64) int32_t codes[kBlockSteps][16];
  alignas(64) float weight_scale[kBlockGroups][16];
  alignas(64) float acc[kBlockPanels][kBlockRows][16];
  int32_t start[kBlockRows][kBlockGroups];  // the offset's part of the dot product
  float scale[kBlockRows][kBlockGroups];
  int32_t row[kBlockRows];
};

// Adds some groups' products of R rows and one panel to the sums.
template <int R, bool kPairs>
void blocked_tile(Block& block, int panel, int first, int groups, int group_steps, int steps) {
  constexpr int kSums = kPairs ? R / 2 : R;
  for (int g = 0; g < groups; ++g) {
    const int from = g * group_steps;
    const int n = steps - from < group_steps ? steps - from : group_steps;
    i32x16 dot[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot[r] = broadcast(block.start[first + r][g]);
    blocked_dots<R>(&block.x[first][from], kBlockSteps, block.codes[from], n, dot);
    const f32x16 weight_scale = load(block.weight_scale[g]);
#pragma GCC unroll 16
    for (int r = 0; r < kSums; ++r) {
      const int at = kPairs ? first + 2 * r : first + r;
      i32x16 total = kPairs ? shift_left<8>(dot[2 * r]) + dot[2 * r + 1] : dot[r];
      float* acc = block.acc[panel][at];
      store(acc, load(acc) + to_float(total) * (broadcast(block.scale[at][g]) * weight_scale));
    }
  }
}

template <bool kPairs>
void blocked_tiles(Block& block, int panel, int begin, int end, int groups, int group_steps, int steps) {
  int i = begin;
  for (; i + kTileRows <= end; i += kTileRows) {
    blocked_tile<kTileRows, kPairs>(block, panel, i, groups, group_steps, steps);
  }
  if constexpr (kTileRows > 4) {
    for (; i + 4 <= end; i += 4) blocked_tile<4, kPairs>(block, panel, i, groups, group_steps, steps);
  }
  for (; i + 2 <= end; i += 2) blocked_tile<2, kPairs>(block, panel, i, groups, group_steps, steps);
  if constexpr (!kPairs) {
    if (i < end) blocked_tile<1, false>(block, panel, i, groups, group_steps, steps);
  }
}

void blocked_panels(const MatryoshkaGemm& gemm, int64_t begin, int64_t end) {
  const QuantizedRows& q = gemm.x;
  const bool pairs = QS_VNNI && q.q_low != nullptr;
  const int virtual_rows = pairs ? 2 : 1;
  const int group_steps = q.group / kStepValues;
  Block block;
  alignas(64) uint8_t wide[2][kBlockValues / 8 * kLineBytes];

  for (int64_t row0 = 0; row0 < q.rows; row0 += kBlockRows / virtual_rows) {
    const int64_t left = q.rows - row0;
    const int64_t rows = left < kBlockRows / virtual_rows ? left : kBlockRows / virtual_rows;
    const Order order = order_rows(gemm, row0, row0 + rows, block.row);
    for (int64_t p = begin; p < end; p += kBlockPanels) {
      const int panels = end - p < kBlockPanels ? static_cast<int>(end - p) : kBlockPanels;
      memset(block.acc, 0, sizeof block.acc[0] * static_cast<size_t>(panels));
      for (int64_t k = 0; k < q.k_padded; k += kBlockValues) {
        const int values = q.k_padded - k < kBlockValues ? static_cast<int>(q.k_padded - k) : kBlockValues;
        const int groups = (values + q.group - 1) / q.group;
        const int64_t group0 = k / q.group;
        for (int i = 0; i < order.all; ++i) {
          const int64_t row = block.row[i];
          const int8_t* high = q.q + row * q.k_padded + k;
          const int8_t* low = q.q_low ? q.q_low + row * q.k_padded + k : nullptr;
          const int at = i * virtual_rows;
          spread_row(high, low, values, block.x[at]);
          if (pairs) spread_row(low, nullptr, values, block.x[at + 1]);
          for (int g = 0; g < groups; ++g) {
            const int32_t sum = q.sum[row * q.groups + group0 + g];
            block.scale[at][g] = q.scale[row * q.groups + group0 + g];
            block.start[at][g] = 0;
            block.start[at + virtual_rows - 1][g] = (i < order.four ? -128 : -136) * sum;
          }
        }
        for (int j = 0; j < panels; ++j) {
          const Panel panel = panel_of(gemm, p + j);
          const int lines = values / 8;
          const uint8_t* hi = lines_of(panel.hi, panel.rows, k / 8, lines, wide[0]);
          for (int g = 0; g < groups; ++g) store(block.weight_scale[g], scales_of(panel, group0 + g));
          for (int eight = 0; eight < 2; ++eight) {
            const int first = (eight ? order.four : 0) * virtual_rows;
            const int last = (eight ? order.all : order.four) * virtual_rows;
            if (first == last) continue;
            if (eight) {
              unpack_lines<true>(hi, lines_of(panel.lo, panel.rows, k / 8, lines, wide[1]), lines, block.codes[0]);
            } else {
              unpack_lines<false>(hi, nullptr, lines, block.codes[0]);
            }
            (pairs ? blocked_tiles<true> : blocked_tiles<false>)(block, j, first, last, groups, group_steps,
                                                                 lines * kLineSteps);
          }
        }
      }
      for (int j = 0; j < panels; ++j) {
        const Panel panel = panel_of(gemm, p + j);
        for (int i = 0; i < order.all; ++i) write_out(gemm, panel, block.row[i], load(block.acc[j][i * virtual_rows]));
      }
    }
  }
}

}  // namespace

namespace {

// A worker's share: panels of all products, one after the other.
Range share(const MatryoshkaGemm* params, int count, int worker, int workers) {
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += (params[i].w.n + 15) / 16;
  return split(panels, worker, workers);
}

}  // namespace

FirstWeights first_weights(const MatryoshkaGemm* params, int count, int worker, int workers) {
  int64_t first = share(params, count, worker, workers).begin;
  for (int i = 0; i < count; ++i) {
    const int64_t own = (params[i].w.n + 15) / 16;
    if (first < own) {
      const Panel panel = panel_of(params[i], first);
      bool eight = false;
      for (int64_t r = 0; r < params[i].x.rows; ++r) eight |= has_eight(params[i], r);
      return {panel.hi, eight ? panel.lo : nullptr, params[i].x.k_padded / 2 * (params[i].w.n - panel.n)};
    }
    first -= own;
  }
  return {};
}

void gemm_worker(const MatryoshkaGemm* params, int count, int worker, int workers) {
  Range part = share(params, count, worker, workers);
  for (int i = 0; i < count; ++i) {
    const int64_t own = (params[i].w.n + 15) / 16;
    const int64_t begin = part.begin < 0 ? 0 : part.begin;
    const int64_t end = part.end < own ? part.end : own;
    if (begin < end && params[i].x.rows > 0) {
#if QS_AVX2
      const bool few = params[i].x.rows <= (params[i].x.q_low ? kDirectRowsOfTwoPlanes : kDirectRows);
      (few ? direct_panels : blocked_panels)(params[i], begin, end);
#else
      blocked_panels(params[i], begin, end);
#endif
    }
    part = {part.begin - own, part.end - own};
  }
}

void gemm_count(const MatryoshkaGemm* params, int count) {
  Counters delta{};
  for (int i = 0; i < count; ++i) {
    const MatryoshkaGemm& gemm = params[i];
    if (gemm.x.rows == 0) continue;
    bool eight = false;
    for (int64_t r = 0; r < gemm.x.rows && !eight; ++r) eight = has_eight(gemm, r);
    delta.gemm_macs += gemm.x.rows * gemm.x.k * gemm.w.n;
    const int64_t plane = gemm.w.n * gemm.x.k_padded / 2;
    delta.weight_bytes_read += plane * (eight ? 2 : 1) + gemm.w.n * gemm.x.groups * 2 + (gemm.bias ? gemm.w.n * 4 : 0);
  }
  quicksilver::count(delta);
}

void matryoshka_gemm_many(const MatryoshkaGemm* params, int count) {
  if (count <= 0 || params[0].x.rows <= 0) return;
  int64_t work = 0;
  for (int i = 0; i < count; ++i) work += params[i].x.rows * params[i].x.k * params[i].w.n;
  if (work < 65536) {
    gemm_worker(params, count, 0, 1);
  } else {
    on_all_threads([=](int worker, int workers) { gemm_worker(params, count, worker, workers); });
  }
  gemm_count(params, count);
}

void matryoshka_gemm(const MatryoshkaGemm& params) { QS_ISA::matryoshka_gemm_many(&params, 1); }

}  // namespace quicksilver::QS_ISA
