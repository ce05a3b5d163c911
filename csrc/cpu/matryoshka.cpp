// GEMM of INT8 rows with INT8 or INT4 Matryoshka weights.
//
// Few rows read the packed planes directly: one pass over the bytes, which is all that decoding costs. Many rows work
// on pieces of panels that are unpacked into the cache. Both give a row the same integers and the same order of fp32
// operations.
#include <cstdlib>

#include "gemm_micro.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

bool has_eight(const int32_t* bits, int64_t i) { return bits == nullptr || bits[i] == 8; }

bool any_eight(const MatryoshkaGemm& gemm) {
  if (gemm.w.lo == nullptr) return false;
  for (int64_t i = 0; i < gemm.x.rows; ++i) {
    if (has_eight(gemm.bits, i)) return true;
  }
  return false;
}

// Sixteen rows of the weight, or those of the last panel.
struct Panel {
  const uint8_t* hi;
  const uint8_t* lo;
  const uint16_t* scale;
  const uint16_t* offset;
  int64_t n;  // first row
  int rows;
};

Panel panel_of(const MatryoshkaGemm& gemm, int64_t index) {
  const int64_t n = index * 16;
  const int64_t bytes = gemm.x.k_padded / 2 * n;
  return {gemm.w.hi + bytes,
          gemm.w.lo ? gemm.w.lo + bytes : nullptr,
          gemm.w.scale + gemm.x.groups * n,
          gemm.w.offset + gemm.x.groups * n,
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
  uint16_t wide[16] = {};
  memcpy(wide, halves + group * panel.rows, static_cast<size_t>(panel.rows) * 2);
  return load_half(wide);
}

QS_INLINE void write_out(const MatryoshkaGemm& gemm, const Panel& panel, int64_t i, f32x16 acc) {
  const int64_t at = (gemm.out_index ? gemm.out_index[i] : i) * gemm.y_stride + panel.n;
  if (gemm.bias) acc = acc + load(gemm.bias + panel.n, panel.rows);
  if (gemm.residual) acc = load(gemm.residual + at, panel.rows) + acc;
  store(gemm.y + at, acc, panel.rows);
}

// `count` in tiles of nearly the same size, of `most` at most: a small one at the end would waste registers.
template <class Body>
QS_INLINE void in_tiles(int begin, int end, int most, const Body& body) {
  const int count = end - begin, tiles = (count + most - 1) / most;
  for (int i = 0; i < tiles; ++i) {
    const int first = begin + count * i / tiles;
    body(first, begin + count * (i + 1) / tiles - first);
  }
}

// Whether group g is the last of its segment; g goes up by one from call to call, `segment` starts at 0.
QS_INLINE bool ends_segment(int64_t g, int64_t groups, int& segment) {
  while (segment_begin(segment + 1, groups) <= g) ++segment;
  return segment_begin(segment + 1, groups) == g + 1;
}

// A worker's memory, which it keeps.
struct Scratch {
  char* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

char* scratch(size_t bytes) {
  static thread_local Scratch own;
  if (own.bytes < bytes) {
    std::free(own.memory);
    own.bytes = 0;
    own.memory = static_cast<char*>(std::aligned_alloc(kLineBytes, bytes));
    if (own.memory == nullptr) std::abort();
    own.bytes = bytes;
  }
  return own.memory;
}

size_t to_lines(int64_t bytes) { return static_cast<size_t>((bytes + kLineBytes - 1) / kLineBytes * kLineBytes); }

// Rows of x in the order in which they are worked on, those of 4 bits first, and what their sums are made with: by
// group and row.
struct Batch {
  int32_t* row;
  int four = 0, all = 0;
  int64_t groups = 0;
  float* scale;       // of a code
  float* scaled_sum;  // what a weight's offset is multiplied by
  int32_t* start;     // of the dot products of 8 bits

  static size_t bytes(int64_t rows, int64_t groups) { return to_lines(rows * 4) + 3 * to_lines(rows * groups * 4); }

  // Of rows begin..end, in `memory`.
  Batch(const MatryoshkaGemm& gemm, int64_t begin, int64_t end, char* memory) : groups(gemm.x.groups) {
    const QuantizedRows& q = gemm.x;
    const size_t each = to_lines((end - begin) * groups * 4);
    scale = reinterpret_cast<float*>(memory);
    scaled_sum = reinterpret_cast<float*>(memory + each);
    start = reinterpret_cast<int32_t*>(memory + 2 * each);
    row = reinterpret_cast<int32_t*>(memory + 3 * each);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t i = begin; i < end; ++i) {
        if (has_eight(gemm.bits, i) == (pass == 1)) row[all++] = static_cast<int32_t>(i);
      }
      if (pass == 0) four = all;
    }
    for (int i = 0; i < all; ++i) {
      const int64_t from = row[i] * groups;
      for (int64_t g = 0; g < groups; ++g) {
        const float of_x = q.scale[from + g];
        scale[at(g, i)] = of_x * kCodeUnit;
        scaled_sum[at(g, i)] = static_cast<float>(q.sum[from + g]) * of_x;
        start[at(g, i)] = -kStepCodes * q.sum[from + g];
      }
    }
  }

  int64_t at(int64_t group, int64_t i) const { return group * all + i; }

  // How many rows have 4 bits with this weight.
  int fours(const MatryoshkaGemm& gemm) const { return gemm.w.lo ? four : all; }
};

// The sums of a row, and what a group adds to them; scale and sum are the row's in that group.
QS_INLINE f32x16 add_group(const f32x16& acc, const i32x16& dot, const f32x16& scale, const f32x16& sum,
                           const f32x16& w_scale, const f32x16& w_offset) {
  return fma(sum, w_offset, fma(to_float(dot), scale * w_scale, acc));
}

// body(gemm, begin, end) for a worker's panels of each product.
template <class Body>
QS_INLINE void each_product(const MatryoshkaGemm* params, int count, Range part, const Body& body) {
  for (int i = 0; i < count; ++i) {
    const int64_t own = (params[i].w.n + 15) / 16;
    const int64_t begin = part.begin < 0 ? 0 : part.begin, end = part.end < own ? part.end : own;
    if (begin < end) body(params[i], begin, end);
    part = {part.begin - own, part.end - own};
  }
}

#if QS_AVX2
// --- few rows
// ----------------------------------------------------------------------------------------------------------

constexpr int kDirectTile = QS_VNNI ? 8 : 4;  // rows; as many as there are registers for
constexpr int64_t kDirectRows = 64;           // at a time: so many stay in the second-level cache

template <int R, bool kEight>
void direct_tile(const MatryoshkaGemm& gemm, const Batch& batch, const int64_t* x, const Panel& panel, int first) {
  const QuantizedRows& q = gemm.x;
  f32x16 acc[R], total[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r] = total[r] = zeros();
  alignas(64) uint8_t wide[2][16 * kLineBytes];
  int segment = 0;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t k = g * q.group, at = batch.at(g, first);
    const int lines = static_cast<int>(((q.k_padded - k < q.group) ? q.k_padded - k : q.group) / 8);
    const uint8_t* hi = lines_of(panel.hi, panel.rows, k / 8, lines, wide[0]);
    const uint8_t* lo = kEight ? lines_of(panel.lo, panel.rows, k / 8, lines, wide[1]) : nullptr;
    i32x16 dot[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) dot[r] = broadcast(kEight ? batch.start[at + r] : 0);
    direct_dots<R, kEight>(hi, lo, {x + k / 8 * batch.all + first, batch.all}, lines, dot);
    const f32x16 w_scale = halves_of(panel, panel.scale, g), w_offset = halves_of(panel, panel.offset, g);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const f32x16 scale = broadcast(batch.scale[at + r]), sum = broadcast(batch.scaled_sum[at + r]);
      acc[r] = add_group(acc[r], dot[r], scale, sum, w_scale, w_offset);
    }
    if (!ends_segment(g, q.groups, segment)) continue;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      total[r] = total[r] + acc[r];
      acc[r] = zeros();
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) write_out(gemm, panel, batch.row[first + r], total[r]);
}

template <bool kEight>
void direct_rows(const MatryoshkaGemm& gemm, const Batch& batch, const int64_t* x, const Panel& panel, int begin,
                 int end) {
  in_tiles(begin, end, kDirectTile, [&](int first, int rows) {
    with_constant<kDirectTile>(rows, [&]<int R>() { direct_tile<R, kEight>(gemm, batch, x, panel, first); });
  });
}

// How many rows still read the packed planes directly: beyond, unpacking once for all of them costs less. INT4 rows
// gain nothing by that with 16-bit products.
int64_t most_direct_rows(bool eight) { return QS_VNNI ? 8 : eight ? 4 : INT64_MAX; }

void direct_panels(const MatryoshkaGemm* params, int count, Range part) {
  const QuantizedRows& q = params[0].x;
  for (int64_t row0 = 0; row0 < q.rows; row0 += kDirectRows) {
    const int64_t end = q.rows - row0 < kDirectRows ? q.rows : row0 + kDirectRows;
    const int64_t lines = q.k_padded / 8;
    char* memory = scratch(Batch::bytes(end - row0, q.groups) + static_cast<size_t>(lines * (end - row0) * 8));
    const Batch batch(params[0], row0, end, memory);
    // Rows side by side, so that a tile's are where one pointer says.
    int64_t* x = reinterpret_cast<int64_t*>(memory + Batch::bytes(end - row0, q.groups));
    for (int i = 0; i < batch.all; ++i) {
      const int8_t* from = q.q + batch.row[i] * q.k_padded;
      for (int64_t line = 0; line < lines; ++line) memcpy(x + line * batch.all + i, from + line * 8, 8);
    }
    each_product(params, count, part, [&](const MatryoshkaGemm& gemm, int64_t first, int64_t last) {
      const int four = batch.fours(gemm);
      for (int64_t p = first; p < last; ++p) {
        const Panel panel = panel_of(gemm, p);
        direct_rows<false>(gemm, batch, x, panel, 0, four);
        direct_rows<true>(gemm, batch, x, panel, four, batch.all);
      }
    });
  }
}
#endif

// --- many rows
// ---------------------------------------------------------------------------------------------------------

constexpr int kTileRows = QS_AVX512 ? 12 : QS_AVX2 ? 6 : 2;  // as many as there are registers for
constexpr int kPieceSteps = 128;
constexpr int kPieceValues = kPieceSteps * kStepValues;  // of K, unpacked at once; a multiple of every group size
constexpr int kPieceGroups = kPieceValues / 32;

// What is added up of a row: the segment, and those before it.
struct Sums {
  alignas(64) float segment[kPanels][16];
  alignas(64) float total[kPanels][16];
};

// A piece of kPanels panels, unpacked: it stays in the first-level cache.
struct Unpacked {
  alignas(64) int32_t codes[kPieceSteps][kPanels][16];
  alignas(64) float scale[kPieceGroups][kPanels][16];
  alignas(64) float offset[kPieceGroups][kPanels][16];
};

// The lines of packed weights that are wanted next. Tiles fetch some after each group, so that the memory works while
// the arithmetic does.
struct NextLines {
  const uint8_t* plane[2 * kPanels];
  int planes = 0;
  int lines = 0;
  int each = 0;  // per call

  QS_INLINE_MEMBER void fetch() {
    for (int i = 0; i < each && lines > 0; ++i, --lines) {
      for (int j = 0; j < planes; ++j) {
        __builtin_prefetch(plane[j], 0, 2);
        plane[j] += kLineBytes;
      }
    }
  }
};

// What tiles work on: all rows, and one piece.
struct Piece {
  const Unpacked& weights;
  const Batch& batch;
  const int32_t* x;  // of the first row; the next one's follows kPieceSteps later
  int64_t group;     // the first
  int groups;
  int group_steps;
  int steps;
  uint32_t begins;  // bit g: that group is its segment's first
  uint32_t ends;    // its last
  Sums* sums;       // of the first row
  const MatryoshkaGemm* gemm;
  const Panel* panel;
  bool last;  // of K: sums are written out, tile by tile, so that memory has time for it
  NextLines next;
};

// Adds the piece's products with R rows, from row `first` on, to their sums.
template <int R, int kP, bool kEight>
void blocked_tile(Piece& piece, int first) {
  const Batch& batch = piece.batch;
  for (int g = 0; g < piece.groups; ++g) {
    const int from = g * piece.group_steps;
    const int n = piece.steps - from < piece.group_steps ? piece.steps - from : piece.group_steps;
    const int64_t at = batch.at(piece.group + g, first);
    i32x16 dot[R][kP];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const i32x16 start = broadcast(kEight ? batch.start[at + r] : 0);
#pragma GCC unroll 2
      for (int p = 0; p < kP; ++p) dot[r][p] = start;
    }
    blocked_dots<R, kP>(piece.x + first * kPieceSteps + from, kPieceSteps, piece.weights.codes[from][0], n, dot);
    piece.next.fetch();
    // Copies of what memory says, which would be read again after each store.
    const float* const scale = batch.scale + at;
    const float* const scaled_sum = batch.scaled_sum + at;
    Sums* const sums = piece.sums + first;
    f32x16 w_scale[kP], w_offset[kP];
#pragma GCC unroll 2
    for (int p = 0; p < kP; ++p) {
      w_scale[p] = load(piece.weights.scale[g][p]);
      w_offset[p] = load(piece.weights.offset[g][p]);
    }
    // One load and one store of a sum, whichever groups a segment has.
    const auto add_up = [&]<bool kBegins, bool kEnds>() __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const f32x16 of_x = broadcast(scale[r]), sum_of_x = broadcast(scaled_sum[r]);
#pragma GCC unroll 2
        for (int p = 0; p < kP; ++p) {
          float* const segment = sums[r].segment[p];
          float* const total = sums[r].total[p];
          const f32x16 before = kBegins ? zeros() : load(segment);
          const f32x16 acc = add_group(before, dot[r][p], of_x, sum_of_x, w_scale[p], w_offset[p]);
          kEnds ? store(total, load(total) + acc) : store(segment, acc);
        }
      }
    };
    const bool begins = piece.begins >> g & 1, ends = piece.ends >> g & 1;
    if (begins && ends) {
      add_up.template operator()<true, true>();
    } else if (begins) {
      add_up.template operator()<true, false>();
    } else if (ends) {
      add_up.template operator()<false, true>();
    } else {
      add_up.template operator()<false, false>();
    }
  }
  if (!piece.last) return;
  for (int r = first; r < first + R; ++r) {
    for (int p = 0; p < kP; ++p) write_out(*piece.gemm, piece.panel[p], batch.row[r], load(piece.sums[r].total[p]));
  }
}

template <int kP, bool kEight>
void blocked_tiles(Piece& piece, int begin, int end) {
  in_tiles(begin, end, kTileRows, [&](int first, int rows) {
    with_constant<kTileRows>(rows, [&]<int R>() { blocked_tile<R, kP, kEight>(piece, first); });
  });
}

// Products of the batch with kP panels from `index` on, of a worker's `left`.
template <int kP>
void blocked_panels(const MatryoshkaGemm& gemm, const Batch& batch, const int32_t* x, int64_t index, int64_t left,
                    Unpacked& unpacked, Sums* sums) {
  const QuantizedRows& q = gemm.x;
  const int four = batch.fours(gemm);
  Panel panel[kP];
  for (int p = 0; p < kP; ++p) panel[p] = panel_of(gemm, index + p);
  memset(sums, 0, sizeof(Sums) * static_cast<size_t>(batch.all));
  alignas(64) uint8_t wide[2][kPieceValues / 8 * kLineBytes];
  Piece piece{unpacked, batch, x, 0, 0, q.group / kStepValues, 0, 0, 0, sums, &gemm, panel, false, {}};
  int segment = 0;
  bool begins = true;
  for (int64_t k = 0; k < q.k_padded; k += kPieceValues) {
    const int values = q.k_padded - k < kPieceValues ? static_cast<int>(q.k_padded - k) : kPieceValues;
    const int lines = values / 8;
    piece.group = k / q.group;
    piece.groups = (values + q.group - 1) / q.group;
    piece.steps = values / kStepValues;
    piece.begins = piece.ends = 0;
    for (int g = 0; g < piece.groups; ++g) {
      const bool ends = ends_segment(piece.group + g, q.groups, segment);
      piece.begins |= static_cast<uint32_t>(begins) << g;
      piece.ends |= static_cast<uint32_t>(ends) << g;
      begins = ends;
      for (int p = 0; p < kP; ++p) {
        store(unpacked.scale[g][p], halves_of(panel[p], panel[p].scale, piece.group + g));
        store(unpacked.offset[g][p], halves_of(panel[p], panel[p].offset, piece.group + g));
      }
    }
    // The next piece is these panels', or the next ones' first.
    const bool last = k + values == q.k_padded;
    piece.last = last;
    piece.next = {};
    if (!last || left > kP) {
      const int64_t ahead = last ? kP * q.k_padded / 2 * 16 : 0, line = last ? 0 : k / 8 + lines;
      for (int p = 0; p < kP && p < (last ? left - kP : kP); ++p) {
        if (panel[p].rows < 16) continue;
        piece.next.plane[piece.next.planes++] = panel[p].hi + ahead + line * kLineBytes;
        if (four < batch.all) piece.next.plane[piece.next.planes++] = panel[p].lo + ahead + line * kLineBytes;
      }
      const int64_t rest = last ? q.k_padded : q.k_padded - k - values;
      piece.next.lines = static_cast<int>((rest < kPieceValues ? rest : kPieceValues) / 8);
      const int calls = (batch.all + kTileRows - 1) / kTileRows * piece.groups;  // at least so many
      piece.next.each = (piece.next.lines + calls - 1) / calls;
    }
    for (int eight = 0; eight < 2; ++eight) {
      const int begin = eight ? four : 0, end = eight ? batch.all : four;
      if (begin == end) continue;
      for (int p = 0; p < kP; ++p) {
        const uint8_t* hi = lines_of(panel[p].hi, panel[p].rows, k / 8, lines, wide[0]);
        if (eight) {
          const uint8_t* lo = lines_of(panel[p].lo, panel[p].rows, k / 8, lines, wide[1]);
          unpack_lines<true>(hi, lo, lines, unpacked.codes[0][p]);
        } else {
          unpack_lines<false>(hi, nullptr, lines, unpacked.codes[0][p]);
        }
      }
      (eight ? blocked_tiles<kP, true> : blocked_tiles<kP, false>)(piece, begin, end);
    }
    piece.x += batch.all * kPieceSteps;
  }
}

// Rows that are worked on at once: as many as leave half of the second-level cache to weights and sums. Fewer than this
// many would unpack too often; then x comes from the third level, in order, tile by tile.
constexpr int64_t kLeastRows = 96;
constexpr int64_t kMostRows = 512;

int64_t block_rows(const QuantizedRows& q) {
  const int64_t each = (q.k_padded + kPieceValues - 1) / kPieceValues * kPieceSteps * 4;
  int64_t rows = second_level_cache() / 2 / each;
  rows = rows < kLeastRows ? kLeastRows : rows > kMostRows ? kMostRows : rows;
  const int64_t blocks = (q.rows + rows - 1) / rows;
  return (q.rows + blocks - 1) / blocks;
}

void blocked(const MatryoshkaGemm* params, int count, Range part) {
  const QuantizedRows& q = params[0].x;
  const int64_t rows = block_rows(q), pieces = (q.k_padded + kPieceValues - 1) / kPieceValues;
  const size_t x_bytes = static_cast<size_t>(rows * pieces * kPieceSteps * 4),
               sum_bytes = static_cast<size_t>(rows) * sizeof(Sums);
  char* memory = scratch(sizeof(Unpacked) + x_bytes + sum_bytes + Batch::bytes(rows, q.groups));
  Unpacked& unpacked = *reinterpret_cast<Unpacked*>(memory);
  int32_t* x = reinterpret_cast<int32_t*>(memory + sizeof(Unpacked));
  Sums* sums = reinterpret_cast<Sums*>(memory + sizeof(Unpacked) + x_bytes);
  for (int64_t row0 = 0; row0 < q.rows; row0 += rows) {
    const int64_t end = q.rows - row0 < rows ? q.rows : row0 + rows;
    const Batch batch(params[0], row0, end, memory + sizeof(Unpacked) + x_bytes + sum_bytes);
    int32_t* to = x;
    for (int64_t k = 0; k < q.k_padded; k += kPieceValues) {
      const int64_t values = q.k_padded - k < kPieceValues ? q.k_padded - k : kPieceValues;
      for (int i = 0; i < batch.all; ++i, to += kPieceSteps) {
        spread_row(q.q + batch.row[i] * q.k_padded + k, values, to);
      }
    }
    each_product(params, count, part, [&](const MatryoshkaGemm& gemm, int64_t begin, int64_t last) {
      int64_t p = begin;
      for (; p + kPanels <= last; p += kPanels) {
        blocked_panels<kPanels>(gemm, batch, x, p, last - p, unpacked, sums);
      }
      for (; p < last; ++p) blocked_panels<1>(gemm, batch, x, p, last - p, unpacked, sums);
    });
  }
}

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
  const Range part = share(params, count, worker, workers);
  if (params[0].x.rows <= 0 || part.begin == part.end) return;
#if QS_AVX2
  bool eight = false;
  for (int i = 0; i < count; ++i) eight = eight || any_eight(params[i]);
  if (params[0].x.rows <= most_direct_rows(eight)) return direct_panels(params, count, part);
#endif
  blocked(params, count, part);
}

void gemm_count(const MatryoshkaGemm* params, int count) {
  Counters delta{};
  for (int i = 0; i < count; ++i) {
    const MatryoshkaGemm& gemm = params[i];
    if (gemm.x.rows == 0) continue;
    delta.gemm_macs += gemm.x.rows * gemm.x.k * gemm.w.n;
    const int64_t plane = gemm.w.n * gemm.x.k_padded / 2;
    delta.weight_bytes_read +=
        plane * (any_eight(gemm) ? 2 : 1) + gemm.w.n * gemm.x.groups * 4 + (gemm.bias ? gemm.w.n * 4 : 0);
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
