// GEMM of many INT8 rows with INT8 or INT4 Matryoshka weights, on tensor cores.
//
// A block computes a tile of weight rows times tokens. Its stages of 64 values of K come by cp.async, the weights as
// they are stored: the nibbles become codes on their way from shared memory to the MMA. Weights are the A operand, in
// which MMA row i is row 2i of the panel (i < 8) or 2(i - 8) + 1, so that one 8-byte load serves a lane and neighbours
// in y lie in one lane; tokens are the B operand.
//
// After each group the integer sums become fp32 and are added up, in the order that matryoshka.h promises. An integer
// below 2^22 in magnitude, added to the bits of 1.5 * 2^23, makes that float plus the integer: so sums start there,
// minus the part that belongs to the codes' zero, and one subtraction replaces the slow conversion. The largest sum is
// that of 128 codes of 135 times 127, half of that.
#include <cstring>

#include "device.cuh"
#include "launch.cuh"
#include "matryoshka_prefill.cuh"
#include "ptx.cuh"
#include "quantize.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kTokens = 64;       // of a tile
constexpr int kStageValues = 64;  // of K
constexpr int kStageLines = kStageValues / 8;
constexpr int kLineBytes = 64;
constexpr int kPanelBytes = kStageLines * kLineBytes;  // of one plane and stage
constexpr int kStages = 3;

struct Product {
  MatryoshkaWeight w;
  const float* bias;
  float* y;
  int64_t y_stride;
  unsigned first_tile;
};

struct Params {
  QuantizedRows x;
  const int32_t* count;
  const int32_t* bits;
  const int32_t* bits_index;
  const float* residual;
  const int32_t* out_index;
  Finish finish;
  Activation activation;
  const float* gate;
  int products;
  Product product[kPrefillProducts];
  unsigned token_tiles;  // the grid: tile by tile of the weights, in it tile by tile of the tokens
};

// Which bits the tokens of a tile have.
enum class Mode { four, eight, mixed };

// Chunk c of 16 bytes of line (or token) L is stored at c ^ 2 where L / 2 is odd: the lanes of half a warp read 8 bytes
// each of 4 lines, and so from 32 banks.
QS_DEVICE int swizzled(int line, int chunk) { return line * kLineBytes + ((chunk ^ (line & 2)) * 16); }

template <int kGroup, int kPanels, bool kSharedTotals>
struct Tile {
  static constexpr int kThreads = kPanels == 8 ? 256 : 128;
  static constexpr int kRowWarps = kPanels / 2;  // a warp has two panels
  static constexpr int kColumnWarps = kThreads / kWarp / kRowWarps;
  static constexpr int kTokenTiles = kTokens / 8 / kColumnWarps;                     // of a warp
  static constexpr int kGroups = kGroup < kStageValues ? kStageValues / kGroup : 1;  // of a stage
  static constexpr int kStagesOfGroup = kGroup > kStageValues ? kGroup / kStageValues : 1;
  static constexpr int kTokenStep = kThreads / 4;  // tokens that the threads copy at once, a chunk each
  static constexpr int kXChunks = kTokens / kTokenStep;

  struct Stage {
    uint8_t hi[kPanels * kPanelBytes];
    uint8_t lo[kPanels * kPanelBytes];
    uint8_t x[kTokens * kStageValues];
    // A warp writes two groups at once, where a stage has two: they are half the banks apart.
    int32_t start[kGroups][kTokens + 16];
    float x_scales[kGroups][2 * kTokens + 16];  // of two tokens: their scales, then their scaled sums
    uint32_t w_scale[kGroups][kPanels * 8];     // two rows in each
    uint32_t w_offset[kGroups][kPanels * 8];
  };
  // The sums of the segments before want more registers than there are. Where there is room, each thread has its own in
  // shared memory, four at a time, after the stages.
  static constexpr int64_t kStageBytes = kStages * static_cast<int64_t>(sizeof(Stage));
  static constexpr int64_t kSharedBytes = kStageBytes + (kSharedTotals ? kThreads * 2 * kTokenTiles * 16 : 0);
  static QS_DEVICE float4* shared_total(int i, int j) {
    return reinterpret_cast<float4*>(shared_memory<uint8_t>() + kStageBytes) + (i * kTokenTiles + j) * kThreads +
           thread();
  }

  const Params& params;
  int32_t token0, tokens;  // the tile's first token, and how many there are in all
  int32_t panel0, panels;  // the same of panels
  int32_t steps;
  bool has_lo;

  // The tile's parts of the weight and of the activations' scales.
  const uint8_t* hi;
  const uint8_t* lo;
  const uint16_t* w_scales;
  const uint16_t* w_offsets;
  const float* x_scales;
  const int32_t* x_sums;

  // What this thread copies of the next stage: 16 bytes of a line of either plane, in a panel of so many rows, and 16
  // of activations, or of two tokens. Nothing is left where the panel or the token doesn't exist.
  int32_t plane_at, panel_rows, lines_left;
  const int8_t* x_from;
  int32_t values_left[kXChunks];
  bool x_aligned;
  // The scales that it fetches, by way of registers: the first threads those of x, the last ones those of weights.
  int32_t x_scale_at, x_groups_left;
  int32_t w_scale_at, w_groups_left;
  int32_t scale_rows;  // of the panel
  int32_t zero;        // of the codes of that token
  float x_scale;
  int32_t x_sum;
  uint32_t w_scale, w_offset;

  static constexpr int kXItems = kGroups * kTokens, kWItems = kGroups * kPanels * 8;
  static QS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static QS_DEVICE int w_item() { return kThreads - 1 - thread(); }

  QS_DEVICE bool is_eight(int32_t token) const {
    if (!has_lo || token >= tokens) return false;
    if (params.bits == nullptr) return true;
    return load(params.bits + (params.bits_index ? load(params.bits_index + token) : token)) == 8;
  }

  QS_DEVICE void begin(const Product& product, int32_t tile) {
    const auto rows_of = [&](int32_t panel) {
      const int64_t left = product.w.n - static_cast<int64_t>(panel) * 16;
      return static_cast<int32_t>(minimum(maximum(left, 0), 16));
    };
    panel0 = tile * kPanels;
    panels = static_cast<int32_t>((product.w.n + 15) / 16);
    steps = static_cast<int32_t>((params.x.k_padded + kStageValues - 1) / kStageValues);
    has_lo = product.w.lo != nullptr;

    const int32_t k_padded = static_cast<int32_t>(params.x.k_padded), groups = static_cast<int32_t>(params.x.groups);
    const int64_t before = static_cast<int64_t>(panel0) * 16 * (k_padded / 2);
    hi = product.w.hi + before;
    lo = product.w.lo + (has_lo ? before : 0);
    w_scales = product.w.scale + static_cast<int64_t>(panel0) * 16 * groups;
    w_offsets = product.w.offset + static_cast<int64_t>(panel0) * 16 * groups;
    x_scales = params.x.scale + static_cast<int64_t>(token0) * groups;
    x_sums = params.x.sum + static_cast<int64_t>(token0) * groups;

    const int chunk = thread() % 4, line = thread() / 4 % kStageLines, panel = thread() / (4 * kStageLines);
    panel_rows = rows_of(panel0 + panel);
    plane_at = panel * (k_padded * 8) + line * panel_rows * 4 + chunk * 16;
    lines_left = panel_rows > 0 ? k_padded / 8 - line : 0;

    const int copied = token0 + thread() / 4;
    x_from = params.x.q + copied * params.x.k_padded + chunk * 16;
    for (int i = 0; i < kXChunks; ++i) {
      const bool exists = copied + i * kTokenStep < tokens;
      values_left[i] = exists ? k_padded - chunk * 16 : 0;
    }
    x_aligned = k_padded % 16 == 0 && reinterpret_cast<uintptr_t>(params.x.q) % 16 == 0;

    const int token = thread() / kGroups, x_group = thread() % kGroups;
    x_scale_at = token * groups + x_group;
    x_groups_left = thread() < kXItems && token0 + token < tokens ? groups - x_group : 0;
    zero = is_eight(token0 + token) ? kStepCodes : 0;
    const int w_panel = w_item() / 8 % kPanels, w_group = w_item() / (8 * kPanels), row = w_item() % 8 * 2;
    scale_rows = rows_of(panel0 + w_panel);
    w_scale_at = w_panel * groups * 16 + w_group * scale_rows + row;
    w_groups_left = w_item() < kWItems && row < scale_rows ? groups - w_group : 0;
  }

  QS_DEVICE void fetch_plane(const uint8_t* plane, uint8_t* to) const {
    const int chunk = thread() % 4, line = thread() / 4 % kStageLines, panel = thread() / (4 * kStageLines);
    if (panel >= kPanels) return;
    const uint8_t* const from = plane + plane_at;
    to += panel * kPanelBytes + swizzled(line, chunk);
    if (panel_rows == 16 || lines_left <= 0) return cp_async16(to, from, lines_left > 0);
    uint32_t word[4];  // of a narrow panel, whose lines aren't made of whole chunks
    for (int i = 0; i < 4; ++i) {
      word[i] = chunk * 4 + i < panel_rows ? load(reinterpret_cast<const uint32_t*>(from + i * 4)) : 0;
    }
    store_shared(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  }

  QS_DEVICE void fetch_x(uint8_t* to) const {
    for (int i = 0; i < kXChunks; ++i) {
      const int8_t* const from = x_from + i * kTokenStep * params.x.k_padded;
      uint8_t* const place = to + swizzled(thread() / 4 + i * kTokenStep, thread() % 4);
      if (x_aligned || values_left[i] <= 0) {
        cp_async16(place, from, values_left[i] > 0);
      } else {
        const uint2 a = load(reinterpret_cast<const uint2*>(from));
        const uint2 b = values_left[i] > 8 ? load(reinterpret_cast<const uint2*>(from + 8)) : make_uint2(0, 0);
        store_shared(reinterpret_cast<uint4*>(place), make_uint4(a.x, a.y, b.x, b.y));
      }
    }
  }

  // Requests the next stage. Its scales are in registers until store_scales.
  template <bool kReadsLo>
  QS_DEVICE void fetch(Stage& stage, int32_t step) {
    fetch_plane(hi, stage.hi);
    if constexpr (kReadsLo) fetch_plane(lo, stage.lo);
    fetch_x(stage.x);
    cp_async_commit();
    plane_at += kStageLines * 4 * panel_rows;
    lines_left -= kStageLines;
    x_from += kStageValues;
    for (int32_t& left : values_left) left -= kStageValues;

    x_scale = 0;
    x_sum = 0;
    w_scale = 0;
    if (x_groups_left > 0) {
      x_scale = load(x_scales + x_scale_at);
      x_sum = load(x_sums + x_scale_at);
    }
    w_offset = 0;
    if (w_groups_left > 0) {
      w_scale = two_rows(w_scales + w_scale_at);
      w_offset = two_rows(w_offsets + w_scale_at);
    }
    if ((step + 1) % kStagesOfGroup == 0) {
      x_scale_at += kGroups;
      w_scale_at += kGroups * scale_rows;
      x_groups_left -= kGroups;
      w_groups_left -= kGroups;
    }
  }

  // Of scales or offsets.
  QS_DEVICE uint32_t two_rows(const uint16_t* from) const {
    if (scale_rows == 16) return load(reinterpret_cast<const uint32_t*>(from));
    return load(from) | (w_item() % 8 * 2 + 1 < scale_rows ? static_cast<uint32_t>(load(from + 1)) << 16 : 0);
  }

  QS_DEVICE void store_scales(Stage& stage) const {
    if (thread() < kXItems) {
      const int group = thread() % kGroups, token = thread() / kGroups;
      float* const to = &stage.x_scales[group][token / 2 * 4 + token % 2];
      store_shared(to, mul_rn(x_scale, kCodeUnit));
      store_shared(to + 2, mul_rn(static_cast<float>(x_sum), x_scale));
      store_shared(&stage.start[group][token], kMagic - zero * x_sum);
    }
    if (w_item() < kWItems) {
      store_shared(&stage.w_scale[0][0] + w_item(), w_scale);
      store_shared(&stage.w_offset[0][0] + w_item(), w_offset);
    }
  }

  // total: the lane's sums. Weight rows 2g and 2g + 1 of each of the warp's panels, tokens 2t and 2t + 1 of each 8: row
  // 2g's come first.
  template <Mode kMode>
  QS_DEVICE void run(float (&total)[2][kTokenTiles][4]) {
    constexpr bool kReadsLo = kMode != Mode::four;
    const int g = lane() / 4, t = lane() % 4;
    uint32_t eight = 0;  // mixed: bit j says that the token of this lane's operand B in tile j has 8 bits
    if constexpr (kMode == Mode::mixed) {
      for (int j = 0; j < kTokenTiles; ++j) {
        eight |= static_cast<uint32_t>(is_eight(token0 + warp_token0() + j * 8 + g)) << j;
      }
    }
    // Where this lane's operands are in a stage.
    const int w_at = row_warp() * 2 * kPanelBytes + swizzled(t, g / 2) + g % 2 * 8;
    const int x_at = warp_token0() * kStageValues + swizzled(g, t / 2) + t % 2 * 8;

    const bool busy = any(panel0 + row_warp() * 2 < panels && token0 + warp_token0() < tokens);

    int32_t dot[2][kTokenTiles][4];
    float acc[2][kTokenTiles][4] = {};
    const int32_t groups = static_cast<int32_t>(params.x.groups);
    int32_t done = 0, segment = 0;
    const auto end_group = [&] {
      ++done;
      while (first_of_segment(segment + 1, groups) < done) ++segment;
      if (first_of_segment(segment + 1, groups) != done) return;
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < kTokenTiles; ++j) {
          float (&sum)[4] = acc[i][j];
          if constexpr (kSharedTotals) {
            const float4 before = load_shared(shared_total(i, j));
            store_shared(shared_total(i, j), make_float4(add_rn(before.x, sum[0]), add_rn(before.y, sum[1]),
                                                         add_rn(before.z, sum[2]), add_rn(before.w, sum[3])));
          } else {
            for (int c = 0; c < 4; ++c) total[i][j][c] = add_rn(total[i][j][c], sum[c]);
          }
          for (float& each : sum) each = 0;
        }
      }
    };
    if constexpr (kSharedTotals) {
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < kTokenTiles; ++j) store_shared(shared_total(i, j), make_float4(0, 0, 0, 0));
      }
    }
    Stage* const stages = shared_memory<Stage>();
    for (int step = 0; step < kStages - 1; ++step) {
      fetch<kReadsLo>(stages[step], step);
      store_scales(stages[step]);
    }
    int slot = 0;
    for (int32_t step = 0; step < steps; ++step) {
      const Stage& stage = stages[slot];
      Stage& later = stages[slot == 0 ? kStages - 1 : slot - 1];
      slot = slot + 1 == kStages ? 0 : slot + 1;
      cp_async_wait<kStages - 2>();
      sync_block();  // this stage is there for all, and nobody reads the one before it any more
      fetch<kReadsLo>(later, step + kStages - 1);
      if (busy) {
        QS_UNROLL_BY(kGroup == 32 ? 1 : 2)      // two groups at once want too many registers
        for (int part = 0; part < 2; ++part) {  // 32 values each
          constexpr int kPartsOfGroup = kGroup == 32 ? 1 : 2;
          const int group = kGroup == 32 ? part : 0;
          if (part % kPartsOfGroup == 0 && step % kStagesOfGroup == 0) {
            for (int j = 0; j < kTokenTiles; ++j) {
              const int at = warp_token0() + j * 8 + t * 2;
              const int2 start = load_shared(reinterpret_cast<const int2*>(&stage.start[group][at]));
              for (int i = 0; i < 2; ++i) {
                dot[i][j][0] = dot[i][j][2] = start.x;
                dot[i][j][1] = dot[i][j][3] = start.y;
              }
            }
          }
          for (int pass = 0; pass < (kMode == Mode::mixed ? 2 : 1); ++pass) {  // the second: low nibbles, 8 bits only
            uint32_t codes[2][4];
            for (int i = 0; i < 2; ++i) {
              const int at = w_at + i * kPanelBytes + part * 4 * kLineBytes;
              const auto words = [&](const uint8_t* plane, bool wanted) {
                return wanted ? load_shared(reinterpret_cast<const uint2*>(plane + at)) : make_uint2(0, 0);
              };
              const uint2 high = words(stage.hi, pass == 0), low = words(stage.lo, kMode == Mode::eight || pass == 1);
              unpack(high.x, low.x, codes[i][0], codes[i][2]);
              unpack(high.y, low.y, codes[i][1], codes[i][3]);
            }
            for (int j = 0; j < kTokenTiles; ++j) {
              const int at = (x_at + j * 8 * kStageValues) ^ (part * 32);
              const uint2 x = load_shared(reinterpret_cast<const uint2*>(stage.x + at));
              const uint32_t mask = pass == 0 ? ~0u : 0u - (eight >> j & 1);
              const uint32_t b[2] = {x.x & mask, x.y & mask};
              for (int i = 0; i < 2; ++i) mma_u8s8(dot[i][j], codes[i], b, dot[i][j]);
            }
          }
          if ((part + 1) % kPartsOfGroup == 0 && ((step + 1) % kStagesOfGroup == 0 || step + 1 == steps)) {
            add_group(stage, group, dot, acc);
            end_group();
          }
        }
      }
      store_scales(later);
    }
    cp_async_wait<0>();
    if constexpr (kSharedTotals) {
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < kTokenTiles; ++j) {
          const float4 sum = load_shared(shared_total(i, j));
          const float each[4] = {sum.x, sum.y, sum.z, sum.w};
          for (int c = 0; c < 4; ++c) total[i][j][c] = each[c];
        }
      }
    }
  }

  // This warp's share of the tile.
  static QS_DEVICE int row_warp() { return warp() % kRowWarps; }
  static QS_DEVICE int warp_token0() { return warp() / kRowWarps * kTokenTiles * 8; }

  // The codes of 8 values of one row, whose nibbles come as stored: of k..k+3, and of k+4..k+7. No sum carries out of
  // its byte.
  static QS_DEVICE void unpack(uint32_t high, uint32_t low, uint32_t& first, uint32_t& second) {
    constexpr uint32_t kLow = 0x0f0f0f0f;
    first = ((high & kLow) << 3) + (low & kLow);
    second = (high >> 1 & 0x78787878) + ((low & ~kLow) >> 4);
  }

  QS_DEVICE void add_group(const Stage& stage, int group, const int32_t (&dot)[2][kTokenTiles][4],
                           float (&acc)[2][kTokenTiles][4]) const {
    const int g = lane() / 4, t = lane() % 4;
    float weight[2][2], offset[2][2];
    for (int i = 0; i < 2; ++i) {
      const int at = (row_warp() * 2 + i) * 8 + g;
      const uint32_t pair = load_shared(&stage.w_scale[group][at]);
      weight[i][0] = half_to_float(static_cast<uint16_t>(pair));
      weight[i][1] = half_to_float(static_cast<uint16_t>(pair >> 16));
      const uint32_t offsets = load_shared(&stage.w_offset[group][at]);
      offset[i][0] = half_to_float(static_cast<uint16_t>(offsets));
      offset[i][1] = half_to_float(static_cast<uint16_t>(offsets >> 16));
    }
    for (int j = 0; j < kTokenTiles; ++j) {
      const int token = warp_token0() + j * 8 + t * 2;
      const float4 of = load_shared(reinterpret_cast<const float4*>(&stage.x_scales[group][token * 2]));
      const float scale[2] = {of.x, of.y}, scaled_sum[2] = {of.z, of.w};
      for (int i = 0; i < 2; ++i) {
        for (int c = 0; c < 4; ++c) {
          const float sum = without_magic(dot[i][j][c]);
          const float of_codes = fma_rn(sum, mul_rn(scale[c % 2], weight[i][c / 2]), acc[i][j][c]);
          acc[i][j][c] = fma_rn(scaled_sum[c % 2], offset[i][c / 2], of_codes);
        }
      }
    }
  }

  QS_DEVICE void write_out(const Product& product, const float (&total)[2][kTokenTiles][4]) const {
    const int g = lane() / 4, t = lane() % 4;
    const auto odd = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 8 != 0; };
    const bool pairs = product.y_stride % 2 == 0 && !odd(product.y) && !odd(params.residual) && !odd(params.gate);
    QS_UNROLL  // total must stay in registers
        for (int i = 0; i < 2; ++i) {
      const int64_t n = (panel0 + row_warp() * 2 + i) * 16 + g * 2;
      const int columns = n + 1 < product.w.n ? 2 : n < product.w.n ? 1 : 0;
      const float2 bias = product.bias ? load_pair(product.bias + n, columns, false) : make_float2(0, 0);
      QS_UNROLL
      for (int j = 0; j < kTokenTiles; ++j) {
        QS_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int32_t token = token0 + warp_token0() + j * 8 + t * 2 + c;
          if (token >= tokens || columns == 0) continue;
          const int64_t at = (params.out_index ? load(params.out_index + token) : token) * product.y_stride + n;
          float2 v = make_float2(total[i][j][c], total[i][j][c + 2]);
          if (product.bias) v = make_float2(add_rn(v.x, bias.x), add_rn(v.y, bias.y));
          if (params.residual) {
            const float2 r = load_pair(params.residual + at, columns, pairs);
            v = make_float2(add_rn(r.x, v.x), add_rn(r.y, v.y));
          }
          if (params.finish == Finish::silu_gated) {
            const float2 gate = load_pair(params.gate + at, columns, pairs);
            v = make_float2(silu_gated(gate.x, v.x), silu_gated(gate.y, v.y));
          } else if (params.finish == Finish::activation) {
            v = make_float2(activate(params.activation, v.x), activate(params.activation, v.y));
          }
          if (pairs && columns == 2) {
            store(reinterpret_cast<float2*>(product.y + at), v);
          } else {
            store(product.y + at, v.x);
            if (columns == 2) store(product.y + at + 1, v.y);
          }
        }
      }
    }
  }

  static QS_DEVICE float2 load_pair(const float* from, int columns, bool aligned_pairs) {
    if (aligned_pairs && columns == 2) return load(reinterpret_cast<const float2*>(from));
    return make_float2(columns > 0 ? load(from) : 0.0f, columns > 1 ? load(from + 1) : 0.0f);
  }
};

template <int kGroup, int kPanels, bool kSharedTotals>
QS_KERNEL void __launch_bounds__(Tile<kGroup, kPanels, kSharedTotals>::kThreads,
                                 512 / Tile<kGroup, kPanels, kSharedTotals>::kThreads)
    matryoshka_prefill_kernel(Params params) {
  using Block = Tile<kGroup, kPanels, kSharedTotals>;
  const int32_t tokens = params.count ? load(params.count) : static_cast<int32_t>(params.x.rows);
  const int32_t token0 = static_cast<int32_t>(blockIdx.x % params.token_tiles) * kTokens;
  if (token0 >= tokens) return;
  const unsigned tile = blockIdx.x / params.token_tiles;
  const auto product = [&] {
    if (params.products > 2 && tile >= params.product[2].first_tile) return params.product[2];
    if (params.products > 1 && tile >= params.product[1].first_tile) return params.product[1];
    return params.product[0];
  };
  Block block{params, token0, tokens};
  block.begin(product(), static_cast<int32_t>(tile - product().first_tile));

  bool some_eight = false, some_four = false;
  for (int i = lane(); i < kTokens; i += kWarp) {
    if (token0 + i < tokens) (block.is_eight(token0 + i) ? some_eight : some_four) = true;
  }
  some_eight = any(some_eight);
  some_four = any(some_four);
  float total[2][Block::kTokenTiles][4] = {};
  if (!some_eight) {
    block.template run<Mode::four>(total);
  } else if (!some_four) {
    block.template run<Mode::eight>(total);
  } else {
    block.template run<Mode::mixed>(total);
  }
  block.write_out(product(), total);
}

template <int kGroup, int kPanels, bool kSharedTotals>
void start(Params& params, Stream stream) {
  using Block = Tile<kGroup, kPanels, kSharedTotals>;
  unsigned tiles = 0;
  for (int i = 0; i < params.products; ++i) {
    params.product[i].first_tile = tiles;
    tiles += static_cast<unsigned>((params.product[i].w.n + kPanels * 16 - 1) / (kPanels * 16));
  }
  params.token_tiles = static_cast<unsigned>((params.x.rows + kTokens - 1) / kTokens);
  // Blocks that share weights start together, so that these come from memory once.
  launch("matryoshka_prefill", matryoshka_prefill_kernel<kGroup, kPanels, kSharedTotals>,
         blocks_in_x(int64_t{tiles} * params.token_tiles), Block::kThreads, Block::kSharedBytes, stream, params);
}

template <int kGroup>
void choose_tile(Params& params, Stream stream) {
  // Tiles of 128 weight rows want the fewest bytes; where there are too few of them for a GPU, tiles of 32.
  constexpr int64_t kEnoughBlocks = 256;
  int64_t rows = 0;
  for (int i = 0; i < params.products; ++i) rows += params.product[i].w.n;
  const int64_t blocks = (params.x.rows + kTokens - 1) / kTokens * ((rows + 127) / 128);
  if (blocks < kEnoughBlocks) return start<kGroup, 2, false>(params, stream);
  const bool room = shared_memory_limit() >= 2 * Tile<kGroup, 8, true>::kSharedBytes;
  (room ? start<kGroup, 8, true> : start<kGroup, 8, false>)(params, stream);
}

void choose_group(Params& params, Stream stream) {
  if (params.x.group == 32) return choose_tile<32>(params, stream);
  if (params.x.group == 64) return choose_tile<64>(params, stream);
  choose_tile<128>(params, stream);
}

}  // namespace

void prefill_gemm(const PrefillGemm& gemm, const int32_t* count, Stream stream) {
  const MatryoshkaGemm& first = gemm.products[0];
  Params params = {};
  params.x = first.x;
  params.count = count;
  params.bits = first.bits;
  params.bits_index = gemm.bits_index;
  params.residual = first.residual;
  params.out_index = first.out_index;
  params.finish = gemm.finish;
  params.activation = gemm.activation;
  params.gate = gemm.gate;
  params.products = gemm.count;
  for (int i = 0; i < gemm.count; ++i) {
    const MatryoshkaGemm& product = gemm.products[i];
    params.product[i] = {product.w, product.bias, product.y, product.y_stride, 0};
  }
  choose_group(params, stream);
}

}  // namespace quicksilver::QS_CUDA
