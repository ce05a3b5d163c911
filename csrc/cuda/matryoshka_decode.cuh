// The decode GEMM: up to kDecodeRows rows, bound by the weights' bytes. One kernel for the plain product and for the
// stages around it, which say what happens before (Stage::perform) and after (write, finish, conclude).
//
// A block has 32 output columns, two panels of 16, and all of the rows. Its warps share K by groups: in a round warp w
// takes group 8 * round + w. Of a piece of 32 values of K a lane's 16 bytes are four columns' codes of eight values
// each, just what it has of the second factor of four MMAs: so it loads them to registers, two pieces ahead, from the
// block's first instructions on, so that they are under way while rows are still being normalized and quantized. The
// weight is laid out for the CPU and the GPU alike. A group's terms go to shared memory, and after some rounds and a
// barrier the thread that owns an output adds them up in the order of the groups. So a row's bits are the CPU's, and
// depend on no other row.
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
constexpr int kTileRows = 8;  // rows of x that lanes 4g .. 4g + 3 share one of; an MMA takes two such tiles
constexpr int kPieceValues = 32;

static_assert(kThreads == kQuantizeThreads, "rows are quantized by the blocks that multiply");

// Places in the counters, apart so that blocks waiting at one don't slow those arriving at another.
constexpr int kTicket = 0;
constexpr int kPerformed = 32;
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
//   conclude(count, scratch)       by the last block, when all have written
// `scratch` is kScratchBytes of shared memory.
struct Gemm {
  QuantizedRows x;                        // `rows` is the bound
  const int32_t* device_count = nullptr;  // [1], or null: the bound
  const int32_t* bits = nullptr;          // null: all that the weight has
  const int32_t* bits_index = nullptr;    // of row i the bits are bits[bits_index[i]], or where null bits[i]
  int32_t* counters = nullptr;
};

constexpr int kScratchBytes = 8192;

// A block's shared memory.
template <int kTiles>
struct Shared {
  // The terms of few rows have two places, one of which is written while the other is read.
  static constexpr int kPlaces = kTiles == 1 ? 2 : 1;
  static constexpr int kTerms = kWarps * kTiles * kTileRows * kColumns;  // at a place, of at least one round
  static constexpr int kFlag = kPlaces * kTerms * 4;                     // after float [kPlaces][kTerms]
  static constexpr int kBytes = kFlag + 16;
  static_assert(kPlaces * kTerms * 4 >= kScratchBytes);
};

// A lane's part of a piece. Of the panel g / 4 it has rows 4 * (g % 4) and three more, of each a word a plane: values
// 8t .. 8t + 7 of K, 4 in the low nibbles and 4 in the high. Of the tiles of x it has the same values of row g.
template <int kTiles>
struct Piece {
  uint4 high = {}, low = {};
  uint2 x[kTiles] = {};
};

// A warp's share of the panels and the rows, piece by piece: group by group (every eighth one), and in a group along K.
// Past the end of K, x is zero. What else there is none of, codes there and past a narrow panel's rows, is whatever
// there was before: nobody takes those results.
template <int kTiles>
class Pieces {
 public:
  QS_DEVICE Pieces(const Panel (&panels)[2], const QuantizedRows& x)
      : width_(static_cast<int32_t>(x.k_padded)),
        steps_(x.group / kPieceValues),
        k_(warp() * x.group + lane() % 4 * 8) {
    const int chunk = lane() / 4 % 4;
    const Panel panel = lane() < kWarp / 2 ? panels[0] : panels[1];
    words_ = maximum(0, minimum(panel.rows - chunk * 4, 4));
    line_bytes_ = panel.rows * 4;
    high_ = panel.hi + chunk * 16;
    low_ = panel.lo ? panel.lo + chunk * 16 : nullptr;
  }

  // The low plane is left out where no row wants it. A weight that has none is at its nibbles' zero.
  QS_DEVICE void use_low(bool wanted) {
    if (!wanted) low_ = nullptr;
    missing_ = wanted ? 0x88888888u : 0;
  }
  QS_DEVICE void use_rows(const QuantizedRows& x, int32_t count) {
    x_ = x.q + lane() / 4 * width_;
    rows_ = count - lane() / 4;
  }

  // kWhole: both panels have 16 rows.
  template <bool kWhole>
  QS_DEVICE void load_high(Piece<kTiles>& piece) const {
    load_plane<kWhole>(piece.high, high_);
  }
  template <bool kWhole>
  QS_DEVICE void load_low(Piece<kTiles>& piece) const {
    if (kWhole || low_) return load_plane<kWhole>(piece.low, low_);
    piece.low = make_uint4(missing_, missing_, missing_, missing_);
  }
  QS_DEVICE void load_rows(Piece<kTiles>& piece) const {
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const bool inside = t * kTileRows < rows_ && k_ < width_;
      const int32_t at = t * kTileRows * width_ + k_;
      piece.x[t] = inside ? load(reinterpret_cast<const uint2*>(x_ + at)) : make_uint2(0, 0);
    }
  }
  QS_DEVICE void advance() {
    k_ += kPieceValues;
    if (++step_ < steps_) return;
    step_ = 0;
    k_ += (kWarps - 1) * steps_ * kPieceValues;
  }

 private:
  template <bool kWhole>
  QS_DEVICE void load_plane(uint4& words, const uint8_t* plane) const {
    if (kWhole || line_bytes_ == 4 * kPanelRows) {
      return load_once_if(k_ < width_, reinterpret_cast<const uint4*>(plane + k_ * (kPanelRows / 2)), words);
    }
    if (k_ >= width_) return;
    const uint32_t* const word = reinterpret_cast<const uint32_t*>(plane + k_ / 8 * line_bytes_);
    if (words_ > 0) words.x = load_once(word);
    if (words_ > 1) words.y = load_once(word + 1);
    if (words_ > 2) words.z = load_once(word + 2);
    if (words_ > 3) words.w = load_once(word + 3);
  }

  int32_t width_, steps_;
  int32_t words_, line_bytes_;
  const uint8_t *high_, *low_;  // of this lane's panel
  const int8_t* x_ = nullptr;
  int32_t rows_ = 0;
  uint32_t missing_ = 0;  // what stands for a word of the low plane where there is none
  int32_t k_, step_ = 0;  // this lane's first value of the piece to load next
};

enum class How { any, both, high };  // a block's codes, see decode_kernel

// What comes before the product: every block takes pieces of it, the first being `ticket` (in thread 0), until none is
// left. So a block waits only for blocks that have started, however few of them the GPU holds at a time.
template <class Stage>
QS_DEVICE void perform_tasks(const Stage& stage, int32_t count, int32_t ticket, void* scratch, int32_t* slot) {
  if (threadIdx.x == 0) store_shared(slot, ticket);
  sync_block();
  const int32_t tasks = stage.tasks(count);
  for (int32_t task = load_shared(slot); task < tasks; task = load_shared(slot)) {
    stage.perform(task, count, scratch);
    sync_block();
    if (threadIdx.x == 0) {
      fence();  // covers the whole block's stores: they came before the barrier
      atomic_add(stage.counters + kPerformed, 1);
      store_shared(slot, atomic_add(stage.counters + kTicket, 1));
    }
    sync_block();
  }
  if (threadIdx.x == 0) wait_until_at_least(stage.counters + kPerformed, tasks);
  sync_block();
}

template <class Stage, int kTiles>
QS_KERNEL void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 1) decode_kernel(const Stage stage) {
  using Layout = Shared<kTiles>;
  float* const exchange = shared_memory<float>();
  void* const scratch = exchange;
  int32_t* const flag = reinterpret_cast<int32_t*>(shared_memory<char>() + Layout::kFlag);

  launch_next();
  const Panel panels[2] = {stage.panel(0), stage.panel(1)};
  Pieces<kTiles> pieces(panels, stage.x);
  Piece<kTiles> next[2];
  const int32_t steps = stage.x.group / kPieceValues;  // of a group: 1, 2 or 4
  const auto each_next = [&](const auto& what) {
    Pieces<kTiles> ahead = pieces;
    what(ahead, next[0]);
    ahead.advance();
    if (steps > 1) what(ahead, next[1]);
  };
  each_next([](const auto& from, auto& piece) { from.template load_high<false>(piece); });
  const bool has_low = panels[0].lo || panels[1].lo, all_of_both = has_low && stage.bits == nullptr;
  const auto load_low = [&](bool wanted) {
    pieces.use_low(wanted);
    each_next([](const auto& from, auto& piece) { from.template load_low<false>(piece); });
  };
  if (all_of_both) load_low(true);
  wait_for_launch_before();  // from here on, what was written before may be read

  int32_t count = static_cast<int32_t>(stage.x.rows);
  if (stage.device_count) count = minimum(count, load(stage.device_count));
  if (count <= 0) return;
  int32_t ticket = 0;  // on its way while more is loaded
  if (Stage::kPerforms && threadIdx.x == 0) ticket = atomic_add(stage.counters + kTicket, 1);
  bool eight = lane() < count;
  if (eight && stage.bits) {
    eight = load(stage.bits + (stage.bits_index ? load(stage.bits_index + lane()) : lane())) == 8;
  }
  const uint32_t eights = has_low ? ballot(eight) : 0;
  const bool mixed = eights != 0 && eights != ballot(lane() < count);
  if (!all_of_both) load_low(eights != 0);
  if constexpr (Stage::kPerforms) perform_tasks(stage, count, ticket, scratch, flag);
  pieces.use_rows(stage.x, count);
  each_next([](const auto& from, auto& piece) { from.load_rows(piece); });
  pieces.advance();
  if (steps > 1) pieces.advance();

  // In fragments lane 4g + t has rows g and g + 8 of a pair of tiles and values 8t .. 8t + 7 of a piece; of MMA j's
  // columns it gives 4g + j and gets 8t + j and 8t + 4 + j. One tile alone is paired with zeros.
  constexpr bool kAlone = kTiles == 1;
  constexpr int kProducts = kAlone ? 1 : kTiles / 2;
  const int g = lane() / 4, t4 = lane() % 4;
  const int32_t groups = static_cast<int32_t>(stage.x.groups);
  const auto has_pair = [&](int m) { return m == 0 || m * 2 * kTileRows < count; };  // the same for the whole block
  const Panel scaled = t4 < 2 ? panels[0] : panels[1];                               // that columns 8t .. 8t + 7 are of
  const int first_scale = t4 % 2 * 8, scales = maximum(0, minimum(scaled.rows - first_scale, 8));

  // The terms of a group, to `terms`: [row][column]. kHow says what is known of the block: that its panels are whole,
  // and that all rows want both planes, or only the high one.
  const auto multiply = [&]<How kHow>(int32_t group, float* terms) {
    constexpr bool kWhole = kHow != How::any;
    const auto eight_halves = [&](const uint16_t* panel) {  // of a group's scales or offsets
      const uint16_t* const halves = panel + group * scaled.rows + first_scale;
      if (kWhole || scaled.rows == kPanelRows) return load_once(reinterpret_cast<const uint4*>(halves));
      uint32_t pairs[4] = {};
      QS_UNROLL
      for (int c = 0; c < 8; ++c) {
        if (c < scales) pairs[c / 2] |= static_cast<uint32_t>(load_once(halves + c)) << c % 2 * 16;
      }
      return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    };
    const uint4 packed = eight_halves(scaled.scale), packed_offset = eight_halves(scaled.offset);
    float x_scale[kTiles];
    int32_t start[kTiles];  // of a sum: an INT8 code's zero is at 8
    float scaled_sum[kTiles];
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * kTileRows + g;
      const int32_t at = row * groups + group;
      const float scale = row < count ? load(stage.x.scale + at) : 0;
      const int32_t sum = row < count ? load(stage.x.sum + at) : 0;
      start[t] = eights >> row & 1 ? -kStepCodes * sum : 0;
      scaled_sum[t] = mul_rn(static_cast<float>(sum), scale);
      x_scale[t] = mul_rn(scale, kCodeUnit);
    }

    int32_t dot[kProducts][4][4] = {};
    const auto multiply_add = [&](const uint2(&x)[kTiles], const uint32_t (&codes)[4][2], bool eights_alone) {
      QS_UNROLL
      for (int product = 0; product < kProducts; ++product) {
        if (!has_pair(product)) continue;
        uint32_t rows[4];
        QS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int t = kAlone ? 0 : 2 * product + i % 2;
          const uint2 values = kAlone && i % 2 == 1 ? make_uint2(0, 0) : x[t];
          const uint32_t keep = eights_alone ? 0u - (eights >> (t * kTileRows + g) & 1) : ~0u;
          rows[i] = (i / 2 == 0 ? values.x : values.y) & keep;
        }
        QS_UNROLL
        for (int j = 0; j < 4; ++j) mma_s8u8(dot[product][j], rows, codes[j]);
      }
    };
    const auto take = [&](Piece<kTiles>& piece) {
      const uint32_t h[4] = {piece.high.x, piece.high.y, piece.high.z, piece.high.w};
      const uint32_t l[4] = {piece.low.x, piece.low.y, piece.low.z, piece.low.w};
      uint2 x[kTiles];
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) x[t] = piece.x[t];
      uint32_t codes[4][2], low_codes[4][2];
      QS_UNROLL
      for (int j = 0; j < 4; ++j) {
        codes[j][0] = h[j] << 3 & 0x78787878;
        codes[j][1] = h[j] >> 1 & 0x78787878;
        if (kHow == How::high) continue;
        low_codes[j][0] = l[j] & 0x0f0f0f0f;
        low_codes[j][1] = l[j] >> 4 & 0x0f0f0f0f;
        if (kWhole || !mixed) {
          codes[j][0] += low_codes[j][0];  // no sum carries out of its byte
          codes[j][1] += low_codes[j][1];
        }
      }
      pieces.template load_high<kWhole>(piece);
      if (kHow != How::high) pieces.template load_low<kWhole>(piece);
      pieces.load_rows(piece);
      pieces.advance();
      multiply_add(x, codes, false);
      if (!kWhole && mixed) multiply_add(x, low_codes, true);  // rows of 4 bits have no low nibbles
    };
    QS_UNROLL_BY(1)
    for (int step = 0; step < steps; step += 2) {
      take(next[0]);
      if (steps > 1) take(next[1]);
    }

    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
    const uint32_t offsets[4] = {packed_offset.x, packed_offset.y, packed_offset.z, packed_offset.w};
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * kTileRows + g;
      if (row >= count) continue;
      float term[8];
      QS_UNROLL
      for (int c = 0; c < 8; ++c) {  // column 8t + c
        const int j = c % 4, at = t % 2 * 2 + c / 4;
        const int32_t total = dot[t / 2][j][at];
        const float w_scale = half_to_float(static_cast<uint16_t>(pairs[c / 2] >> c % 2 * 16));
        const float offset = half_to_float(static_cast<uint16_t>(offsets[c / 2] >> c % 2 * 16));
        term[c] = add_rn(mul_rn(static_cast<float>(total + start[t]), mul_rn(x_scale[t], w_scale)),
                         mul_rn(scaled_sum[t], offset));
      }
      float4* const to = reinterpret_cast<float4*>(terms + row * kColumns + 8 * t4);
      store_shared(to, make_float4(term[0], term[1], term[2], term[3]));
      store_shared(to + 1, make_float4(term[4], term[5], term[6], term[7]));
    }
  };

  // A place has the terms of `rounds` rounds: [group][row][column]. Thread i owns outputs i, i + kThreads ...:
  // [row][column].
  const int32_t rounds = Layout::kTerms / (kWarps * kColumns) / count;
  const int32_t of_group = count * kColumns;
  float sum[kTiles] = {};
  const auto multiply_all = [&]<How kHow>() {
    int which = 0;
    for (int32_t first = 0; first < groups; first += rounds * kWarps) {
      float* const terms = exchange + which * Layout::kTerms;
      const int32_t some = minimum(rounds * kWarps, groups - first);
      for (int32_t i = warp(); i < some; i += kWarps) {
        multiply.template operator()<kHow>(first + i, terms + i * of_group);
      }
      sync_block();
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const int own = t * kThreads + static_cast<int>(threadIdx.x);
        if (own >= of_group) continue;
        QS_UNROLL_BY(8)
        for (int32_t i = 0; i < some; ++i) sum[t] = add_rn(sum[t], load_shared(terms + i * of_group + own));
      }
      which = (which + 1) % Layout::kPlaces;
      if constexpr (Layout::kPlaces == 1) sync_block();
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
    if (!last_block(stage.counters + kFinished, static_cast<int>(gridDim.x), reinterpret_cast<bool*>(flag))) return;
    if (threadIdx.x == 0) {
      store(stage.counters + kTicket, 0);
      store(stage.counters + kPerformed, 0);
    }
    stage.conclude(count, scratch);
  }
}

// Launches `blocks` blocks. All instances there are, for every stage: up to eight rows or up to 32.
template <class Stage>
void launch_stage(const char* name, const Stage& stage, int64_t blocks, Stream stream) {
  const auto run = [&]<int kTiles>() {
    launch_overlapping(name, decode_kernel<Stage, kTiles>, blocks_in_x(blocks), kThreads, Shared<kTiles>::kBytes,
                       stream, stage);
  };
  if (stage.x.rows <= kTileRows) {
    run.template operator()<1>();
  } else {
    run.template operator()<4>();
  }
}

}  // namespace quicksilver::QS_CUDA::decode

namespace quicksilver::QS_CUDA {

// matryoshka_gemm for at most kDecodeRows rows, x in its natural order.
void decode_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream);

}  // namespace quicksilver::QS_CUDA
