// Tensor-core attention for few queries per sequence: a block has the heads of one query that share a KV head, 16 at
// most, and one or more splits of the sequence. Its four warps work on one tile together: each has 16 of the 64
// entries, and then a part of the head's columns.
#include "attention_tile.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kStages = 3;
constexpr int kHeads = 16;

struct DecodeShared {
  Entries entries;
  uint4 weights[2][kChunks][kWarp];    // high and low parts of the probabilities, as the MMA's operand
  float2 sums[kChunks][kWarp];         // of a lane's probabilities in its two rows
  float top[kAttentionWarps][kHeads];  // the largest score of each warp's entries
  int32_t votes[kAttentionWarps];
  bool last;
};

template <KvType kType, int kSize>
constexpr int64_t kDecodeBytes = sizeof(DecodeShared) + kTilesBytes<kType, kSize, kStages>;

QS_DEVICE uint4 packed(const uint32_t (&x)[4]) { return {x[0], x[1], x[2], x[3]}; }
QS_DEVICE void unpack(const uint4& x, uint32_t (&out)[4]) {
  out[0] = x.x;
  out[1] = x.y;
  out[2] = x.z;
  out[3] = x.w;
}

// Blocks of 16 columns of the head: warp w has blocks w and w + 4, where there are so many.
template <int kSize>
constexpr int kBlocks = (kSize / 16 + kAttentionWarps - 1) / kAttentionWarps;

// One split, for rows of this block. Every warp gets all rows' tops and sums, and its own columns of the values.
template <KvType kType, int kSize>
QS_DEVICE void attend_split(const KvCache& cache, const Query<kSize>& query, int32_t position, unsigned seen_tiles,
                            unsigned hidden_tiles, bool careful, DecodeShared* shared, char* tiles,
                            Softmax (&softmax)[2], float (&out)[kBlocks<kSize>][2][4]) {
  const int g = lane() / 4, t = lane() % 4;
  const Entries* entries = &shared->entries;
  const int32_t positions[2] = {position, position};
  float top[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0, 0}, alpha[2];
  QS_UNROLL
  for (int b = 0; b < kBlocks<kSize>; ++b) {
    QS_UNROLL
    for (int i = 0; i < 8; ++i) out[b][i / 4][i % 4] = 0;
  }
  for_tiles<kType, kSize, kStages>(
      cache, entries, tiles, seen_tiles,
      [&](int tile, const char* keys) {
        float s[2][4];
        score_chunk<kType, kSize>(query, keys, entries, tile, warp(), s);
        bool seen[2];
        if (hidden_tiles >> tile & 1) hide(entries, tile, warp(), positions, s, seen);
        QS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const float largest =
              quad_max(maximum(maximum(s[0][2 * r], s[0][2 * r + 1]), maximum(s[1][2 * r], s[1][2 * r + 1])));
          if (t == 0) store_shared(&shared->top[warp()][g + 8 * r], largest);
        }
        sync_block();
        // All rows are of one query, so all of them see something in this tile.
        QS_UNROLL
        for (int r = 0; r < 2; ++r) {
          float largest = top[r];
          QS_UNROLL
          for (int w = 0; w < kAttentionWarps; ++w) {
            largest = maximum(largest, load_shared(&shared->top[w][g + 8 * r]));
          }
          alpha[r] = exp(sub_rn(top[r], largest));
          top[r] = largest;
        }
        float part[2];
        Parts weights;
        weigh_chunk<kType>(entries, tile, warp(), s, top, part, weights);
        store_shared(&shared->sums[warp()][lane()], make_float2(part[0], part[1]));
        store_shared(&shared->weights[0][warp()][lane()], packed(weights.high));
        store_shared(&shared->weights[1][warp()][lane()], packed(weights.low));
      },
      [&](int tile, const char* values) {
        float2 tile_sum = {0, 0};
        QS_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          const float2 part = load_shared(&shared->sums[c][lane()]);
          tile_sum = {add_rn(tile_sum.x, part.x), add_rn(tile_sum.y, part.y)};
        }
        sum[0] = fma_rn(sum[0], alpha[0], tile_sum.x);
        sum[1] = fma_rn(sum[1], alpha[1], tile_sum.y);
        const float unit = value_unit<kType>(entries, tile);
        Parts weights[kChunks];
        QS_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          unpack(load_shared(&shared->weights[0][c][lane()]), weights[c].high);
          unpack(load_shared(&shared->weights[1][c][lane()]), weights[c].low);
        }
        QS_UNROLL
        for (int b = 0; b < kBlocks<kSize>; ++b) {
          const int block = warp() + b * kAttentionWarps;
          if (block >= kSize / 16) continue;
          if (kType != KvType::i8 && careful) {
            add_values_carefully<kType, kSize>(entries, tile, weights, values, block, unit, positions, alpha, out[b]);
          } else {
            add_values<kType, kSize>(weights, values, block, unit, alpha, out[b]);
          }
        }
      });
  QS_UNROLL
  for (int r = 0; r < 2; ++r) softmax[r] = {top[r], quad_sum(sum[r])};
}

template <KvType kType, int kSize>
QS_KERNEL void __launch_bounds__(kAttentionThreads, 2)
    attention_decode_kernel(Attention params, const int32_t* count, AttentionScratch scratch) {
  launch_next();
  wait_for_launch_before();
  const KvCache& cache = params.cache;
  DecodeShared* shared = shared_memory<DecodeShared>();
  char* tiles = reinterpret_cast<char*>(shared + 1);
  // In the grid: query by query, in it by (KV head, tile of heads), and then the blocks that share the splits.
  const int share = static_cast<int>(blockIdx.x) % scratch.blocks, rest = static_cast<int>(blockIdx.x) / scratch.blocks;
  const int heads_per_kv = static_cast<int>(params.heads / cache.kv_heads);
  const int head_tiles = (heads_per_kv + kHeads - 1) / kHeads;
  const int of_query = static_cast<int>(cache.kv_heads) * head_tiles;
  const int64_t i = rest / of_query;
  if (i >= row_count(params, count)) return;
  const int64_t kv_head = rest % of_query / head_tiles;
  const int first = rest % of_query % head_tiles * kHeads;
  const int64_t first_head = kv_head * heads_per_kv + first;
  const int heads = heads_per_kv - first < kHeads ? heads_per_kv - first : kHeads;
  const int32_t row = batch_row(params, i);
  const int32_t sequence = load(params.query_sequence + row), position = load(params.query_positions + row);
  const int length = length_of(cache, sequence);
  const int splits = (length + kSplit - 1) / kSplit;
  const int blocks = splits < 1 ? 1 : splits < scratch.blocks ? splits : scratch.blocks;
  if (share >= blocks) return;

  const int g = lane() / 4, t = lane() % 4;
  Query<kSize> query;
  const float* rows[2];
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    rows[r] = g + 8 * r < heads ? params.query + i * params.query_stride + (first_head + g + 8 * r) * kSize : nullptr;
  }
  load_query<kType, kSize>(query, rows, params.scale);

  // A block that has all splits merges them as it goes.
  const bool alone = blocks == 1;
  Softmax total[2];
  float merged[kBlocks<kSize>][2][4] = {};
  for (int split = share; split < splits; split += blocks) {
    const TileMasks masks = find_entries<kType == KvType::i8>(cache, sequence, kv_head, split, length,
                                                              {position, position}, &shared->entries);
    Softmax softmax[2];
    float out[kBlocks<kSize>][2][4];
    for (bool careful = false;; careful = true) {
      attend_split<kType, kSize>(cache, query, position, masks.seen, masks.hidden, careful, shared, tiles, softmax,
                                 out);
      if (kType == KvType::i8 || careful) break;
      bool finite = true;
      QS_UNROLL
      for (int b = 0; b < kBlocks<kSize>; ++b) finite &= all_finite(out[b]);
      if (!any_in_block(!finite, shared->votes)) break;
    }
    QS_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (alone) {
        if (softmax[r].sum == 0) continue;
        const MergeFactors factors = merge(total[r], softmax[r]);
        QS_UNROLL
        for (int j = 0; j < kBlocks<kSize> * 4; ++j) {
          float& x = merged[j / 4][j / 2 % 2][2 * r + j % 2];
          x = merge(x, out[j / 4][j / 2 % 2][2 * r + j % 2], factors);
        }
      } else if (g + 8 * r < heads) {
        const int64_t part = (i * params.heads + first_head + g + 8 * r) * scratch.splits + split;
        if (warp() == 0 && t == 0) store(scratch.softmax + part, make_float2(softmax[r].top, softmax[r].sum));
        QS_UNROLL
        for (int j = 0; j < kBlocks<kSize> * 2; ++j) {
          const int block = warp() + j / 2 * kAttentionWarps;
          if (block < kSize / 16) {
            store(reinterpret_cast<float2*>(scratch.values + part * kSize + block * 16 + j % 2 * 8 + t * 2),
                  make_float2(out[j / 2][j % 2][2 * r], out[j / 2][j % 2][2 * r + 1]));
          }
        }
      }
    }
  }

  if (!alone) {
    if (last_block(scratch.counters + i * params.heads + first_head, blocks, &shared->last)) {
      merge_splits(params, scratch, i, first_head, heads, splits);
    }
    return;
  }
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (g + 8 * r >= heads) continue;
    const int64_t head = first_head + g + 8 * r;
    const float inverse = inverse_sum(total[r]);
    QS_UNROLL
    for (int n = 0; n < kBlocks<kSize> * 2; ++n) {
      const int block = warp() + n / 2 * kAttentionWarps;
      if (block >= kSize / 16) continue;
      const float (&x)[4] = merged[n / 2][n % 2];
      store(
          reinterpret_cast<float2*>(params.out + i * params.out_stride + head * kSize + block * 16 + n % 2 * 8 + t * 2),
          make_float2(mul_rn(x[2 * r], inverse), mul_rn(x[2 * r + 1], inverse)));
    }
    if (params.log_sum_exp && warp() == 0 && t == 0) {
      store(params.log_sum_exp + i * params.heads + head, log_sum_exp(total[r]));
    }
  }
}

}  // namespace

void decode_attention(const Attention& params, const int32_t* count, const AttentionScratch& scratch, Stream stream) {
  const int64_t heads_per_kv = params.heads / params.cache.kv_heads;
  const int64_t rows_of_heads = params.cache.kv_heads * ((heads_per_kv + kHeads - 1) / kHeads);
  AttentionScratch shared = scratch;
  shared.blocks = split_blocks(scratch, params.count * rows_of_heads);
  const Dim grid = blocks_in_x(params.count * rows_of_heads * shared.blocks);
  for_tensor_kind(params.cache, [&]<KvType kType, int kSize>() {
    launch_overlapping("attention_decode_kernel", attention_decode_kernel<kType, kSize>, grid, kAttentionThreads,
                       kDecodeBytes<kType, kSize>, stream, params, count, shared);
  });
}

}  // namespace quicksilver::QS_CUDA
