// The decode GEMM: up to kDecodeRows rows, bound by the weights' bytes. One kernel for the plain product and for the
// stages around it, which say what happens before (Stage::perform) and after (write, finish, conclude).
//
// A block has 32 output columns, two panels of 16, and all of the rows; a warp has one of the eight segments of K, and
// goes through it alone. Of a piece of 32 values of K a lane's 16 bytes are four columns' codes of eight values each,
// just what it has of the first factor of two MMAs: so it loads them to registers, four pieces ahead, from the block's
// first instructions on, so that they are under way while rows are still being normalized and quantized. The weight is
// laid out for the CPU and the GPU alike. At the end the segments' sums meet in shared memory. So a row's bits are the
// CPU's, and depend on no other row.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "quantize.cuh"
#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA::decode {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPanelRows = 16;  // of a weight: columns of the output
constexpr int kColumns = 2 * kPanelRows;
constexpr int kTileRows = 8;  // rows of x that an MMA takes
constexpr int kPieceValues = 32;
constexpr int kAhead = 4;  // pieces

static_assert(kThreads == kQuantizeThreads, "rows are quantized by the blocks that multiply");
static_assert(kWarps == kSegments);

// Places in the counters, apart so that blocks arriving at one don't slow those at another.
constexpr int kFinished = 64;
constexpr int kHeads = 96;

// Sixteen rows of a weight, or those of the last panel; none past it.
struct Panel {
  const uint8_t* hi = nullptr;
  const uint8_t* lo = nullptr;
  const uint16_t* scale = nullptr;
  const uint16_t* offset = nullptr;
  int64_t column = 0;  // of the output, the panel's first
  int32_t rows = 0;
};

// Panel `index` of a weight that rows like x are multiplied with.
QS_DEVICE Panel panel_of(const MatryoshkaWeight& w, const QuantizedRows& x, int64_t index) {
  const int64_t column = index * kPanelRows, left = w.n - column, bytes = x.k_padded / 2 * column;
  return {w.hi + bytes,
          w.lo ? w.lo + bytes : nullptr,
          w.scale + x.groups * column,
          w.offset + x.groups * column,
          column,
          static_cast<int32_t>(maximum(minimum(left, kPanelRows), 0))};
}

inline int64_t panels_of(const MatryoshkaWeight& w) { return (w.n + kPanelRows - 1) / kPanelRows; }
inline int64_t tiles_of(const MatryoshkaWeight& w) { return (w.n + kColumns - 1) / kColumns; }

// What every stage has. A stage adds:
//   kPaired                        whether a block's panels are the same columns of two weights, not two of one weight
//   panel(p)                       the block's panels, p = 0 and 1
//   write(i, column, y, valid)     takes that column of output row i, without bias (kPaired: of both weights), by whole
//                                  warps: lanes 16h .. 16h + 15 have one panel's columns, perhaps not all `valid`
//   kPerforms                      whether there is work before and after, by whole blocks. Then also
//   tasks(count)                   how many pieces the work before has
//   perform(task, count, scratch)  one of them; all are complete before any block reads x
//   finish(begin, end, count, scratch)  after the block has written columns begin .. end - 1
//   conclude(count, scratch)       by the last block, when all have written; where there is something to conclude
// `scratch` is kScratchBytes of shared memory.
struct Gemm {
  QuantizedRows x;                        // `rows` is the bound
  const int32_t* device_count = nullptr;  // [1], or null: the bound
  const int32_t* bits = nullptr;          // null: all that the weight has
  const int32_t* bits_index = nullptr;    // of row i the bits are bits[bits_index[i]], or where null bits[i]
  int32_t* counters = nullptr;
};

constexpr int kScratchBytes = 8192;

// A block's shared memory: the segments' sums, float [kWarps][rows][kStride], where before there is room for `scratch`.
template <int kTiles>
struct Shared {
  static constexpr int kStride = kColumns + 4;  // so that the lanes of a store are in banks of their own
  static constexpr int kOfWarp = kTiles * kTileRows * kStride;
  static constexpr int kFlag = kWarps * kOfWarp * 4;
  static constexpr int kBytes = kFlag + 16;
  static_assert(kFlag >= kScratchBytes);
};

// A lane's part of a piece. Of the panel g / 4 it has rows 4 * (g % 4) and three more, of each a word a plane: values
// 8t .. 8t + 7 of K, 4 in the low nibbles and 4 in the high. Of the tiles of x it has the same values of row g.
template <int kTiles>
struct Piece {
  uint4 high = {}, low = {};
  uint2 x[kTiles] = {};
};

// A lane's part of a group's scales: those of its four rows of the panel, and of each tile's rows 2t and 2t + 1.
template <int kTiles>
struct Scales {
  uint2 weight = {}, offset = {};
  float x[kTiles][2] = {};
  int32_t sum[kTiles][2] = {};
};

// A warp's segment of the panels and the rows, in pieces and groups. Past its end, x is zero. What else there is none
// of, codes there and past a narrow panel's rows, is whatever there was before: nobody takes those results.
template <int kTiles>
class Segment {
 public:
  QS_DEVICE Segment(const Panel (&panels)[2], const QuantizedRows& x)
      : groups_(static_cast<int32_t>(x.groups)),
        group_(first_of_segment(warp(), x.groups)),
        last_(first_of_segment(warp() + 1, x.groups)) {
    const int chunk = lane() / 4 % 4;
    const Panel panel = lane() < kWarp / 2 ? panels[0] : panels[1];
    k_ = group_ * x.group + lane() % 4 * 8;
    end_ = minimum(last_ * x.group, static_cast<int32_t>(x.k_padded));
    width_ = static_cast<int32_t>(x.k_padded);
    rows_of_panel_ = panel.rows;
    words_ = maximum(0, minimum(panel.rows - chunk * 4, 4));
    const int64_t before = static_cast<int64_t>(k_ / 8) * panel.rows * 4 + chunk * 16;
    high_ = panel.hi + before;
    low_ = panel.lo ? panel.lo + before : nullptr;
    scale_ = panel.scale + group_ * panel.rows + chunk * 4;
    offset_ = panel.offset + group_ * panel.rows + chunk * 4;
  }

  QS_DEVICE int32_t groups() const { return last_ - group_; }

  // The low plane is left out where no row wants it. A weight that has none is at its nibbles' zero.
  QS_DEVICE void use_low(bool wanted) {
    if (!wanted) low_ = nullptr;
    missing_ = wanted ? 0x88888888u : 0;
  }
  // Rows there are none of are the last one again.
  QS_DEVICE void use_rows(int32_t count) {
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      x_at_[t] = minimum(t * kTileRows + lane() / 4, count - 1) * width_ + k_;
      QS_UNROLL
      for (int i = 0; i < 2; ++i) {
        x_scale_at_[t][i] = minimum(t * kTileRows + lane() % 4 * 2 + i, count - 1) * groups_ + group_;
      }
    }
  }

  // Piece `ahead` from here. kWhole: both panels have 16 rows.
  template <bool kWhole>
  QS_DEVICE void load_high(Piece<kTiles>& piece, int ahead) const {
    load_plane<kWhole>(piece.high, high_, ahead);
  }
  template <bool kWhole>
  QS_DEVICE void load_low(Piece<kTiles>& piece, int ahead) const {
    if (kWhole || low_) return load_plane<kWhole>(piece.low, low_, ahead);
    piece.low = make_uint4(missing_, missing_, missing_, missing_);
  }
  QS_DEVICE void load_rows(const QuantizedRows& x, Piece<kTiles>& piece, int ahead) const {
    const bool inside = k_ + ahead * kPieceValues < end_;
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int8_t* const from = x.q + x_at_[t] + ahead * kPieceValues;
      piece.x[t] = inside ? load(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
    }
  }

  // Those of the weight, and of the rows, of group `ahead` from here.
  template <bool kWhole>
  QS_DEVICE void load_weight_scales(Scales<kTiles>& scales, int ahead) const {
    if (group_ + ahead >= last_) return;
    scales.weight = four_halves<kWhole>(scale_ + ahead * rows_of_panel_);
    scales.offset = four_halves<kWhole>(offset_ + ahead * rows_of_panel_);
  }
  QS_DEVICE void load_row_scales(const QuantizedRows& x, Scales<kTiles>& scales, int ahead) const {
    if (group_ + ahead >= last_) return;
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      QS_UNROLL
      for (int i = 0; i < 2; ++i) {
        scales.x[t][i] = load(x.scale + x_scale_at_[t][i] + ahead);
        scales.sum[t][i] = load(x.sum + x_scale_at_[t][i] + ahead);
      }
    }
  }

  // By kAhead pieces, which are so many groups.
  template <bool kWhole>
  QS_DEVICE void advance(int groups) {
    const int lines = kAhead * kPieceValues / 8;
    k_ += kAhead * kPieceValues;
    high_ += lines * line_bytes<kWhole>();
    if (low_) low_ += lines * line_bytes<kWhole>();
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      x_at_[t] += kAhead * kPieceValues;
      x_scale_at_[t][0] += groups;
      x_scale_at_[t][1] += groups;
    }
    group_ += groups;
    scale_ += groups * (kWhole ? kPanelRows : rows_of_panel_);
    offset_ += groups * (kWhole ? kPanelRows : rows_of_panel_);
  }

 private:
  template <bool kWhole>
  QS_DEVICE int line_bytes() const {
    return kWhole ? 4 * kPanelRows : 4 * rows_of_panel_;
  }
  template <bool kWhole>
  QS_DEVICE void load_plane(uint4& words, const uint8_t* plane, int ahead) const {
    const uint8_t* const from = plane + ahead * (kPieceValues / 8) * line_bytes<kWhole>();
    const bool inside = k_ + ahead * kPieceValues < end_;
    if (kWhole || rows_of_panel_ == kPanelRows) {
      return load_once_if(inside, reinterpret_cast<const uint4*>(from), words);
    }
    if (!inside) return;
    const uint32_t* const word = reinterpret_cast<const uint32_t*>(from);
    if (words_ > 0) words.x = load_once(word);
    if (words_ > 1) words.y = load_once(word + 1);
    if (words_ > 2) words.z = load_once(word + 2);
    if (words_ > 3) words.w = load_once(word + 3);
  }
  template <bool kWhole>
  QS_DEVICE uint2 four_halves(const uint16_t* from) const {
    if (kWhole || rows_of_panel_ == kPanelRows) return load_once(reinterpret_cast<const uint2*>(from));
    uint32_t pairs[2] = {};
    QS_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < words_) pairs[i / 2] |= static_cast<uint32_t>(load_once(from + i)) << i % 2 * 16;
    }
    return make_uint2(pairs[0], pairs[1]);
  }

  int32_t groups_, group_, last_;  // all of them, the next one, the segment's end
  int32_t k_, end_, width_;        // this lane's first value of the next piece; the segment's end; the row's
  int32_t rows_of_panel_, words_;
  const uint8_t *high_, *low_;  // of this lane's panel
  const uint16_t *scale_, *offset_;
  int32_t x_at_[kTiles] = {}, x_scale_at_[kTiles][2] = {};
  uint32_t missing_ = 0;  // what stands for a word of the low plane where there is none
};

enum class How { any, both, high };  // a block's codes, see decode_kernel

// What comes before the product: a block for each piece of it.
template <class Stage>
QS_KERNEL void __launch_bounds__(kThreads) rows_kernel(const Stage stage) {
  launch_next();
  wait_for_launch_before();
  int32_t count = static_cast<int32_t>(stage.x.rows);
  if (stage.device_count) count = minimum(count, load(stage.device_count));
  const int32_t task = static_cast<int32_t>(blockIdx.x);
  if (count > 0 && task < stage.tasks(count)) stage.perform(task, count, shared_memory<float>());
}

// kSteps: pieces of a group, 1, 2 or 4.
template <class Stage, int kTiles, int kSteps>
QS_KERNEL void __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1) decode_kernel(const Stage stage) {
  using Layout = Shared<kTiles>;
  constexpr int kGroups = kAhead / kSteps;  // ahead
  float* const exchange = shared_memory<float>();
  void* const scratch = exchange;

  launch_next();
  const Panel panels[2] = {stage.panel(0), stage.panel(1)};
  Segment<kTiles> segment(panels, stage.x);
  Piece<kTiles> next[kAhead];
  Scales<kTiles> scales[kGroups];
  QS_UNROLL
  for (int i = 0; i < kAhead; ++i) segment.template load_high<false>(next[i], i);
  const bool has_low = panels[0].lo || panels[1].lo, all_of_both = has_low && stage.bits == nullptr;
  const auto load_low = [&](bool wanted) {
    segment.use_low(wanted);
    QS_UNROLL
    for (int i = 0; i < kAhead; ++i) segment.template load_low<false>(next[i], i);
  };
  if (all_of_both) load_low(true);
  QS_UNROLL
  for (int i = 0; i < kGroups; ++i) segment.template load_weight_scales<false>(scales[i], i);
  wait_for_launch_before();  // from here on, what was written before may be read

  // Rows of x up to the bound, so that their loads don't wait for the count.
  segment.use_rows(static_cast<int32_t>(stage.x.rows));
  QS_UNROLL
  for (int i = 0; i < kAhead; ++i) segment.load_rows(stage.x, next[i], i);
  QS_UNROLL
  for (int i = 0; i < kGroups; ++i) segment.load_row_scales(stage.x, scales[i], i);
  int32_t count = static_cast<int32_t>(stage.x.rows);
  if (stage.device_count) count = minimum(count, load(stage.device_count));
  if (count <= 0) return;
  bool eight = lane() < count;
  if (eight && stage.bits) {
    eight = load(stage.bits + (stage.bits_index ? load(stage.bits_index + lane()) : lane())) == 8;
  }
  const uint32_t eights = has_low ? ballot(eight) : 0;
  const bool mixed = eights != 0 && eights != ballot(lane() < count);
  if (!all_of_both) load_low(eights != 0);

  // In fragments lane 4g + t has weight rows 4g + 2m and 4g + 2m + 1 of MMA m, and values 8t .. 8t + 7 of a piece of
  // them and of row g of x; it gets those weight rows' products with rows 2t and 2t + 1.
  const int g = lane() / 4, t4 = lane() % 4;
  const auto has_tile = [&](int t) { return t == 0 || t * kTileRows < count; };  // the same for the whole block
  float acc[kTiles][4][2] = {};                                                  // [weight row][row of x]

  // kHow says what is known of the block: that its panels are whole, and that all rows want both planes, or only the
  // high one.
  const auto multiply_all = [&]<How kHow>() {
    constexpr bool kWhole = kHow != How::any;
    int32_t dot[kTiles][2][4], start[kTiles][4];
    // An INT8 code's zero is at 8.
    const auto begin_group = [&](const Scales<kTiles>& of) {
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        QS_UNROLL
        for (int i = 0; i < 2; ++i) {
          const bool has_eight = kWhole ? kHow == How::both : eights >> (t * kTileRows + 2 * t4 + i) & 1;
          const uint32_t zero = has_eight ? static_cast<uint32_t>(of.sum[t][i]) * kStepCodes : 0;  // wraps, of no row
          start[t][i] = start[t][2 + i] = static_cast<int32_t>(static_cast<uint32_t>(kMagic) - zero);
        }
      }
    };
    const auto multiply_add = [&](const uint2(&x)[kTiles], const uint32_t (&codes)[2][4], bool begins,
                                  bool eights_alone) {
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!has_tile(t)) continue;
        const uint32_t keep = eights_alone ? 0u - (eights >> (t * kTileRows + g) & 1) : ~0u;
        const uint32_t rows[2] = {x[t].x & keep, x[t].y & keep};
        QS_UNROLL
        for (int m = 0; m < 2; ++m) {
          if (begins) {
            mma_u8s8(dot[t][m], codes[m], rows, start[t]);
          } else {
            mma_u8s8(dot[t][m], codes[m], rows, dot[t][m]);
          }
        }
      }
    };
    const auto take = [&](Piece<kTiles>& piece, int index, bool begins) {
      const uint32_t h[4] = {piece.high.x, piece.high.y, piece.high.z, piece.high.w};
      const uint32_t l[4] = {piece.low.x, piece.low.y, piece.low.z, piece.low.w};
      uint2 x[kTiles];
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) x[t] = piece.x[t];
      uint32_t codes[2][4], low_codes[2][4];
      QS_UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t &first = codes[i / 2][i % 2], &second = codes[i / 2][2 + i % 2];
        first = (h[i] & 0x0f0f0f0f) << 3;
        second = h[i] >> 1 & 0x78787878;
        if (kHow == How::high) continue;
        const uint32_t low_first = l[i] & 0x0f0f0f0f, low_second = (l[i] & 0xf0f0f0f0) >> 4;
        low_codes[i / 2][i % 2] = low_first;
        low_codes[i / 2][2 + i % 2] = low_second;
        if (kWhole || !mixed) {
          first += low_first;  // no sum carries out of its byte
          second += low_second;
        }
      }
      segment.template load_high<kWhole>(piece, index + kAhead);
      if (kHow != How::high) segment.template load_low<kWhole>(piece, index + kAhead);
      segment.load_rows(stage.x, piece, index + kAhead);
      multiply_add(x, codes, begins, false);
      if (!kWhole && mixed) multiply_add(x, low_codes, false, true);  // rows of 4 bits have no low nibbles
    };
    const auto end_group = [&](const Scales<kTiles>& of) {
      const uint32_t pairs[2] = {of.weight.x, of.weight.y}, offsets[2] = {of.offset.x, of.offset.y};
      float w_scale[4], w_offset[4];
      QS_UNROLL
      for (int c = 0; c < 4; ++c) {
        w_scale[c] = half_to_float(static_cast<uint16_t>(pairs[c / 2] >> c % 2 * 16));
        w_offset[c] = half_to_float(static_cast<uint16_t>(offsets[c / 2] >> c % 2 * 16));
      }
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!has_tile(t)) continue;
        QS_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float scaled_sum = mul_rn(static_cast<float>(of.sum[t][i]), of.x[t][i]);
          const float scale = mul_rn(of.x[t][i], kCodeUnit);
          QS_UNROLL
          for (int c = 0; c < 4; ++c) {
            const float sum = without_magic(dot[t][c / 2][c % 2 * 2 + i]);
            float& to = acc[t][c][i];
            to = fma_rn(scaled_sum, w_offset[c], fma_rn(sum, mul_rn(scale, w_scale[c]), to));
          }
        }
      }
    };
    QS_UNROLL_BY(1)
    for (int32_t left = segment.groups(); left > 0; left -= kGroups) {
      QS_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        begin_group(scales[group]);
        QS_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          take(next[group * kSteps + step], group * kSteps + step, step == 0);
        }
        if (group < left) end_group(scales[group]);
        segment.template load_weight_scales<kWhole>(scales[group], group + kGroups);
        segment.load_row_scales(stage.x, scales[group], group + kGroups);
      }
      segment.template advance<kWhole>(kGroups);
    }
  };
  if (mixed || panels[1].rows != kPanelRows || (eights != 0 && !(panels[0].lo && panels[1].lo))) {
    multiply_all.template operator()<How::any>();
  } else if (eights != 0) {
    multiply_all.template operator()<How::both>();
  } else {
    multiply_all.template operator()<How::high>();
  }

  QS_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    QS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = t * kTileRows + 2 * t4 + i;
      if (row >= count) continue;
      float* const to = exchange + warp() * Layout::kOfWarp + row * Layout::kStride + 4 * g;
      store_shared(reinterpret_cast<float4*>(to), make_float4(acc[t][0][i], acc[t][1][i], acc[t][2][i], acc[t][3][i]));
    }
  }
  sync_block();
  float sum[kTiles] = {};
  QS_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    const int row = t * kTileRows + warp();
    if (row >= count) continue;
    QS_UNROLL
    for (int s = 0; s < kSegments; ++s) {
      sum[t] = add_rn(sum[t], load_shared(exchange + s * Layout::kOfWarp + row * Layout::kStride + lane()));
    }
  }
  QS_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    const int row = t * kTileRows + warp(), half = lane() / kPanelRows, column = lane() % kPanelRows;
    if (row >= count) continue;  // the whole warp
    if constexpr (Stage::kPaired) {
      const float both[2] = {sum[t], shuffle_down(sum[t], kPanelRows)};
      stage.write(row, panels[0].column + column, both, half == 0 && column < panels[0].rows);
    } else {
      const int32_t columns = half == 0 ? panels[0].rows : panels[1].rows;
      stage.write(row, panels[0].column + lane(), sum[t], column < columns);
    }
  }
  if constexpr (Stage::kPerforms) {
    sync_block();
    stage.finish(panels[0].column, panels[0].column + panels[0].rows + (Stage::kPaired ? 0 : panels[1].rows), count,
                 scratch);
    if constexpr (requires { stage.conclude(count, scratch); }) {
      bool* const flag = reinterpret_cast<bool*>(shared_memory<char>() + Layout::kFlag);
      if (!last_block(stage.counters + kFinished, static_cast<int>(gridDim.x), flag)) return;
      stage.conclude(count, scratch);
    }
  }
}

// Launches `blocks` blocks. All instances there are, for every stage: up to eight rows or up to 32, by group size.
template <class Stage>
void launch_stage(const char* name, const Stage& stage, int64_t blocks, Stream stream) {
  const auto run = [&]<int kTiles, int kSteps>() {
    launch_overlapping(name, decode_kernel<Stage, kTiles, kSteps>, blocks_in_x(blocks), kThreads,
                       Shared<kTiles>::kBytes, stream, stage);
  };
  const auto of_group = [&]<int kTiles>() {
    if (stage.x.group == 32) return run.template operator()<kTiles, 1>();
    if (stage.x.group == 64) return run.template operator()<kTiles, 2>();
    run.template operator()<kTiles, 4>();
  };
  if constexpr (Stage::kPerforms) {
    const int64_t parts = (stage.x.k_padded + kPartValues - 1) / kPartValues;
    launch_overlapping("decode_rows", rows_kernel<Stage>, blocks_in_x(stage.x.rows * parts + 1), kThreads,
                       kScratchBytes, stream, stage);
  }
  if (stage.x.rows <= kTileRows) {
    of_group.template operator()<1>();
  } else {
    of_group.template operator()<4>();
  }
}

}  // namespace quicksilver::QS_CUDA::decode

namespace quicksilver::QS_CUDA {

// matryoshka_gemm for at most kDecodeRows rows, x in its natural order.
void decode_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream);

}  // namespace quicksilver::QS_CUDA
