// The decode GEMM: up to kDecodeRows rows, bound by the weights' bytes. One kernel for the plain product and for the
// stages around it, which say what happens before (Stage::perform) and after (write, finish, conclude).
//
// A block has 16 output columns, a panel of the weight (or a panel each of several weights), and all of the rows. Its
// warps share K by groups: in a round warp w takes group 8 * round + w. The weight's bytes stream through a ring of
// shared memory, each warp having its own, in pieces of 32 values of K, from the block's first instructions on, so that
// they are under way while rows are still being normalized and quantized. Tensor cores make integer dot products; the
// warps write a group's terms to shared memory, and after a barrier the thread that owns an output adds them up in the
// order of the groups. So a row's bits are the CPU's, and depend on no other row.
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
constexpr int kTileRows = 8;    // rows of x that one MMA takes
constexpr int kPieceValues = 32;
constexpr int kPlaneBytes = kPanelRows * kPieceValues / 2;  // of a piece, in either plane

static_assert(kThreads == kQuantizeThreads, "rows are quantized by the blocks that multiply");

// Places in the counters, apart so that blocks waiting at one don't slow those arriving at another.
constexpr int kTicket = 0;
constexpr int kPerformed = 32;
constexpr int kFinished = 64;
constexpr int kHeads = 96;

// Sixteen rows of a weight, or those of the last panel.
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
          left < kPanelRows ? static_cast<int32_t>(left) : kPanelRows};
}

inline int64_t panels_of(const MatryoshkaWeight& w) { return (w.n + kPanelRows - 1) / kPanelRows; }

// What every stage has. A stage adds:
//   kPanels                         how many weights a block multiplies with, one panel of each
//   panel(p)                        the block's panel of weight p
//   write(i, column, y, valid)      takes that column of output row i (y: of each weight), without bias, by
//                                   whole warps: lanes 16h..16h+15 have one row's columns, perhaps not all `valid`
//   kPerforms                       whether there is work before and after, by whole blocks. Then also
//   tasks(count)                    how many pieces the work before has
//   perform(task, count, scratch)   one of them; all are complete before any block reads x
//   finish(panel, count, scratch)   after the block has written
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

// A block's shared memory.
template <int kTiles>
struct Shared {
  // Of a warp's ring. More of them beside four tiles would leave sm_75, which has 64 KiB, no room for the scales.
  static constexpr int kSlots = kTiles == 1 ? 8 : 5;
  static constexpr int kTerms = kTiles * kTileRows * kPanelRows;  // of a group
  static constexpr int kRing = 0;
  static constexpr int kExchange = kRing + kWarps * kSlots * 2 * kPlaneBytes;  // float [2][kWarps][kTerms]
  static constexpr int kFlag = kExchange + 2 * kWarps * kTerms * 4;
  static constexpr int kScales = kFlag + 16;  // uint16_t [panels][kWarps][rounds][kPanelRows]
  static_assert(2 * kWarps * kTerms * 4 >= kScratchBytes);

  static int64_t bytes(int64_t groups, int panels) {
    return kScales + panels * kWarps * ((groups + kWarps - 1) / kWarps) * kPanelRows * 2;
  }
};

// A warp's share of the panels on its way into shared memory: the scales all at once, the codes through the warp's
// ring. The order of the pieces: group by group (every eighth one), in a group panel by panel, in a panel along K.
// Codes past the end of K are whatever there was before: x is zero there. So are the rows that a narrow panel doesn't
// have.
//
// In a slot, a plane's chunk of 16 bytes c (rows 4c % 16 .. of line c / 4) lies at c with bit 1 flipped in lines 2
// and 3. So the lanes (row g, line t), which read a word each, hit 32 different banks.
template <int kPanels, int kSlots>
class Pieces {
 public:
  QS_DEVICE Pieces(const Panel (&panels)[kPanels], const QuantizedRows& x, uint8_t* ring, uint16_t* scales)
      : ring_(ring + warp() * kSlots * 2 * kPlaneBytes),
        rounds_(static_cast<int32_t>((x.groups + kWarps - 1) / kWarps)),
        scales_(scales + warp() * rounds_ * kPanelRows),
        steps_(x.group / kPieceValues),
        piece_bytes_(panels[0].rows * 16) {
    const int rows = panels[0].rows, chunk = lane() % 16, line = chunk / 4;
    const bool full = rows == kPanelRows;
    to_ = (lane() / 16 * 16 + (full ? chunk ^ (line & 2) : chunk)) * 16;
    const int row = lane() / 4, of_line = lane() % 4;
    for (int i = 0; i < 2; ++i) {
      word_[i] = full ? of_line * 16 + ((row + 8 * i) ^ (of_line & 2) * 4) : of_line * rows + row + 8 * i;
    }
    at_ = warp() * steps_ * piece_bytes_ + chunk * 16;
    for (int p = 0; p < kPanels; ++p) {
      const bool low = lane() >= 16, missing = low && !panels[p].lo;
      from_[p] = low && !missing ? panels[p].lo : panels[p].hi;
      end_[p] = missing || chunk >= rows ? 0 : static_cast<int32_t>(x.k_padded / 2 * rows);
      request_scales(panels[p], static_cast<int32_t>(x.groups), scales_ + p * kWarps * rounds_ * kPanelRows);
    }
  }

  // Requests the first pieces: the high plane's part, by lanes 0..15, and then the low one's, if that is wanted.
  QS_DEVICE void start_high() {
    if (lane() < 16) start();
  }
  QS_DEVICE void start_low(bool wanted) {
    if (lane() < 16) return;
    for (int p = 0; p < kPanels && !wanted; ++p) end_[p] = 0;
    start();
  }

  // Waits for the next piece, and requests the one that gets the slot of the piece before.
  QS_DEVICE void next() {
    const uint32_t before = slot_;
    slot_ = (slot_ + 1) % kSlots;
    cp_async_wait<kSlots - 2>();
    sync_warp();
    request(before);
  }
  // Of that piece: words (row g, line t) and (row g + 8, line t) for lane 4 * g + t.
  QS_DEVICE uint32_t high(int i) const { return word(0, i); }
  QS_DEVICE uint32_t low(int i) const { return word(1, i); }
  // The scale of weight row r in this warp's group of a round. Only after the first next().
  QS_DEVICE float scale(int panel, int32_t round, int r) const {
    return half_to_float(load_shared(scales_ + ((panel * kWarps) * rounds_ + round) * kPanelRows + r));
  }

 private:
  QS_DEVICE uint32_t word(int plane, int i) const {
    return load_shared(reinterpret_cast<const uint32_t*>(ring_ + (slot_ * 2 + plane) * kPlaneBytes) + word_[i]);
  }

  QS_DEVICE void start() {
    QS_UNROLL_BY(1)
    for (uint32_t slot = 0; slot < kSlots - 1; ++slot) request(slot);
  }

  QS_DEVICE void request(uint32_t slot) {
    const bool second = kPanels == 2 && panel_ == 1;
    request_chunk((second ? from_[kPanels - 1] : from_[0]) + at_, (second ? end_[kPanels - 1] : end_[0]) - at_,
                  ring_ + slot * (2 * kPlaneBytes) + to_);
    cp_async_commit();
    at_ += piece_bytes_;
    if (++step_ < steps_) return;
    step_ = 0;
    if (kPanels == 2 && !second) {
      panel_ = 1;
      at_ -= steps_ * piece_bytes_;
    } else {
      panel_ = 0;
      at_ += (kWarps - 1) * steps_ * piece_bytes_;
    }
  }

  QS_DEVICE void request_chunk(const uint8_t* from, int32_t left, uint8_t* to) {
    if (left >= 16) {
      cp_async16(to, from, true);
    } else {  // a narrow panel may end within a chunk
      QS_UNROLL_BY(1)
      for (int32_t i = 0; i < left; i += 4) {
        store_shared(reinterpret_cast<uint32_t*>(to + i), load(reinterpret_cast<const uint32_t*>(from + i)));
      }
    }
  }

  // They belong to the first piece's copies.
  QS_DEVICE void request_scales(const Panel& panel, int32_t groups, uint16_t* to) {
    QS_UNROLL_BY(1)
    for (int32_t i = lane(); i < rounds_ * 2 && panel.rows == kPanelRows; i += kWarp) {
      const int32_t group = i / 2 * kWarps + warp();
      if (group < groups) cp_async16(to + i * 8, panel.scale + group * kPanelRows + i % 2 * 8, true);
    }
    QS_UNROLL_BY(1)
    for (int32_t i = lane(); i < rounds_ * kPanelRows && panel.rows < kPanelRows; i += kWarp) {
      const int32_t group = i / kPanelRows * kWarps + warp(), r = i % kPanelRows;
      if (group < groups && r < panel.rows) store_shared(to + i, load_once(panel.scale + group * panel.rows + r));
    }
  }

  uint8_t* ring_;
  int32_t rounds_;
  uint16_t* scales_;
  const uint8_t* from_[kPanels];  // this lane's plane: the high one in lanes 0..15, else the low one
  int32_t end_[kPanels];          // bytes of it, 0 where the lane takes no part
  int32_t steps_, piece_bytes_;
  int32_t to_;                         // where in a slot this lane's chunk goes
  int32_t word_[2];                    // where in a plane of a slot its words are
  uint32_t slot_ = kSlots - 1;         // of the piece that was waited for
  int32_t at_, step_ = 0, panel_ = 0;  // this lane's chunk of the piece to request next
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
QS_KERNEL void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2) decode_kernel(const Stage stage) {
  using Layout = Shared<kTiles>;
  constexpr int kPanels = Stage::kPanels;
  constexpr int kOwned = (Layout::kTerms + kThreads - 1) / kThreads;  // outputs of a thread, in each panel
  char* const shared = shared_memory<char>();
  float* const exchange = reinterpret_cast<float*>(shared + Layout::kExchange);
  void* const scratch = exchange;
  int32_t* const flag = reinterpret_cast<int32_t*>(shared + Layout::kFlag);

  int32_t count = static_cast<int32_t>(stage.x.rows);
  if (stage.device_count) count = minimum(count, load(stage.device_count));
  if (count <= 0) return;
  int32_t ticket = 0;  // on its way while the first pieces are requested
  if (Stage::kPerforms && threadIdx.x == 0) ticket = atomic_add(stage.counters + kTicket, 1);
  const int32_t tiles = (count + kTileRows - 1) / kTileRows;
  const auto has_tile = [&](int t) { return t == 0 || t < tiles; };  // the same for the whole block

  Panel panels[kPanels];
  for (int p = 0; p < kPanels; ++p) panels[p] = stage.panel(p);
  Pieces<kPanels, Layout::kSlots> pieces(panels, stage.x, reinterpret_cast<uint8_t*>(shared + Layout::kRing),
                                         reinterpret_cast<uint16_t*>(shared + Layout::kScales));
  pieces.start_high();
  bool eight = lane() < count;
  if (eight && stage.bits) {
    eight = load(stage.bits + (stage.bits_index ? load(stage.bits_index + lane()) : lane())) == 8;
  }
  const uint32_t eight_rows = ballot(eight);
  pieces.start_low(eight_rows != 0);
  if constexpr (Stage::kPerforms) perform_tasks(stage, count, ticket, scratch, flag);

  // In fragments lane 4 * g + t has rows g and g + 8 of the panel, and of a tile of x rows 2t and 2t + 1 of the
  // product, row g of the factor.
  const int g = lane() / 4, t4 = lane() % 4;
  const int32_t width = static_cast<int32_t>(stage.x.k_padded);  // offsets in so few rows are small
  const int32_t groups = static_cast<int32_t>(stage.x.groups);
  const int32_t steps = stage.x.group / kPieceValues;
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

  // The terms of this warp's group of a round and of panel p, to `terms`. The first values of x are there already, and
  // when it returns those at `next_k`, where the warp goes on, are on their way.
  const auto multiply = [&](int p, int32_t round, int32_t next_k, float* terms) {
    const uint32_t eights = panels[p].lo ? eight_rows : 0;
    const int32_t group = round * kWarps + warp();
    float x_scale[kTiles][2];
    int32_t x_sum[kTiles][2];
    const auto load_scales = [&](int t) {
      QS_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int row = t * kTileRows + 2 * t4 + j;
        const int32_t at = row * groups + group;
        x_scale[t][j] = row < count ? load(stage.x.scale + at) : 0;
        x_sum[t][j] = row < count ? load(stage.x.sum + at) : 0;
      }
    };
    if constexpr (kTiles == 1) load_scales(0);  // early, where there are registers to hold them
    int32_t dot[kPlanes][kTiles][4] = {};
    int32_t k = group * stage.x.group + t4 * 8;
    QS_UNROLL_BY(1)
    for (int step = 1; step <= steps; ++step) {
      pieces.next();
      const uint32_t h0 = pieces.high(0), h1 = pieces.high(1);
      const uint32_t high[4] = {h0 << 4 & 0xf0f0f0f0, h1 << 4 & 0xf0f0f0f0, h0 & 0xf0f0f0f0, h1 & 0xf0f0f0f0};
      QS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!has_tile(t)) continue;
        QS_UNROLL
        for (int plane = 0; plane < kPlanes; ++plane) mma_u8s8(dot[plane][t], high, x[plane][t]);
      }
      if (eights != 0) {
        const uint32_t l0 = pieces.low(0), l1 = pieces.low(1);
        const uint32_t low[4] = {l0 & 0x0f0f0f0f, l1 & 0x0f0f0f0f, l0 >> 4 & 0x0f0f0f0f, l1 >> 4 & 0x0f0f0f0f};
        QS_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          if (!has_tile(t)) continue;
          const uint32_t keep = 0u - (eights >> (t * kTileRows + g) & 1);  // rows of 4 bits have no low nibbles
          QS_UNROLL
          for (int plane = 0; plane < kPlanes; ++plane) {
            mma_u8s8(dot[plane][t], low, {x[plane][t][0] & keep, x[plane][t][1] & keep});
          }
        }
      }
      k = step < steps ? k + kPieceValues : next_k;
      load_x(k);
    }
    const float w_scale[2] = {pieces.scale(p, round, g), pieces.scale(p, round, g + 8)};
    QS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (!has_tile(t)) continue;
      if constexpr (kTiles > 1) load_scales(t);
      QS_UNROLL
      for (int i = 0; i < 2; ++i) {
        float term[2];
        QS_UNROLL
        for (int j = 0; j < 2; ++j) {
          int32_t total = dot[0][t][2 * i + j];
          if constexpr (kPlanes == 2) total = total * 256 + dot[1][t][2 * i + j];
          total -= (eights >> (t * kTileRows + 2 * t4 + j) & 1 ? 136 : 128) * x_sum[t][j];
          term[j] = mul_rn(static_cast<float>(total), mul_rn(x_scale[t][j], w_scale[i]));
        }
        const int at = (t * kPanelRows + g + 8 * i) * kTileRows + 2 * t4;
        store_shared(reinterpret_cast<float2*>(terms + at), make_float2(term[0], term[1]));
      }
    }
  };

  // Of a group's terms, thread i owns i, i + kThreads ...: [tile][weight row][row of the tile].
  const int outputs = tiles * kTileRows * kPanelRows;
  float sum[kPanels][kOwned] = {};
  int which = 0;  // of the two places of exchange: one is written while the other is read
  const int32_t first_k = warp() * stage.x.group + t4 * 8;
  load_x(first_k);
  for (int32_t first = 0, round = 0; first < groups; first += kWarps, ++round) {
    QS_UNROLL
    for (int p = 0; p < kPanels; ++p) {
      float* const terms = exchange + which * kWarps * Layout::kTerms;
      if (first + warp() < groups) {
        const int32_t next_group = p + 1 < kPanels ? first : first + kWarps;
        multiply(p, round, next_group * stage.x.group + first_k, terms + warp() * Layout::kTerms);
      }
      sync_block();
      QS_UNROLL
      for (int j = 0; j < kOwned; ++j) {
        const int own = j * kThreads + static_cast<int>(threadIdx.x);
        if (own >= outputs) continue;
        QS_UNROLL
        for (int w = 0; w < kWarps; ++w) {
          if (first + w < groups) sum[p][j] = add_rn(sum[p][j], load_shared(terms + w * Layout::kTerms + own));
        }
      }
      which ^= 1;
    }
  }

  // Turned round, so that neighbouring threads have neighbouring columns. Nobody reads that place of exchange any more.
  // Quarters of a row are swapped: either side hits 32 banks.
  float* const turned = exchange + which * kWarps * Layout::kTerms;
  const auto turned_at = [&](int p, int row, int column) {
    return turned + (p * kTiles * kTileRows + row) * kPanelRows + (column ^ row / 2 % 4 * 4);
  };
  QS_UNROLL
  for (int p = 0; p < kPanels; ++p) {
    QS_UNROLL
    for (int j = 0; j < kOwned; ++j) {
      const int own = j * kThreads + static_cast<int>(threadIdx.x);
      const int row = own / (kTileRows * kPanelRows) * kTileRows + own % kTileRows;
      if (own < outputs) store_shared(turned_at(p, row, own / kTileRows % kPanelRows), sum[p][j]);
    }
  }
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < outputs; i += kThreads) {  // whole warps
    const int row = i / kPanelRows, column = i % kPanelRows;
    float y[kPanels];
    QS_UNROLL
    for (int p = 0; p < kPanels; ++p) y[p] = load_shared(turned_at(p, row, column));
    stage.write(row, panels[0].column + column, y, row < count && column < panels[0].rows);
  }
  if constexpr (Stage::kPerforms) {
    sync_block();
    stage.finish(panels[0], count, scratch);
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
    launch(name, decode_kernel<Stage, kTiles, kPlanes>, blocks_in_x(blocks), kThreads,
           Shared<kTiles>::bytes(stage.x.groups, Stage::kPanels), stream, stage);
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
