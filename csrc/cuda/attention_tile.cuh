// Tensor-core attention over tiles of kTile entries: what decode and prefill have in common.
//
// Both make a row's numbers by the same operations in the same order, so they agree to the bit; they differ in which
// warp does what. A row is one query and head; 16 rows are the M of an MMA.
//
// Accuracy is near that of fp32. A query's values are two 16-bit numbers, high + low, and so are the probabilities:
// twice the MMAs, on data that is there anyway. A score's high and low products are summed apart, and a tile's product
// with the values is added to those before it in fp32: tensor cores truncate, and so it happens a few times only.
// fp16 has a small range: a query row is multiplied by a power of two that brings its largest value near 2^14, and
// probabilities by 2^14. Keys and values of an i8 cache are used as their codes, which fp16 holds exactly; the scale of
// a value goes to the probability, relative to the largest scale of the tile.
//
// Entries that a row doesn't see have probability zero, which a value of NaN or infinity would turn into NaN. So a
// split that gives anything but finite numbers is done again carefully: such values are added to the rows that see
// them, and are zero in the MMA.
#pragma once

#include "attention.cuh"
#include "ptx.cuh"

namespace quicksilver::QS_CUDA {

constexpr int kTile = 64;
constexpr int kSplitTiles = kSplit / kTile;
constexpr int kChunks = kTile / 16;  // of a tile's entries, as an MMA wants them

// A tile in shared memory: rows of 16-bit values, 16 bytes apart beyond their length, so that the eight rows which
// ldmatrix reads at once are in different banks.
template <int kSize>
constexpr int kPitch = kSize * 2 + 16;
template <int kSize>
constexpr int kTileBytes = kTile * kPitch<kSize>;

// Where tiles arrive: kStages of them, keys and values in turn. Codes arrive as they are and are unpacked into one
// more tile.
template <KvType kType, int kSize>
constexpr int kStageBytes = kType == KvType::i8 ? kTile * kSize : kTileBytes<kSize>;
template <KvType kType, int kSize, int kStages>
constexpr int kTilesBytes = kStages * kStageBytes<kType, kSize> + (kType == KvType::i8 ? kTileBytes<kSize> : 0);

// The entries of a split.
struct Entries {
  int64_t vector[kSplit];  // which vector of the cache's arrays; -1: there is no such entry
  int32_t position[kSplit];
  int32_t until[kSplit];
  float key_scale[kSplit];  // these three for i8 only
  float value_scale[kSplit];
  float largest_scale[kSplit / kWarp];
  unsigned seen[kSplit / kWarp];    // a bit for each entry: some query sees it
  unsigned hidden[kSplit / kWarp];  // some query doesn't
};

// The least and the largest position of a block's queries.
struct Span {
  int32_t low, high;
};

// Bit t: tile t of the split.
struct TileMasks {
  unsigned seen = 0;    // has an entry that some query may see
  unsigned hidden = 0;  // has one that some query may not see
};

QS_DEVICE float power_of_two(int biased_exponent) { return __builtin_bit_cast(float, biased_exponent << 23); }
QS_DEVICE int biased_exponent(float x) { return (__builtin_bit_cast(int, x) >> 23) & 255; }

// The whole block; a barrier before and one after.
template <bool kScaled>
QS_DEVICE TileMasks find_entries(const KvCache& cache, int64_t sequence, int64_t kv_head, int split, int length,
                                 Span span, Entries* entries) {
  sync_block();
  const unsigned block_size = static_cast<unsigned>(cache.block_size);
  for (int i = static_cast<int>(threadIdx.x); i < kSplit; i += kAttentionThreads) {
    const int entry = split * kSplit + i;
    int64_t vector = -1;
    int32_t position = INT32_MAX, until = INT32_MIN;
    float key_scale = 0, value_scale = 0;
    const unsigned column = static_cast<unsigned>(entry) / block_size;
    const int64_t block = entry < length ? load(cache.block_table + sequence * cache.max_blocks + column) : -1;
    if (has_block(cache, block)) {
      const int64_t offset = static_cast<unsigned>(entry) - column * block_size;
      const int64_t slot = block * block_size + offset;
      vector = (block * cache.kv_heads + kv_head) * block_size + offset;
      position = load(cache.positions + slot);
      until = cache.until ? load(cache.until + slot) : INT32_MAX;
      if constexpr (kScaled) {
        key_scale = load(cache.key_scale + vector);
        value_scale = load(cache.value_scale + vector);
      }
    }
    store_shared(&entries->vector[i], vector);
    store_shared(&entries->position[i], position);
    store_shared(&entries->until[i], until);
    const unsigned seen = ballot(position <= span.high && span.low < until);
    const unsigned hidden = ballot(!(position <= span.low && span.high < until));
    float largest = 0;
    if constexpr (kScaled) {
      store_shared(&entries->key_scale[i], key_scale);
      store_shared(&entries->value_scale[i], value_scale);
      largest = warp_max(value_scale < __builtin_inff() ? value_scale : 0.0f);
    }
    if (lane() == 0) {
      store_shared(&entries->seen[i / kWarp], seen);
      store_shared(&entries->hidden[i / kWarp], hidden);
      if constexpr (kScaled) store_shared(&entries->largest_scale[i / kWarp], largest);
    }
  }
  sync_block();
  TileMasks masks;
  QS_UNROLL
  for (int i = 0; i < kSplit / kWarp; ++i) {
    if (load_shared(&entries->seen[i])) masks.seen |= 1u << (i * kWarp / kTile);
    if (load_shared(&entries->hidden[i])) masks.hidden |= 1u << (i * kWarp / kTile);
  }
  return masks;
}

// Calls f(row, piece) for this thread's share of a tile's pieces. Eight or sixteen threads have one row: addresses that
// differ by constants need no registers of their own.
template <int kPieces, class F>
QS_DEVICE void for_pieces(const F& f) {
  constexpr int kThreads = kPieces % 16 == 0 ? 16 : 8;
  const int first_row = static_cast<int>(threadIdx.x) / kThreads, first = static_cast<int>(threadIdx.x) % kThreads;
  QS_UNROLL
  for (int row = 0; row < kTile; row += kAttentionThreads / kThreads) {
    QS_UNROLL
    for (int piece = 0; piece < kPieces; piece += kThreads) {
      if (piece + kThreads <= kPieces || first + piece < kPieces) f(first_row + row, first + piece);
    }
  }
}

// Asks for one tile of keys or values. The whole block.
template <KvType kType, int kSize>
QS_DEVICE void request_tile(const void* array, const Entries* entries, int tile, char* stage) {
  constexpr int kRowBytes = kType == KvType::i8 ? kSize : kSize * 2;
  constexpr int kStagePitch = kType == KvType::i8 ? kSize : kPitch<kSize>;
  for_pieces<kRowBytes / 16>([&](int row, int piece) {
    const int64_t vector = load_shared(&entries->vector[tile * kTile + row]);
    const char* from = static_cast<const char*>(array) + (vector < 0 ? 0 : vector * kRowBytes + piece * 16);
    cp_async16(stage + row * kStagePitch + piece * 16, from, vector >= 0);
  });
}

// Codes to fp16: 1024 + u is 0x6400 | u, but without half arithmetic fp32 has to do: 2^23 + u.
QS_DEVICE float code_value(uint32_t codes, int i) {
  const uint32_t code = ((codes ^ 0x80808080u) >> (8 * i)) & 255;
  return sub_rn(__builtin_bit_cast(float, 0x4b000000u | code), 8388736.0f);
}
template <int kSize>
QS_DEVICE void unpack_codes(const char* stage, char* tile) {
  for_pieces<kSize / 8>([&](int row, int piece) {
    const uint2 codes = load_shared(reinterpret_cast<const uint2*>(stage + row * kSize + piece * 8));
    uint4 out;
    out.x = pack_half2(code_value(codes.x, 0), code_value(codes.x, 1));
    out.y = pack_half2(code_value(codes.x, 2), code_value(codes.x, 3));
    out.z = pack_half2(code_value(codes.y, 0), code_value(codes.y, 1));
    out.w = pack_half2(code_value(codes.y, 2), code_value(codes.y, 3));
    store_shared(reinterpret_cast<uint4*>(tile + row * kPitch<kSize> + piece * 16), out);
  });
}

// The tiles of a split that some query sees, in order: on_keys(tile, data), then on_values(tile, data). Meanwhile the
// data of the next step is on its way (two stages), or of the next two (three). The whole block; entries and tiles are
// free again when it returns.
template <KvType kType, int kSize, int kStages, class OnKeys, class OnValues>
QS_DEVICE void for_tiles(const KvCache& cache, const Entries* entries, char* tiles, unsigned seen,
                         const OnKeys& on_keys, const OnValues& on_values) {
  static_assert(kStages == 2 || kStages == 3);
  constexpr int kBytes = kStageBytes<kType, kSize>;
  const auto following = [&](int tile) {
    do ++tile;
    while (tile < kSplitTiles && (seen >> tile & 1) == 0);
    return tile;
  };
  const auto request = [&](bool keys, int tile, int stage) {
    if (tile < kSplitTiles) {
      request_tile<kType, kSize>(keys ? cache.key : cache.value, entries, tile, tiles + stage * kBytes);
    }
    cp_async_commit();  // an empty group too, so that the number of groups tells which data has come
  };
  int tile = following(-1), stage = 0;
  // The data of this step, after asking for other data, which goes where the step before had its own.
  const auto data_while_asking = [&](bool keys, int asked) {
    cp_async_wait<kStages - 2>();
    sync_block();  // everybody's copies are here, and everybody is done with the step before
    char* data = tiles + stage * kBytes;
    if constexpr (kType == KvType::i8) {
      unpack_codes<kSize>(data, tiles + kStages * kBytes);
      data = tiles + kStages * kBytes;
    }
    request(keys, asked, stage == 0 ? kStages - 1 : stage - 1);
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if constexpr (kType == KvType::i8) sync_block();
    return data;
  };
  request(true, tile, 0);
  if (kStages == 3) request(false, tile, 1);
  while (tile < kSplitTiles) {
    const int next = following(tile);
    on_keys(tile, data_while_asking(kStages == 3, kStages == 3 ? next : tile));
    on_values(tile, data_while_asking(kStages == 2, next));
    tile = next;
  }
  cp_async_wait<0>();
  sync_block();
}

// --- 16 rows of a warp -----------------------------------------------------------------------------------------------
// In an MMA, lane = 4 * g + t has columns 2t and 2t + 1 of rows g and g + 8.

// An A operand, 16 x 16, as high + low.
struct Parts {
  uint32_t high[4], low[4];
};

template <KvType kType>
QS_DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  if constexpr (kType == KvType::bf16) {
    high = pack_bfloat2(x, y);
    low = pack_bfloat2(sub_rn(x, bfloat_to_float(static_cast<uint16_t>(high))),
                       sub_rn(y, bfloat_to_float(static_cast<uint16_t>(high >> 16))));
  } else {
    high = pack_half2(x, y);
    low = pack_half2(sub_rn(x, half_to_float(static_cast<uint16_t>(high))),
                     sub_rn(y, half_to_float(static_cast<uint16_t>(high >> 16))));
  }
}

template <KvType kType>
QS_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  if constexpr (kType == KvType::bf16) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // others never run this: see takes_tensor_cores
    mma_bf16(d, a, b);
#endif
  } else {
    mma_f16(d, a, b);
  }
}

template <int kSize>
struct Query {
  Parts parts[kSize / 16];
  float scale[2];  // what the products of rows g and g + 8 are multiplied by
};

QS_DEVICE float quad_max(float x) {
  x = maximum(x, shuffle_xor(x, 1));
  return maximum(x, shuffle_xor(x, 2));
}
QS_DEVICE float quad_sum(float x) {
  x = add_rn(x, shuffle_xor(x, 1));
  return add_rn(x, shuffle_xor(x, 2));
}

// rows: where rows g and g + 8 begin; null: zeros.
template <KvType kType, int kSize>
QS_DEVICE void load_query(Query<kSize>& query, const float* const (&rows)[2], float scale) {
  float2 x[2][kSize / 8];
  float largest[2] = {0, 0};
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    QS_UNROLL
    for (int n = 0; n < kSize / 8; ++n) {
      x[r][n] = make_float2(0, 0);
      if (rows[r]) x[r][n] = load(reinterpret_cast<const float2*>(rows[r] + n * 8 + lane() % 4 * 2));
      largest[r] = maximum(largest[r], maximum(absolute(x[r][n].x), absolute(x[r][n].y)));
    }
  }
  float factor[2];
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    // The largest value gets exponent 14. Below 2^-87 there is no factor for that, and no need.
    int exponent = biased_exponent(quad_max(largest[r]));
    exponent = kType == KvType::bf16 ? 127 + 14 : exponent < 40 ? 40 : exponent;
    factor[r] = power_of_two(127 + 14 + 127 - exponent);
    query.scale[r] = mul_rn(scale, power_of_two(exponent - 14));
  }
  QS_UNROLL
  for (int n = 0; n < kSize / 8; ++n) {
    QS_UNROLL
    for (int r = 0; r < 2; ++r) {
      Parts& parts = query.parts[n / 2];
      split<kType>(mul_rn(x[r][n].x, factor[r]), mul_rn(x[r][n].y, factor[r]), parts.high[n % 2 * 2 + r],
                   parts.low[n % 2 * 2 + r]);
    }
  }
}

// Scores of a chunk's 16 entries: s[n][2 * r + c] is of row g + 8r and entry 8n + 2t + c.
template <KvType kType, int kSize>
QS_DEVICE void score_chunk(const Query<kSize>& query, const char* keys, const Entries* entries, int tile, int chunk,
                           float (&s)[2][4]) {
  const int row = chunk * 16 + (lane() & 7) + (lane() >> 4) * 8;
  const char* from = keys + row * kPitch<kSize> + (lane() >> 3 & 1) * 16;
  float low[2][4] = {};
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    QS_UNROLL
    for (int i = 0; i < 4; ++i) s[n][i] = 0;
  }
  QS_UNROLL
  for (int k = 0; k < kSize / 16; ++k) {
    uint32_t b[4];
    ldmatrix_x4(b, from + k * 32);
    multiply<kType>(s[0], query.parts[k].high, b[0], b[1]);
    multiply<kType>(s[1], query.parts[k].high, b[2], b[3]);
    multiply<kType>(low[0], query.parts[k].low, b[0], b[1]);
    multiply<kType>(low[1], query.parts[k].low, b[2], b[3]);
  }
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    float2 key_scale = {1, 1};
    if constexpr (kType == KvType::i8) {
      const int entry = tile * kTile + chunk * 16 + n * 8 + lane() % 4 * 2;
      key_scale = load_shared(reinterpret_cast<const float2*>(&entries->key_scale[entry]));
    }
    QS_UNROLL
    for (int i = 0; i < 4; ++i) {
      s[n][i] = mul_rn(add_rn(s[n][i], low[n][i]), query.scale[i / 2]);
      if constexpr (kType == KvType::i8) s[n][i] = mul_rn(s[n][i], i % 2 ? key_scale.y : key_scale.x);
    }
  }
}

// Takes away what rows g and g + 8 don't see; seen[r] becomes true where row r sees something.
QS_DEVICE void hide(const Entries* entries, int tile, int chunk, const int32_t (&positions)[2], float (&s)[2][4],
                    bool (&seen)[2]) {
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    const int entry = tile * kTile + chunk * 16 + n * 8 + lane() % 4 * 2;
    const int2 from = load_shared(reinterpret_cast<const int2*>(&entries->position[entry]));
    const int2 until = load_shared(reinterpret_cast<const int2*>(&entries->until[entry]));
    QS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t position = positions[i / 2];
      if ((i % 2 ? from.y : from.x) <= position && position < (i % 2 ? until.y : until.x)) {
        seen[i / 2] = true;
      } else {
        s[n][i] = kMinusInfinity;
      }
    }
  }
}

// Scores into probabilities, which become an A operand. sum[r]: of row g + 8r over this lane's four entries.
// base: what is taken off a score.
template <KvType kType>
QS_DEVICE void weigh_chunk(const Entries* entries, int tile, int chunk, float (&s)[2][4], const float (&base)[2],
                           float (&sum)[2], Parts& parts) {
  float scale = 0;  // i8: 2^14 over the power of two in the largest scale
  if constexpr (kType == KvType::i8) {
    const float2 largest = load_shared(reinterpret_cast<const float2*>(&entries->largest_scale[tile * 2]));
    const int exponent = biased_exponent(maximum(largest.x, largest.y));
    scale = power_of_two(127 + 14 + 127 - (exponent < 40 ? 40 : exponent));
  }
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    QS_UNROLL
    for (int i = 0; i < 4; ++i) s[n][i] = exp(sub_rn(s[n][i], base[i / 2]));
  }
  QS_UNROLL
  for (int r = 0; r < 2; ++r) {
    sum[r] = add_rn(add_rn(s[0][2 * r], s[0][2 * r + 1]), add_rn(s[1][2 * r], s[1][2 * r + 1]));
  }
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    if constexpr (kType == KvType::f16) {
      QS_UNROLL
      for (int i = 0; i < 4; ++i) s[n][i] = mul_rn(s[n][i], 16384.0f);
    }
    if constexpr (kType == KvType::i8) {
      const int entry = tile * kTile + chunk * 16 + n * 8 + lane() % 4 * 2;
      const float2 factor = load_shared(reinterpret_cast<const float2*>(&entries->value_scale[entry]));
      QS_UNROLL
      for (int i = 0; i < 4; ++i) {
        // A scale that is NaN is no concern of rows that don't see the entry.
        if (s[n][i] != 0) s[n][i] = mul_rn(s[n][i], mul_rn(i % 2 ? factor.y : factor.x, scale));
      }
    }
    QS_UNROLL
    for (int r = 0; r < 2; ++r) {
      split<kType>(s[n][2 * r], s[n][2 * r + 1], parts.high[2 * n + r], parts.low[2 * n + r]);
    }
  }
}

// What undoes the factor that weigh_chunk gave to the probabilities of a tile.
template <KvType kType>
QS_DEVICE float value_unit(const Entries* entries, int tile) {
  if constexpr (kType == KvType::bf16) return 1;
  if constexpr (kType == KvType::f16) return 1.0f / 16384;
  const float2 largest = load_shared(reinterpret_cast<const float2*>(&entries->largest_scale[tile * 2]));
  const int exponent = biased_exponent(maximum(largest.x, largest.y));
  return power_of_two((exponent < 40 ? 40 : exponent) - 14);
}

// Of two 16-bit numbers, the bits of those that aren't finite.
template <KvType kType>
QS_DEVICE uint32_t infinite_of(uint32_t pair) {
  constexpr uint32_t kExponent = kType == KvType::bf16 ? 0x7f80 : 0x7c00;
  const uint32_t low = (pair & kExponent) == kExponent ? pair & 0xffffu : 0;
  const uint32_t high = (pair >> 16 & kExponent) == kExponent ? pair & 0xffff0000u : 0;
  return low | high;
}

// out = out * alpha + probabilities . values, for 16 columns of the head; out[n][2 * r + c]: row g + 8r, column
// 16 * block + 8n + 2t + c. kFinite: without the values that aren't finite.
template <KvType kType, int kSize, bool kFinite = false>
QS_DEVICE void add_values(const Parts (&weights)[kChunks], const char* values, int block, float unit,
                          const float (&alpha)[2], float (&out)[2][4]) {
  const char* from = values + (lane() & 15) * kPitch<kSize> + block * 32 + (lane() >> 4) * 16;
  float sum[2][4] = {};
  QS_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, from + chunk * 16 * kPitch<kSize>);
    if constexpr (kFinite) {
      QS_UNROLL
      for (int i = 0; i < 4; ++i) b[i] &= ~infinite_of<kType>(b[i]);
    }
    multiply<kType>(sum[0], weights[chunk].low, b[0], b[1]);
    multiply<kType>(sum[1], weights[chunk].low, b[2], b[3]);
    multiply<kType>(sum[0], weights[chunk].high, b[0], b[1]);
    multiply<kType>(sum[1], weights[chunk].high, b[2], b[3]);
  }
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    QS_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[n][i] = fma_rn(sum[n][i], unit, mul_rn(out[n][i], alpha[i / 2]));
    }
  }
}

// add_values where some values aren't finite: those are added apart, to the rows that see them.
template <KvType kType, int kSize>
QS_DEVICE void add_values_carefully(const Entries* entries, int tile, const Parts (&weights)[kChunks],
                                    const char* values, int block, float unit, const int32_t (&positions)[2],
                                    const float (&alpha)[2], float (&out)[2][4]) {
  QS_UNROLL
  for (int i = 0; i < 8; ++i) out[i / 4][i % 4] = mul_rn(out[i / 4][i % 4], alpha[i / 2 % 2]);
  const char* at = values + block * 32 + lane() % 4 * 4;
  for (int entry = 0; entry < kTile; ++entry, at += kPitch<kSize>) {
    const int32_t from = load_shared(&entries->position[tile * kTile + entry]);
    const int32_t until = load_shared(&entries->until[tile * kTile + entry]);
    QS_UNROLL
    for (int n = 0; n < 2; ++n) {
      const uint32_t pair = infinite_of<kType>(load_shared(reinterpret_cast<const uint32_t*>(at + n * 16)));
      QS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint16_t bits = static_cast<uint16_t>(i % 2 ? pair >> 16 : pair);
        if (bits != 0 && from <= positions[i / 2] && positions[i / 2] < until) {
          out[n][i] = add_rn(out[n][i], kType == KvType::bf16 ? bfloat_to_float(bits) : half_to_float(bits));
        }
      }
    }
  }
  add_values<kType, kSize, true>(weights, values, block, unit, {1, 1}, out);
}

QS_DEVICE bool all_finite(const float (&x)[2][4]) {
  float zero = 0;
  QS_UNROLL
  for (int n = 0; n < 2; ++n) {
    QS_UNROLL
    for (int i = 0; i < 4; ++i) zero = fma_rn(x[n][i], 0.0f, zero);
  }
  return zero == 0;
}

// Whether any thread of the block says so. votes: [kAttentionWarps], shared; a barrier must follow before the next use.
QS_DEVICE bool any_in_block(bool x, int32_t* votes) {
  const bool mine = any(x);
  if (lane() == 0) store_shared(votes + warp(), static_cast<int32_t>(mine));
  sync_block();
  bool all_votes = false;
  QS_UNROLL
  for (int w = 0; w < kAttentionWarps; ++w) all_votes |= load_shared(votes + w) != 0;
  return all_votes;
}

// f.template operator()<type, head size>() for those that tensor cores take; false for others.
template <class F>
bool for_tensor_kind(const KvCache& cache, const F& f) {
  const auto for_size = [&]<KvType kType>() {
    switch (cache.head_size) {
      case 64:
        f.template operator()<kType, 64>();
        return true;
      case 80:
        f.template operator()<kType, 80>();
        return true;
      case 96:
        f.template operator()<kType, 96>();
        return true;
      case 128:
        f.template operator()<kType, 128>();
        return true;
    }
    return false;
  };
  switch (cache.type) {
    case KvType::f32:
      return false;
    case KvType::f16:
      return for_size.template operator()<KvType::f16>();
    case KvType::bf16:
      return for_size.template operator()<KvType::bf16>();
    case KvType::i8:
      return for_size.template operator()<KvType::i8>();
  }
  return false;
}

}  // namespace quicksilver::QS_CUDA
