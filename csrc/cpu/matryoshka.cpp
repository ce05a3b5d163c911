// GEMM of INT8 rows with INT8 or INT4 Matryoshka weights.
//
// Few rows read the packed planes directly: one pass over the bytes, which is all that decoding costs. Many rows work
// on pieces of panels that are unpacked into the cache. Both give a row the same integers and the same order of fp32
// operations.
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

bool any_eight(const MatryoshkaGemm& gemm) {
  for (int64_t i = 0; i < gemm.x.rows; ++i) {
    if (has_eight(gemm, i)) return true;
  }
  return false;
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
  const uint16_t* offset;  // or null
  int64_t n;               // first row
  int rows;
};

Panel panel_of(const MatryoshkaGemm& gemm, int64_t index) {
  const int64_t n = index * 16;
  const int64_t bytes = gemm.x.k_padded / 2 * n;
  return {gemm.w.hi + bytes,
          gemm.w.lo ? gemm.w.lo + bytes : nullptr,
          gemm.w.scale + gemm.x.groups * n,
          gemm.w.offset ? gemm.w.offset + gemm.x.groups * n : nullptr,
          n,
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

// A group's scales or offsets.
QS_INLINE f32x16 halves_of(const Panel& panel, const uint16_t* halves, int64_t group) {
  if (panel.rows == 16) [[likely]]
    return load_half(halves + group * 16);
  uint16_t wide[16];
  widen(halves + group * panel.rows, 1, panel.rows * 2, sizeof wide, wide);
  return load_half(wide);
}

QS_INLINE void write_out(const MatryoshkaGemm& gemm, const Panel& panel, int64_t i, f32x16 acc) {
  const int64_t at = (gemm.out_index ? gemm.out_index[i] : i) * gemm.y_stride + panel.n;
  if (gemm.bias) acc = acc + load(gemm.bias + panel.n, panel.rows);
  if (gemm.residual) acc = load(gemm.residual + at, panel.rows) + acc;
  store(gemm.y + at, acc, panel.rows);
}

constexpr int kBlockSteps = 32 * 1024;  // of x, that a worker holds: 128 KiB, in its second-level cache

#if QS_AVX2
// --- few rows
// ----------------------------------------------------------------------------------------------------------

// 16-bit products take two planes of x as one; there INT8 weights are unpacked on the way, to be multiplied with x as
// steps.
template <int kPlanes, bool kEight>
inline constexpr bool kUnpacks = kPlanes == 2 && kEight && !QS_VNNI;

// What direct tiles work on. x has those rows as steps whose weights are unpacked, one after the other.
struct Direct {
  const MatryoshkaGemm& gemm;
  const Panel& panel;
  const int32_t* rows;
  const int32_t* x;
};

template <int R, int kPlanes, bool kEight>
void direct_tile(const Direct& direct, int first) {
  const Panel& panel = direct.panel;
  const QuantizedRows& q = direct.gemm.x;
  const int32_t* rows = direct.rows + first;
  f32x16 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zeros();
  alignas(64) uint8_t wide[2][16 * kLineBytes];
  const int32_t zero = kEight ? direct.gemm.w.zero8() : direct.gemm.w.zero4();
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t k = g * q.group;
    const int lines = static_cast<int>(((q.k_padded - k < q.group) ? q.k_padded - k : q.group) / 8);
    const uint8_t* hi = lines_of(panel.hi, panel.rows, k / 8, lines, wide[0]);
    const uint8_t* lo = kEight ? lines_of(panel.lo, panel.rows, k / 8, lines, wide[1]) : nullptr;
    const auto offset = [&](int r) { return broadcast(-zero * q.sum[rows[r] * q.groups + g]); };
    i32x16 total[R];
    if constexpr (kUnpacks<kPlanes, kEight>) {
      const int64_t stride = q.k_padded / kStepValues;
      for (int r = 0; r < R; ++r) total[r] = offset(r);
      unpacking_dots<R>(hi, lo, direct.x + first * stride + k / kStepValues, stride, lines, total);
    } else {
      const int8_t* x[R * kPlanes];
      for (int r = 0; r < R; ++r) {
        x[r * kPlanes] = q.q + rows[r] * q.k_padded + k;
        if constexpr (kPlanes == 2) x[r * 2 + 1] = q.q_low + rows[r] * q.k_padded + k;
      }
      const int8_t* const(&fixed)[R * kPlanes] = x;
      i32x16 dot[R * kPlanes];
      direct_dots<R * kPlanes, kEight>(hi, lo, fixed, lines, dot);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        total[r] = offset(r) + (kPlanes == 2 ? shift_left<8>(dot[r * 2]) + dot[r * 2 + 1] : dot[r]);
      }
    }
    const f32x16 weight_scale = halves_of(panel, panel.scale, g);
    if (panel.offset) {
      const f32x16 weight_offset = halves_of(panel, panel.offset, g);
      const float unit = direct.gemm.w.unit();
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t at = rows[r] * q.groups + g;
        acc[r] = acc[r] + (to_float(total[r]) * (broadcast(q.scale[at] * unit) * weight_scale) +
                           broadcast(static_cast<float>(q.sum[at]) * q.scale[at]) * weight_offset);
      }
      continue;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      acc[r] = acc[r] + to_float(total[r]) * (broadcast(q.scale[rows[r] * q.groups + g]) * weight_scale);
    }
  }
  for (int r = 0; r < R; ++r) write_out(direct.gemm, panel, rows[r], acc[r]);
}

template <int kPlanes, bool kEight>
void direct_rows(const Direct& direct, int count) {
  int i = 0;
  if constexpr (kPlanes == 1 || kUnpacks<kPlanes, kEight>) {
    for (; i + 4 <= count; i += 4) direct_tile<4, kPlanes, kEight>(direct, i);
  }
  for (; i + 2 <= count; i += 2) direct_tile<2, kPlanes, kEight>(direct, i);
  for (; i < count; ++i) direct_tile<1, kPlanes, kEight>(direct, i);
}

constexpr int64_t kDirectRows = 64;  // at a time: so many stay in the second-level cache

// How many rows still read the packed planes directly: beyond, unpacking once for all of them costs less. INT4 rows of
// one plane gain nothing by that with 16-bit products. (Measured on AVX2, but for dpbusd's.)
int64_t most_direct_rows(const MatryoshkaGemm& gemm) {
  const bool two = gemm.x.q_low != nullptr;
  if (QS_VNNI) return two ? 3 : 8;
  const int64_t room = kBlockSteps * kStepValues / gemm.x.k_padded;
  if (any_eight(gemm)) return two && room < 4 ? room : 4;
  return two ? 3 : gemm.x.rows;
}

void direct_panels(const MatryoshkaGemm& gemm, int64_t begin, int64_t end) {
  const QuantizedRows& q = gemm.x;
  const bool two = q.q_low != nullptr;
  int32_t row[kDirectRows];
  alignas(64) int32_t x[kUnpacks<2, true> ? kBlockSteps : 1];
  for (int64_t row0 = 0; row0 < q.rows; row0 += kDirectRows) {
    const Order order = order_rows(gemm, row0, q.rows - row0 < kDirectRows ? q.rows : row0 + kDirectRows, row);
    if (two && kUnpacks<2, true>) {
      for (int i = order.four; i < order.all; ++i) {
        const int64_t at = row[i] * q.k_padded;
        spread_row(q.q + at, q.q_low + at, q.k_padded, x + (i - order.four) * q.k_padded / kStepValues);
      }
    }
    for (int64_t p = begin; p < end; ++p) {
      const Panel panel = panel_of(gemm, p);
      const Direct four{gemm, panel, row, nullptr}, eight{gemm, panel, row + order.four, x};
      if (order.four > 0) (two ? direct_rows<2, false> : direct_rows<1, false>)(four, order.four);
      if (order.all > order.four) (two ? direct_rows<2, true> : direct_rows<1, true>)(eight, order.all - order.four);
    }
  }
}
#endif

// --- many rows
// ---------------------------------------------------------------------------------------------------------

constexpr int kTileRows = QS_AVX512 ? 12 : QS_AVX2 ? 6 : 2;  // as many as there are registers for
constexpr int kBlockRows = 48;
constexpr int kBlockSums = 8 * kBlockRows;  // panels times rows
constexpr int kPieceValues = 256;           // of K, unpacked at once; a multiple of every group size
constexpr int kPieceGroups = kPieceValues / 32;
constexpr int kPieceSteps = kPieceValues / kStepValues;
constexpr int kBlockGroups = kBlockSteps / (32 / kStepValues);

// A worker's scratch: rows of x, which stay in the second-level cache; a piece of a panel, unpacked, which stays in the
// first; sums so far. With two planes dpbusd sees a row as two, first 256 times the high bytes, then the low ones.
struct Block {
  alignas(64) int32_t x[kBlockSteps];
  alignas(64) int32_t codes[kPieceSteps][16];
  alignas(64) float weight_scale[kPieceGroups][16];
  alignas(64) float weight_offset[kPieceGroups][16];
  alignas(64) float sums[kBlockSums][16];
  int32_t start[kBlockGroups];  // by row and group: the offset's part of the dot product
  float scale[kBlockGroups];
  float scaled_sum[kBlockGroups];  // what a weight's offset is multiplied by
  int32_t row[kBlockRows];
};

// The lines of packed weights that are wanted next. Tiles fetch some after each group, so that the memory works while
// the arithmetic does.
struct NextLines {
  const uint8_t* hi = nullptr;
  const uint8_t* lo = nullptr;  // null where the rows want none
  int lines = 0;
  int each = 0;  // per call

  QS_INLINE_MEMBER void fetch() {
    for (int i = 0; i < each && lines > 0; ++i, --lines) {
      __builtin_prefetch(hi, 0, 0);
      hi += kLineBytes;
      if (lo) {
        __builtin_prefetch(lo, 0, 0);
        lo += kLineBytes;
      }
    }
  }
};

// What tiles work on: all rows, and the unpacked piece of one panel.
struct Piece {
  const Block& block;
  const int32_t* x;  // of the first row, `stride` steps apart
  int64_t stride;
  const int32_t* start;  // of the first row, `group_stride` apart
  const float* scale;
  const float* scaled_sum;  // null: the weights have no offsets
  int64_t group_stride;
  int groups;
  int group_steps;
  int steps;
  float (*sums)[16];
  NextLines next;
};

// Adds the piece's products with R rows, from row `first` on, to their sums.
template <int R, bool kPairs>
void blocked_tile(Piece& piece, int first) {
  constexpr int kSums = kPairs ? R / 2 : R;
  for (int g = 0; g < piece.groups; ++g) {
    const int from = g * piece.group_steps;
    const int n = piece.steps - from < piece.group_steps ? piece.steps - from : piece.group_steps;
    const int64_t at = first * piece.group_stride + g;
    i32x16 dot[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot[r] = broadcast(piece.start[at + r * piece.group_stride]);
    blocked_dots<R>(piece.x + first * piece.stride + from, piece.stride, piece.block.codes[from], n, dot);
    piece.next.fetch();
    const f32x16 weight_scale = load(piece.block.weight_scale[g]);
    const auto term_of = [&](int r) __attribute__((always_inline)) {
      const i32x16 total = kPairs ? shift_left<8>(dot[2 * r]) + dot[2 * r + 1] : dot[r];
      const int64_t row = kPairs ? 2 * r : r;
      return to_float(total) * (broadcast(piece.scale[at + row * piece.group_stride]) * weight_scale);
    };
    if (piece.scaled_sum) {
      const f32x16 weight_offset = load(piece.block.weight_offset[g]);
#pragma GCC unroll 16
      for (int r = 0; r < kSums; ++r) {
        const int64_t row = kPairs ? 2 * r : r;
        float* sum = piece.sums[first + row];
        const f32x16 offset = broadcast(piece.scaled_sum[at + row * piece.group_stride]) * weight_offset;
        store(sum, load(sum) + (term_of(r) + offset));
      }
      continue;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kSums; ++r) {
      float* sum = piece.sums[first + (kPairs ? 2 * r : r)];
      store(sum, load(sum) + term_of(r));
    }
  }
}

template <bool kPairs>
void blocked_tiles(Piece& piece, int begin, int end) {
  int i = begin;
  const int last = kTileRows == 6 && (end - begin) % 6 == 2 ? end - 8 : end;  // 4 and 4 rows take less than 6 and 2
  for (; i + kTileRows <= last; i += kTileRows) blocked_tile<kTileRows, kPairs>(piece, i);
  if constexpr (kTileRows > 4) {
    for (; i + 4 <= end; i += 4) blocked_tile<4, kPairs>(piece, i);
  }
  for (; i + 2 <= end; i += 2) blocked_tile<2, kPairs>(piece, i);
  if constexpr (!kPairs) {
    if (i < end) blocked_tile<1, false>(piece, i);
  }
}

// Values k..k + values of the rows in order, as steps.
void spread_rows(const MatryoshkaGemm& gemm, const Order& order, int virtual_rows, int64_t k, int values,
                 Block& block) {
  const QuantizedRows& q = gemm.x;
  const int64_t stride = values / kStepValues, groups = (values + q.group - 1) / q.group, group0 = k / q.group;
  for (int i = 0; i < order.all; ++i) {
    const int64_t row = order.row[i];
    const int8_t* high = q.q + row * q.k_padded + k;
    const int8_t* low = q.q_low ? q.q_low + row * q.k_padded + k : nullptr;
    int32_t* x = block.x + i * virtual_rows * stride;
    spread_row(high, low, values, x);
    if (virtual_rows == 2) spread_row(low, nullptr, values, x + stride);
    const int64_t at = i * virtual_rows * groups, last = at + (virtual_rows - 1) * groups;
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t sum = q.sum[row * q.groups + group0 + g];
      block.scale[at + g] = q.scale[row * q.groups + group0 + g];
      block.scaled_sum[at + g] = static_cast<float>(sum) * block.scale[at + g];
      block.scale[at + g] *= gemm.w.unit();
      block.start[at + g] = 0;
      block.start[last + g] = -(i < order.four ? gemm.w.zero4() : gemm.w.zero8()) * sum;
    }
  }
}

// Adds the products of values k..k + values with one panel to the sums.
void blocked_panel(const MatryoshkaGemm& gemm, const Order& order, int virtual_rows, int64_t index, bool last,
                   int64_t k, int values, Block& block, float (*sums)[16]) {
  const QuantizedRows& q = gemm.x;
  const Panel panel = panel_of(gemm, index);
  const bool pairs = virtual_rows == 2;
  const int64_t groups = (values + q.group - 1) / q.group;
  const int rows = order.all * virtual_rows;
  alignas(64) uint8_t wide[2][kPieceValues / 8 * kLineBytes];
  Piece piece{block,  block.x, values / kStepValues,  block.start, block.scale, nullptr,
              groups, 0,       q.group / kStepValues, 0,           sums,        {}};
  // Pieces of about one size, so that each has the time to fetch the next.
  const int64_t pieces = (values + kPieceValues - 1) / kPieceValues;
  const int size = static_cast<int>((groups + pieces - 1) / pieces * q.group);
  for (int from = 0; from < values; from += size) {
    const int n = values - from < size ? values - from : size;
    const int lines = n / 8;
    const int64_t line = (k + from) / 8, group = from / q.group;
    piece.x = block.x + from / kStepValues;
    piece.start = block.start + group;
    piece.scale = block.scale + group;
    piece.scaled_sum = panel.offset ? block.scaled_sum + group : nullptr;
    piece.groups = (n + q.group - 1) / q.group;
    piece.steps = n / kStepValues;
    for (int g = 0; g < piece.groups; ++g) {
      const int64_t of_panel = k / q.group + group + g;
      store(block.weight_scale[g], halves_of(panel, panel.scale, of_panel));
      if (panel.offset) store(block.weight_offset[g], halves_of(panel, panel.offset, of_panel));
    }
    const uint8_t* hi = lines_of(panel.hi, panel.rows, line, lines, wide[0]);
    const uint8_t* lo = nullptr;
    if (order.all > order.four) lo = lines_of(panel.lo, panel.rows, line, lines, wide[1]);
    if (panel.rows < 16 || (last && from + n == values)) {
      piece.next = {};
    } else {  // the next piece is this panel's or the next panel's first one
      const bool first = from + n == values;
      const int left = first ? values : values - from - n;
      const int64_t next = first ? (q.k_padded - from) / 8 * kLineBytes : int64_t{lines} * kLineBytes;
      piece.next = {hi + next, lo ? lo + next : nullptr, (left < size ? left : size) / 8};
    }
    const int calls = (rows + kTileRows - 1) / kTileRows * piece.groups;  // at least so many
    piece.next.each = (piece.next.lines + calls - 1) / calls;
    for (int eight = 0; eight < 2; ++eight) {
      const int first = (eight ? order.four : 0) * virtual_rows;
      const int end = (eight ? order.all : order.four) * virtual_rows;
      if (first == end) continue;
      if (eight) {
        unpack_lines<true>(hi, lo, lines, block.codes[0]);
      } else {
        unpack_lines<false>(hi, nullptr, lines, block.codes[0]);
      }
      (pairs ? blocked_tiles<true> : blocked_tiles<false>)(piece, first, end);
    }
  }
}

void blocked_panels(const MatryoshkaGemm& gemm, int64_t begin, int64_t end) {
  const QuantizedRows& q = gemm.x;
  const int virtual_rows = QS_VNNI && q.q_low != nullptr ? 2 : 1;
  Block block;
  for (int64_t row0 = 0; row0 < q.rows; row0 += kBlockRows / virtual_rows) {
    const int64_t left = q.rows - row0;
    const int64_t rows = left < kBlockRows / virtual_rows ? left : kBlockRows / virtual_rows;
    const Order order = order_rows(gemm, row0, row0 + rows, block.row);
    const int count = order.all * virtual_rows;
    // As much of K as there is room for: of few rows all, and then their weights are read from first to last.
    const int64_t room = kBlockSteps / count * kStepValues / kPieceValues * kPieceValues;
    const int64_t panels = kBlockSums / count;
    for (int64_t p = begin; p < end; p += panels) {
      const int64_t last = end - p < panels ? end : p + panels;
      memset(block.sums, 0, sizeof block.sums[0] * static_cast<size_t>((last - p) * count));
      for (int64_t k = 0; k < q.k_padded; k += room) {
        const int values = static_cast<int>(q.k_padded - k < room ? q.k_padded - k : room);
        if (p == begin || room < q.k_padded) spread_rows(gemm, order, virtual_rows, k, values, block);
        for (int64_t j = p; j < last; ++j) {
          blocked_panel(gemm, order, virtual_rows, j, j + 1 == end, k, values, block, block.sums + (j - p) * count);
        }
      }
      for (int i = 0; i < order.all; ++i) {  // a row's panels lie side by side
        for (int64_t j = p; j < last; ++j) {
          write_out(gemm, panel_of(gemm, j), block.row[i], load(block.sums[(j - p) * count + i * virtual_rows]));
        }
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
      return {panel.hi, any_eight(params[i]) ? panel.lo : nullptr,
              params[i].x.k_padded / 2 * (params[i].w.n - panel.n)};
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
      const bool few = params[i].x.rows <= most_direct_rows(params[i]);
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
    delta.gemm_macs += gemm.x.rows * gemm.x.k * gemm.w.n;
    const int64_t plane = gemm.w.n * gemm.x.k_padded / 2;
    delta.weight_bytes_read += plane * (any_eight(gemm) ? 2 : 1) + gemm.w.n * gemm.x.groups * (gemm.w.offset ? 4 : 2) +
                               (gemm.bias ? gemm.w.n * 4 : 0);
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
