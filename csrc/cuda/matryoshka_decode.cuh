// The decode GEMM: up to kDecodeRows rows, bound by the weights' bytes. One kernel for the plain product and for the
// stages around it, which say what happens before (Stage::perform) and after (write, finish, conclude).
//
// A block has 32 output columns, two panels of 16, and all of the rows. Its warps share K by groups: in a round warp w
// takes group 8 * round + w. The weight's bytes stream through a ring of shared memory, each warp having its own, in
// pieces of 32 values of K, from the block's first instructions on, so that they are under way while rows are still
// being normalized and quantized. A lane's 16 bytes of a piece are four columns' codes of eight values each, just what
// it has of the second factor of four MMAs: so it reads what it copied itself, and the weight is laid out for the CPU
// and the GPU alike. A group's terms go to shared memory, and after some rounds and a barrier the thread that owns an
// output adds them up in the order of the groups. So a row's bits are the CPU's, and depend on no other row.
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
constexpr int kPlaneBytes = kColumns * kPieceValues / 2;    // of a piece, in either plane
constexpr int kSlotBytes = 2 * kPlaneBytes + kColumns * 2;  // of a ring: a piece and a group's scales

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
  int64_t column = 0;  // of the output, the panel's first
  int32_t rows = 0;
};

// Panel `index` of a weight that rows like x are multiplied with.
QS_DEVICE Panel panel_of(const MatryoshkaWeight& w, const QuantizedRows& x, int64_t index) {
  const int64_t column = index * kPanelRows, left = w.n - column, bytes = x.k_padded / 2 * column;
  return {w.hi + bytes, w.lo ? w.lo + bytes : nullptr, w.scale + x.groups * column, column,
          static_cast<int32_t>(maximum(minimum(left, kPanelRows), 0))};
}

inline int64_t panels_of(const MatryoshkaWeight& w) { return (w.n + kPanelRows - 1) / kPanelRows; }
inline int64_t tiles_of(const MatryoshkaWeight& w) { return (w.n + kColumns - 1) / kColumns; }

// What every stage has. A stage adds:
//   kPaired                         whether a block's panels are the same columns of two weights, not two of one weight
//   panel(p)                        the block's panels, p = 0 and 1
//   write(i, column, y, valid)      takes that column of output row i, without bias (kPaired: of both weights), by
//   whole
//                                   warps: lanes 16h .. 16h + 15 have the columns of one panel, perhaps not all `valid`
//   kPerforms                       whether there is work before and after, by whole blocks. Then also
//   tasks(count)                    how many pieces the work before has
//   perform(task, count, scratch)   one of them; all are complete before any block reads x
//   finish(begin, end, count, scratch)  after the block has written columns begin .. end - 1
//   conclude(count, scratch)        by the last block, when all have written
// `scratch` is kScratchBytes of shared memory.
struct Gemm {
  QuantizedRows x;                        // `rows` is the bound
  const int32_t* device_count = nullptr;  // [1], or null: the bound
  const int32_t* bits = nullptr;          // null: all that the weight has
  const int32_t* bits_index = nullptr;    // of row i the bits are bits[bits_index[i]], or where null bits[i]
  int32_t* counters = nullptr;
};

constexpr int kScratchBytes = 8192;

// A block's shared memory. sm_75 has 64 KiB, and wants all of this in it.
template <int kTiles>
struct Shared {
  static constexpr int kSlots = kTiles == 1 ? 5 : 3;  // of a warp's ring
  // Few rows' terms have two places, one of which is written while the other is read.
  static constexpr int kPlaces = kTiles == 1 ? 2 : 1;
  static constexpr int kTerms = kWarps * kTiles * kTileRows * kColumns;  // at a place, of at least one round
  static constexpr int kRing = 0;
  static constexpr int kExchange = kRing + kWarps * kSlots * kSlotBytes;  // float [kPlaces][kTerms]
  static constexpr int kFlag = kExchange + kPlaces * kTerms * 4;
  static constexpr int kBytes = kFlag + 16;
  static_assert(kPlaces * kTerms * 4 >= kScratchBytes && kBytes <= 64 << 10);
};

// A warp's share of the panels on its way into shared memory, group by group (every eighth one) and in a group along K:
// a piece of 32 values of K, 16 bytes a plane for each lane, and with a group's last piece its scales. Lane 4g + t has
// rows 4 * (g % 4) and three more of panel g / 4, of which word t is 8 values of K: 4 in the low nibbles, 4 in the
// high. What there is none of, K past its end and rows past a narrow panel's, is whatever there was before: x is zero
// there, or nobody takes the column.
template <int kSlots>
class Pieces {
 public:
  QS_DEVICE Pieces(const Panel (&panels)[2], const QuantizedRows& x, uint8_t* ring)
      : ring_(ring + warp() * kSlots * kSlotBytes),
        steps_(x.group / kPieceValues),
        groups_(static_cast<int32_t>(x.groups)),
        group_(warp()) {
    const int chunk = lane() / 4 % 4, line = lane() % 4;
    const Panel panel = lane() < kWarp / 2 ? panels[0] : panels[1];
    bytes_ = maximum(0, minimum(panel.rows * 4 - chunk * 16, 16));
    narrow_ = panels[0].rows % kPanelRows != 0 || panels[1].rows % kPanelRows != 0;
    piece_bytes_ = panel.rows * 16;
    at_ = warp() * steps_ * piece_bytes_ + line * panel.rows * 4 + chunk * 16;
    end_ = static_cast<int32_t>(x.k_padded / 2 * panel.rows);
    high_ = panel.hi;
    low_ = panel.lo;
    // Lanes 0 .. 3 bring the scales, eight each.
    const Panel scaled = lane() < 2 ? panels[0] : panels[1];
    const int first = lane() % 2 * 8;
    scale_rows_ = lane() < 4 ? scaled.rows : 0;
    scales_ = maximum(0, minimum(scale_rows_ - first, 8));
    scale_ = scaled.scale + first;
  }

  // Requests the first pieces: the high plane, and then the rest, with the low plane where a row wants it. A weight
  // that has none is at its nibbles' zero.
  QS_DEVICE void start_high() {
    Pieces ahead = *this;
    QS_UNROLL_BY(1)
    for (uint32_t slot = 0; slot < kSlots - 1; ++slot) {
      ahead.request_plane(slot, 0, high_);
      ahead.advance();
    }
  }
  QS_DEVICE void start_low(bool wanted) {
    if (!wanted) low_ = nullptr;
    missing_ = wanted ? 0x88888888u : 0;
    QS_UNROLL_BY(1)
    for (uint32_t slot = 0; slot < kSlots - 1; ++slot) request_rest(slot);
  }

  // Waits for the next piece, and requests the one that gets the slot of the piece before.
  QS_DEVICE void next() {
    const uint32_t before = slot_;
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
    cp_async_wait<kSlots - 2>();
    sync_warp();  // other lanes' scales are there, and nobody reads those of the slot before
    request_plane(before, 0, high_);
    request_rest(before);
  }
  // Of that piece: four columns' words.
  QS_DEVICE uint4 high() const { return load_shared(reinterpret_cast<const uint4*>(lane_at(slot_))); }
  QS_DEVICE uint4 low() const {
    return low_ ? load_shared(reinterpret_cast<const uint4*>(lane_at(slot_) + kPlaneBytes))
                : make_uint4(missing_, missing_, missing_, missing_);
  }
  // Of a group's last piece: the scales of the columns 8t and seven more of the block's.
  QS_DEVICE uint4 scales() const {
    return load_shared(reinterpret_cast<const uint4*>(ring_ + slot_ * kSlotBytes + 2 * kPlaneBytes) + lane() % 4);
  }

 private:
  QS_DEVICE uint8_t* lane_at(uint32_t slot) const { return ring_ + slot * kSlotBytes + lane() * 16; }

  QS_DEVICE void request_plane(uint32_t slot, int plane, const uint8_t* from) const {
    if (at_ >= end_) return;
    uint8_t* const to = lane_at(slot) + plane * kPlaneBytes;
    if (!narrow_) return cp_async16(to, from + at_, true);
    QS_UNROLL_BY(1)
    for (int32_t i = 0; i < bytes_; i += 4) {
      store_shared(reinterpret_cast<uint32_t*>(to + i), load(reinterpret_cast<const uint32_t*>(from + at_ + i)));
    }
  }
  QS_DEVICE void request_rest(uint32_t slot) {
    if (low_) request_plane(slot, 1, low_);
    if (step_ == steps_ - 1 && group_ < groups_) request_scales(ring_ + slot * kSlotBytes + 2 * kPlaneBytes);
    advance();
    cp_async_commit();
  }
  QS_DEVICE void advance() {
    at_ += piece_bytes_;
    if (++step_ < steps_) return;
    step_ = 0;
    at_ += (kWarps - 1) * steps_ * piece_bytes_;
    group_ += kWarps;
  }

  QS_DEVICE void request_scales(uint8_t* slot) const {
    uint16_t* const to = reinterpret_cast<uint16_t*>(slot) + lane() * 8;
    const uint16_t* const from = scale_ + group_ * scale_rows_;
    if (!narrow_) {
      if (scales_ == 8) cp_async16(to, from, true);
      return;
    }
    QS_UNROLL_BY(1)
    for (int32_t i = 0; i < scales_; ++i) store_shared(to + i, load_once(from + i));
  }

  uint8_t* ring_;
  const uint8_t *high_, *low_;  // this lane's panel
  const uint16_t* scale_;
  int32_t steps_, groups_, piece_bytes_, end_;
  int32_t bytes_, scales_, scale_rows_;
  uint32_t missing_ = 0;           // what stands for a word of the low plane where there is none
  bool narrow_;                    // a panel has fewer than 16 rows
  uint32_t slot_ = kSlots - 1;     // of the piece that was waited for
  int32_t at_, step_ = 0, group_;  // this lane's part of the piece to request next
};

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

template <class Stage, int kTiles, int kPlanes>
QS_KERNEL void __launch_bounds__(kThreads, kTiles* kPlanes > 4 ? 1 : 2) decode_kernel(const Stage stage) {
  using Layout = Shared<kTiles>;
  constexpr int kPairs = (kTiles + 1) / 2;  // of tiles of rows: an MMA has one
  constexpr int kHalves = kTiles == 1 ? 1 : 2;
  uint8_t* const shared = shared_memory<uint8_t>();
  float* const exchange = reinterpret_cast<float*>(shared + Layout::kExchange);
  void* const scratch = exchange;
  int32_t* const flag = reinterpret_cast<int32_t*>(shared + Layout::kFlag);

  launch_next();
  const Panel panels[2] = {stage.panel(0), stage.panel(1)};
  Pieces<Layout::kSlots> pieces(panels, stage.x, shared + Layout::kRing);
  pieces.start_high();
  const bool all_of_both = stage.bits == nullptr && (panels[0].lo || panels[1].lo);
  if (all_of_both) pieces.start_low(true);
  wait_for_launch_before();  // from here on, what was written before may be read

  int32_t count = static_cast<int32_t>(stage.x.rows);
  if (stage.device_count) count = minimum(count, load(stage.device_count));
  if (count <= 0) return;
  int32_t ticket = 0;  // on its way while the first pieces are requested
  if (Stage::kPerforms && threadIdx.x == 0) ticket = atomic_add(stage.counters + kTicket, 1);
  bool eight = lane() < count;
  if (eight && stage.bits) {
    eight = load(stage.bits + (stage.bits_index ? load(stage.bits_index + lane()) : lane())) == 8;
  }
  const uint32_t eights = panels[0].lo || panels[1].lo ? ballot(eight) : 0;
  const bool mixed = eights != 0 && eights != ballot(lane() < count);
  if (!all_of_both) pieces.start_low(eights != 0);
  if constexpr (Stage::kPerforms) perform_tasks(stage, count, ticket, scratch, flag);

  // In fragments lane 4g + t has rows g and g + 8 of a pair of tiles and values 8t .. 8t + 7 of a piece; of MMA j's
  // columns it gives 4g + j and gets 8t + j and 8t + 4 + j.
  const int g = lane() / 4, t4 = lane() % 4;
  const int32_t width = static_cast<int32_t>(stage.x.k_padded);  // offsets in so few rows are small
  const int32_t groups = static_cast<int32_t>(stage.x.groups);
  const int32_t steps = stage.x.group / kPieceValues;
  const auto has_pair = [&](int m) { return m == 0 || m * 2 * kTileRows < count; };  // the same for the whole block
  uint32_t x[kPlanes][kTiles][2];
  const auto load_x = [&](int32_t k) {  // of this lane
    const int32_t at = g * width + k;
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const bool inside = t * kTileRows + g < count && k < width;
      QS_UNROLL
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int8_t* from = (plane == 0 ? stage.x.q : stage.x.q_low) + at + t * kTileRows * width;
        const uint2 values = inside ? load(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
        x[plane][t][0] = values.x;
        x[plane][t][1] = values.y;
      }
    }
  };

  // The terms of this warp's group of a round, to `terms`: [row][column]. The first values of x are there already, and
  // when it returns those at `next_k`, where the warp goes on, are on their way.
  const auto multiply = [&](int32_t group, int32_t next_k, float* terms) {
    float x_scale[kTiles];
    int32_t start[kTiles];  // of a sum: a code's zero is at 136, or in 4 bits at 128
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * kTileRows + g;
      const int32_t at = row * groups + group;
      x_scale[t] = row < count ? load(stage.x.scale + at) : 0;
      start[t] = row < count ? (eights >> row & 1 ? -136 : -128) * load(stage.x.sum + at) : 0;
    }
    int32_t dot[kPlanes][kPairs][4][4] = {};
    const auto multiply_add = [&](const uint32_t (&codes)[4][2], bool eights_alone) {
      QS_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        if (!has_pair(m)) continue;
        QS_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) {
          uint32_t rows[4] = {};
          QS_UNROLL
          for (int h = 0; h < kHalves; ++h) {
            const int t = kHalves * m + h;
            const uint32_t keep = eights_alone ? 0u - (eights >> (t * kTileRows + g) & 1) : ~0u;
            rows[h] = x[plane][t][0] & keep;
            rows[2 + h] = x[plane][t][1] & keep;
          }
          QS_UNROLL
          for (int j = 0; j < 4; ++j) mma_s8u8(dot[plane][m][j], rows, codes[j]);
        }
      }
    };
    int32_t k = group * stage.x.group + t4 * 8;
    QS_UNROLL_BY(1)
    for (int step = 1; step <= steps; ++step) {
      pieces.next();
      const uint4 high = pieces.high(), low = pieces.low();
      const uint32_t h[4] = {high.x, high.y, high.z, high.w}, l[4] = {low.x, low.y, low.z, low.w};
      uint32_t codes[4][2];
      if (!mixed) {
        QS_UNROLL
        for (int j = 0; j < 4; ++j) {
          codes[j][0] = (h[j] << 4 & 0xf0f0f0f0) | (l[j] & 0x0f0f0f0f);
          codes[j][1] = (h[j] & 0xf0f0f0f0) | (l[j] >> 4 & 0x0f0f0f0f);
        }
        multiply_add(codes, false);
      } else {  // rows of 4 bits have no low nibbles
        QS_UNROLL
        for (int j = 0; j < 4; ++j) {
          codes[j][0] = h[j] << 4 & 0xf0f0f0f0;
          codes[j][1] = h[j] & 0xf0f0f0f0;
        }
        multiply_add(codes, false);
        QS_UNROLL
        for (int j = 0; j < 4; ++j) {
          codes[j][0] = l[j] & 0x0f0f0f0f;
          codes[j][1] = l[j] >> 4 & 0x0f0f0f0f;
        }
        multiply_add(codes, true);
      }
      k = step < steps ? k + kPieceValues : next_k;
      load_x(k);
    }
    const uint4 packed = pieces.scales();
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
    float w_scale[8];
    QS_UNROLL
    for (int c = 0; c < 8; ++c) w_scale[c] = half_to_float(static_cast<uint16_t>(pairs[c / 2] >> c % 2 * 16));
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int row = t * kTileRows + g, m = t / kHalves, h = t % kHalves;
      if (row >= count) continue;
      float4 term[2];
      QS_UNROLL
      for (int e = 0; e < 2; ++e) {
        const auto of = [&](int j) {
          int32_t total = dot[0][m][j][2 * h + e];
          if constexpr (kPlanes == 2) total = total * 256 + dot[1][m][j][2 * h + e];
          return mul_rn(static_cast<float>(total + start[t]), mul_rn(x_scale[t], w_scale[4 * e + j]));
        };
        term[e] = make_float4(of(0), of(1), of(2), of(3));
      }
      // Neighbouring rows begin with either half, so that together they hit all banks.
      float4* const to = reinterpret_cast<float4*>(terms + row * kColumns + 8 * t4);
      store_shared(to + g % 2, g % 2 ? term[1] : term[0]);
      store_shared(to + (g + 1) % 2, g % 2 ? term[0] : term[1]);
    }
  };

  // A place has the terms of `rounds` rounds: [group][row][column]. Thread i owns outputs i, i + kThreads ...:
  // [row][column].
  const int32_t rounds = Layout::kTerms / (kWarps * kColumns) / count;
  const int32_t of_group = count * kColumns;
  float sum[kTiles] = {};
  int which = 0;
  const int32_t first_k = warp() * stage.x.group + t4 * 8;
  load_x(first_k);
  for (int32_t first = 0; first < groups; first += rounds * kWarps) {
    float* const terms = exchange + which * Layout::kTerms;
    const int32_t some = minimum(rounds * kWarps, groups - first);
    for (int32_t i = warp(); i < some; i += kWarps) {
      multiply(first + i, (first + i + kWarps) * stage.x.group + t4 * 8, terms + i * of_group);
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

// Launches `blocks` blocks. All instances there are, for every stage: up to eight rows or up to 32, rows of INT8 or of
// two planes.
template <class Stage>
void launch_stage(const char* name, const Stage& stage, int64_t blocks, Stream stream) {
  const auto run = [&]<int kTiles, int kPlanes>() {
    launch_overlapping(name, decode_kernel<Stage, kTiles, kPlanes>, blocks_in_x(blocks), kThreads,
                       Shared<kTiles>::kBytes, stream, stage);
  };
  const bool few = stage.x.rows <= kTileRows, two = stage.x.q_low != nullptr;
  if (few && !two) run.template operator()<1, 1>();
  if (few && two) run.template operator()<1, 2>();
  if (!few && !two) run.template operator()<4, 1>();
  if (!few && two) run.template operator()<4, 2>();
}

}  // namespace quicksilver::QS_CUDA::decode

namespace quicksilver::QS_CUDA {

// matryoshka_gemm for at most kDecodeRows rows, x in its natural order.
void decode_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream);

}  // namespace quicksilver::QS_CUDA
