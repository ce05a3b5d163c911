// Tensor-core attention for many queries per sequence: a block has 64 rows of one KV head, 16 for each of its four
// warps. A row is a query and one of the heads that share the KV head; a query's rows are neighbours. The queries of a
// block may belong to several sequences, which are gone through one after another.
#include "attention_tile.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kStages = 2;
constexpr int kRows = 16 * kAttentionWarps;

struct PrefillShared {
  Entries entries;
  // Of the block's queries.
  int32_t sequence[kRows];
  int32_t position[kRows];
  int32_t length[kRows];  // of the sequence; -1 where an earlier query has the same one
  Span span[kRows];       // of all queries of the sequence
  // Of the rows. Like the above wanted between splits only: registers are scarce.
  int32_t query[kRows];  // counted from the block's first; -1: there is no such row
  int64_t out[kRows];    // where its results are to go
  int64_t log_sum_exp[kRows];
  Softmax total[kRows];  // of the splits merged into the output
  int32_t votes[kAttentionWarps];
};

template <KvType kType, int kSize>
constexpr int64_t kPrefillBytes = (sizeof(PrefillShared) + 127) / 128 * 128 + kTilesBytes<kType, kSize, kStages>;

// A lane's two rows.
template <int kSize>
struct PrefillRows {
  Query<kSize> query;
  int32_t positions[2];  // INT32_MIN where the row isn't of the sequence at hand
  Softmax softmax[2];    // of the last split
  float values[kSize / 16][2][4];
};

// One split. Warps without a row of the sequence only help to fetch the tiles.
template <KvType kType, int kSize>
QS_DEVICE void attend_split(const KvCache& cache, PrefillRows<kSize>& rows, bool takes_part, TileMasks masks,
                            bool careful, const Entries* entries, char* tiles) {
  float top[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0, 0}, alpha[2] = {1, 1};
  Parts weights[kChunks];
  QS_UNROLL
  for (int i = 0; i < kSize / 2; ++i) rows.values[i / 8][i / 4 % 2][i % 4] = 0;
  for_tiles<kType, kSize, kStages>(
      cache, entries, tiles, masks.seen,
      [&](int tile, const char* keys) {
        if (!takes_part) return;
        float s[kChunks][2][4];
        const bool hidden = masks.hidden >> tile & 1;
        bool seen[2] = {!hidden, !hidden};
        QS_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          score_chunk<kType, kSize>(rows.query, keys, entries, tile, c, s[c]);
          if (hidden) hide(entries, tile, c, rows.positions, s[c], seen);
        }
        if (hidden) {
          QS_UNROLL
          for (int r = 0; r < 2; ++r) seen[r] = (ballot(seen[r]) >> (lane() & ~3) & 15) != 0;
        }
        float base[2];
        QS_UNROLL
        for (int r = 0; r < 2; ++r) {
          float largest = kMinusInfinity;
          QS_UNROLL
          for (int n = 0; n < kChunks * 2; ++n) {
            largest = maximum(largest, maximum(s[n / 2][n % 2][2 * r], s[n / 2][n % 2][2 * r + 1]));
          }
          largest = maximum(top[r], quad_max(largest));
          // A row that sees nothing here gets probabilities of zero and keeps what it has.
          alpha[r] = seen[r] ? exp(sub_rn(top[r], largest)) : 1.0f;
          base[r] = seen[r] ? largest : 0.0f;
          top[r] = largest;
        }
        float tile_sum[2] = {0, 0};
        QS_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          float part[2];
          weigh_chunk<kType>(entries, tile, c, s[c], base, part, weights[c]);
          QS_UNROLL
          for (int r = 0; r < 2; ++r) tile_sum[r] = add_rn(tile_sum[r], part[r]);
        }
        QS_UNROLL
        for (int r = 0; r < 2; ++r) sum[r] = fma_rn(sum[r], alpha[r], tile_sum[r]);
      },
      [&](int tile, const char* values) {
        if (!takes_part) return;
        const float unit = value_unit<kType>(entries, tile);
        // Branches between blocks, and between chunks above, keep the compiler from starting them all at once, for
        // which there aren't registers. That is why i8 is careful too, though its codes are finite.
        QS_UNROLL
        for (int block = 0; block < kSize / 16; ++block) {
          float (&out)[2][4] = rows.values[block];
          if (careful) {
            add_values_carefully<kType, kSize>(entries, tile, weights, values, block, unit, rows.positions, alpha, out);
          } else {
            add_values<kType, kSize>(weights, values, block, unit, alpha, out);
          }
        }
      });
  QS_UNROLL
  for (int r = 0; r < 2; ++r) rows.softmax[r] = {top[r], quad_sum(sum[r])};
}

QS_DEVICE int row_of_block(int r) { return warp() * 16 + lane() / 4 + 8 * r; }

// Merges the last split into what the output holds. kLast: the results are complete then.
template <bool kLast, int kSize>
QS_DEVICE void merge_split(const Attention& params, PrefillShared* shared, PrefillRows<kSize>& rows,
                           const bool (&mine)[2]) {
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const bool adds = rows.softmax[r].sum != 0;
    const int row = row_of_block(r);
    Softmax total = load_shared(&shared->total[row]);
    sync_warp();
    if (!mine[r] || (!kLast && !adds)) continue;
    const bool first = total.sum == 0;
    MergeFactors factors = {1, 0};
    if (adds) factors = merge(total, rows.softmax[r]);
    if (lane() % 4 == 0) store_shared(&shared->total[row], total);
    const float inverse = inverse_sum(total);
    float* out = params.out + load_shared(&shared->out[row]) + lane() % 4 * 2;
    QS_UNROLL
    for (int n = 0; n < kSize / 8; ++n) {
      float2* at = reinterpret_cast<float2*>(out + n * 8);
      float2 x = {0, 0};
      if (!first) x = load(at);
      if (adds) {
        x.x = merge(x.x, rows.values[n / 2][n % 2][2 * r], factors);
        x.y = merge(x.y, rows.values[n / 2][n % 2][2 * r + 1], factors);
      }
      if (kLast) x = {mul_rn(x.x, inverse), mul_rn(x.y, inverse)};
      store(at, x);
    }
    if (kLast && params.log_sum_exp && lane() % 4 == 0) {
      store(params.log_sum_exp + load_shared(&shared->log_sum_exp[row]), log_sum_exp(total));
    }
  }
  sync_warp();
}

// The distinct sequences of the block's queries. A barrier at the end.
QS_DEVICE void find_sequences(const Attention& params, int first_query, int queries, PrefillShared* shared) {
  const int own = static_cast<int>(threadIdx.x);
  if (own < queries) {
    const int32_t row = batch_row(params, first_query + own);
    store_shared(&shared->sequence[own], load(params.query_sequence + row));
    store_shared(&shared->position[own], load(params.query_positions + row));
  }
  sync_block();
  if (own < queries) {
    const int32_t sequence = load_shared(&shared->sequence[own]);
    int32_t length = length_of(params.cache, sequence);
    Span span = {INT32_MAX, INT32_MIN};
    for (int q = 0; q < queries; ++q) {
      if (load_shared(&shared->sequence[q]) != sequence) continue;
      const int32_t position = load_shared(&shared->position[q]);
      span = {minimum(span.low, position), maximum(span.high, position)};
      if (q < own) length = -1;
    }
    store_shared(&shared->length[own], length);
    store_shared(&shared->span[own], span);
  }
  sync_block();
}

template <KvType kType, int kSize>
QS_KERNEL void __launch_bounds__(kAttentionThreads, 2)
    attention_prefill_kernel(Attention params, const int32_t* count) {
  const KvCache& cache = params.cache;
  PrefillShared* shared = shared_memory<PrefillShared>();
  char* tiles = reinterpret_cast<char*>(shared) + (sizeof(PrefillShared) + 127) / 128 * 128;
  const int heads_per_kv = static_cast<int>(params.heads) / static_cast<int>(cache.kv_heads);
  const int all_rows = static_cast<int>(row_count(params, count)) * heads_per_kv;
  const int blocks = static_cast<int>(gridDim.x) / static_cast<int>(cache.kv_heads);  // of a KV head
  const int kv_head = static_cast<int>(blockIdx.x) / blocks;
  const int first_row = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * kRows;  // those that see most go first
  if (first_row >= all_rows) return;
  const int first_query = first_row / heads_per_kv;
  const int queries = (minimum(first_row + kRows, all_rows) - 1) / heads_per_kv - first_query + 1;
  find_sequences(params, first_query, queries, shared);

  PrefillRows<kSize> rows;
  const float* query_rows[2];
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + row_of_block(r), head = kv_head * heads_per_kv + row % heads_per_kv;
    const int64_t i = row / heads_per_kv;
    query_rows[r] = row < all_rows ? params.query + i * params.query_stride + head * kSize : nullptr;
    if (lane() % 4 == 0) {
      store_shared(&shared->query[row_of_block(r)], row < all_rows ? static_cast<int32_t>(i) - first_query : -1);
      store_shared(&shared->out[row_of_block(r)], i * params.out_stride + head * kSize);
      store_shared(&shared->log_sum_exp[row_of_block(r)], i * params.heads + head);
      store_shared(&shared->total[row_of_block(r)], {});
    }
  }
  load_query<kType, kSize>(rows.query, query_rows, params.scale);
  sync_block();

  for (int query = 0; query < queries; ++query) {
    if (load_shared(&shared->length[query]) < 0) continue;
    const int32_t sequence = load_shared(&shared->sequence[query]);
    bool mine[2];
    QS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int32_t own = load_shared(&shared->query[row_of_block(r)]);
      mine[r] = own >= 0 && load_shared(&shared->sequence[own]) == sequence;
      rows.positions[r] = mine[r] ? load_shared(&shared->position[own]) : INT32_MIN;
      rows.softmax[r] = {};
    }
    const bool takes_part = any(mine[0] || mine[1]);
    for (int split = 0; split * kSplit < load_shared(&shared->length[query]); ++split) {
      const TileMasks masks = find_entries<kType == KvType::i8>(cache, load_shared(&shared->sequence[query]), kv_head,
                                                                split, load_shared(&shared->length[query]),
                                                                load_shared(&shared->span[query]), &shared->entries);
      if (masks.seen == 0) continue;
      merge_split<false>(params, shared, rows, mine);  // the split before
      for (bool careful = false;; careful = true) {
        attend_split<kType, kSize>(cache, rows, takes_part, masks, careful, &shared->entries, tiles);
        if (careful) break;
        bool finite = true;
        QS_UNROLL
        for (int block = 0; block < kSize / 16; ++block) finite &= all_finite(rows.values[block]);
        if (!any_in_block(!finite, shared->votes)) break;
      }
    }
    merge_split<true>(params, shared, rows, mine);
  }
}

}  // namespace

void prefill_attention(const Attention& params, const int32_t* count, Stream stream) {
  const int64_t rows = params.count * (params.heads / params.cache.kv_heads);
  const Dim grid = blocks_in_x((rows + kRows - 1) / kRows * params.cache.kv_heads);
  for_tensor_kind(params.cache, [&]<KvType kType, int kSize>() {
    launch("attention_prefill_kernel", attention_prefill_kernel<kType, kSize>, grid, kAttentionThreads,
           kPrefillBytes<kType, kSize>, stream, params, count);
  });
}

}  // namespace quicksilver::QS_CUDA
