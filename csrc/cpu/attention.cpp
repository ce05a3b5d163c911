// Attention of active queries over the entries that are present.
//
// A piece of work is a few neighbouring queries and the heads that share one KV head: they read each key and value once
// out of the first-level cache. What a query sees is a list of entries; for causal order without expiry the lists of a
// sequence's queries are prefixes of one list, and the queries go through it together.
#include <new>

#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

constexpr int64_t kMaxQueries = 8;         // per piece
constexpr int64_t kMaxScores = 64 * 1024;  // fp32 values a piece may hold where it has several queries
constexpr int64_t kValueBlock = 64;        // entries whose values stay in the first-level cache

// One query and head.
struct Row {
  const float* query;
  float* out;
  float* log_sum_exp;
  int64_t visible;  // the first so many entries of the list
  float* scores;    // [visible rounded up to 16]
};

struct Job {
  const Attention& params;
  int64_t queries = 0;  // per piece
  int64_t heads_per_kv = 0;
  int64_t heads = 0;  // per piece: all that share a KV head, or 1
  int64_t pieces = 0;
  int64_t longest = 0;  // entries, rounded up to 16
  int64_t next = 0;     // first piece that no worker has taken
  int64_t pairs = 0;
  int64_t vectors = 0;  // keys read
};

// A worker's scratch.
struct Scratch {
  int64_t* all;   // [longest] each entry of a sequence, as the number of its vector in the cache
  int64_t* seen;  // [longest] those that one query sees
  float* scales;  // [longest] of the keys or the values, for i8
  float* scores;  // [queries * heads, longest]
  Row* rows;      // [queries * heads]
};

int64_t scratch_bytes(const Job& job) {
  const int64_t rows = job.queries * job.heads;
  return job.longest * (20 + rows * 4) + (rows * static_cast<int64_t>(sizeof(Row)) + 63) / 64 * 64;
}

Scratch carve(const Job& job, char* memory) {
  const int64_t rows = job.queries * job.heads;
  Scratch s;
  s.rows = reinterpret_cast<Row*>(memory);
  memory += (rows * static_cast<int64_t>(sizeof(Row)) + 63) / 64 * 64;
  s.all = reinterpret_cast<int64_t*>(memory);
  s.seen = s.all + job.longest;
  s.scales = reinterpret_cast<float*>(s.seen + job.longest);
  s.scores = s.scales + job.longest;
  return s;
}

// q . k for kRows neighbouring rows and kKeys entries (row by row), together four.
template <KvType kType, int kRows, int kKeys>
QS_INLINE f32x4 four_dots(const Row* rows, const void* keys, const int64_t* at, int64_t size) {
  f32x16 acc[kRows * kKeys];
#pragma GCC unroll 4
  for (f32x16& a : acc) a = zeros();
  const auto add = [&](int64_t k, int n) __attribute__((always_inline)) {
    f32x16 q[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) q[r] = load(rows[r].query + k, n);
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) {
      const f32x16 key = kv_load<kType>(keys, at[i] + k, n);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r * kKeys + i] = fma(q[r], key, acc[r * kKeys + i]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) add(k, 16);
  if (k < size) add(k, static_cast<int>(size - k));
  return sum(acc[0], acc[1], acc[2], acc[3]);
}

// out[k..k+16*kVectors) of neighbouring rows += sum of p * value over entries begin..end. n: of the last vector.
template <KvType kType, int kRows, int kVectors>
QS_INLINE void add_values(const Row* rows, const KvCache& cache, const int64_t* list, int64_t begin, int64_t end,
                          int64_t k, int n) {
  f32x16 acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) acc[r][i] = load(rows[r].out + k + i * 16, i + 1 < kVectors ? 16 : n);
  }
  for (int64_t e = begin; e < end; ++e) {
    const int64_t at = list[e] * cache.head_size + k;
    f32x16 p[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) p[r] = broadcast(rows[r].scores[e]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const f32x16 v = kVectors == 1 ? kv_load<kType>(cache.value, at, n) : kv_load<kType>(cache.value, at + i * 16);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][i] = fma(p[r], v, acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store(rows[r].out + k + i * 16, acc[r][i], i + 1 < kVectors ? 16 : n);
  }
}

// The same for all rows, each over those entries that it sees. Two rows at a time share the conversion to fp32.
template <KvType kType, int kVectors>
void add_block(const KvCache& cache, const Row* rows, int64_t count, const int64_t* list, int64_t begin, int64_t end,
               int64_t k, int n) {
  constexpr int kPair = kVectors > 2 && !QS_AVX512 ? 2 : kVectors;  // what fits the registers
  for (int64_t r = 0; r < count; r += 2) {
    int64_t both = begin;
    const int64_t last = end < rows[r].visible ? end : rows[r].visible;
    const int64_t next = r + 1 == count ? begin : end < rows[r + 1].visible ? end : rows[r + 1].visible;
    if (next > begin && last > begin) {
      both = next < last ? next : last;
      for (int i = 0; i < kVectors; i += kPair) {
        add_values<kType, 2, kPair>(rows + r, cache, list, begin, both, k + i * 16, n);
      }
    }
    if (both < last) add_values<kType, 1, kVectors>(rows + r, cache, list, both, last, k, n);
    if (both < next) add_values<kType, 1, kVectors>(rows + r + 1, cache, list, both, next, k, n);
  }
}

// Turns scores into probabilities.
void softmax(const Row& row) {
  float* s = row.scores;
  const int64_t n = row.visible, padded = (n + 15) / 16 * 16;
  for (int64_t e = n; e < padded; ++e) s[e] = -__builtin_inff();
  f32x16 top = load(s);
  for (int64_t e = 16; e < padded; e += 16) top = max(top, load(s + e));
  const float largest = max_lane(top);
  f32x16 total = zeros();
  for (int64_t e = 0; e < padded; e += 16) {
    const f32x16 p = exp(load(s + e) - broadcast(largest));
    store(s + e, p);
    total = total + load(s + e, n - e < 16 ? static_cast<int>(n - e) : 16);
  }
  const float z = sum(total);
  if (row.log_sum_exp) *row.log_sum_exp = largest + __builtin_logf(z);
  const f32x16 inverse = broadcast(1.0f / z);
  for (int64_t e = 0; e < padded; e += 16) store(s + e, load(s + e) * inverse);
}

void gather_scales(const float* of, const int64_t* list, int64_t count, float* scales) {
  for (int64_t e = 0; e < count; ++e) scales[e] = of[list[e]];
}

// All rows over one list of entries, each over its first row.visible ones.
template <KvType kType>
void attend(const Attention& params, const Row* rows, int64_t count, const int64_t* list, float* scales) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size;
  int64_t most = 0;
  for (int64_t r = 0; r < count; ++r) most = rows[r].visible > most ? rows[r].visible : most;

  if constexpr (kType == KvType::i8) gather_scales(cache.key_scale, list, most, scales);
  for (int64_t e = 0; e < most; e += 4) {
    int64_t at[4];
    for (int i = 0; i < 4; ++i) at[i] = list[e + i < most ? e + i : most - 1] * size;
    const auto put = [&](const Row& row, f32x4 dots) {
      if constexpr (kType == KvType::i8) dots *= load_as<f32x4>(scales + e);
      store_as(row.scores + e, dots * params.scale);
    };
    for (int64_t r = 0; r < count; ++r) {
      if (e >= rows[r].visible) continue;
      if (r + 1 < count && e < rows[r + 1].visible) {
        const f32x4 first = four_dots<kType, 2, 2>(rows + r, cache.key, at, size);
        const f32x4 second = four_dots<kType, 2, 2>(rows + r, cache.key, at + 2, size);
        put(rows[r], QS_SHUFFLE4(first, second, 0, 1, 4, 5));
        put(rows[++r], QS_SHUFFLE4(first, second, 2, 3, 6, 7));
      } else {
        put(rows[r], four_dots<kType, 1, 4>(rows + r, cache.key, at, size));
      }
    }
  }
  if constexpr (kType == KvType::i8) gather_scales(cache.value_scale, list, most, scales);
  for (int64_t r = 0; r < count; ++r) {
    memset(rows[r].out, 0, static_cast<size_t>(size) * 4);
    if (rows[r].visible > 0) {
      softmax(rows[r]);
      if constexpr (kType == KvType::i8) {
        for (int64_t e = 0; e < rows[r].visible; ++e) rows[r].scores[e] *= scales[e];
      }
    } else if (rows[r].log_sum_exp) {
      *rows[r].log_sum_exp = -__builtin_inff();
    }
  }

  for (int64_t begin = 0; begin < most; begin += kValueBlock) {
    const int64_t end = begin + kValueBlock;
    for (int64_t k = 0; k < size;) {
      const int64_t left = size - k;
      if (left >= 64) {
        add_block<kType, 4>(cache, rows, count, list, begin, end, k, 16);
        k += 64;
      } else if (left >= 32) {
        add_block<kType, 2>(cache, rows, count, list, begin, end, k, 16);
        k += 32;
      } else {
        add_block<kType, 1>(cache, rows, count, list, begin, end, k, left < 16 ? static_cast<int>(left) : 16);
        k += 16;
      }
    }
  }
}

// The vectors of sequence s's entries, for one KV head. Returns whether positions never fall.
bool list_entries(const KvCache& cache, int64_t s, int64_t head, int64_t* list) {
  const int64_t entries = cache.lengths[s];
  bool falls = false;
  int32_t last = INT32_MIN;
  for (int64_t begin = 0; begin < entries; begin += cache.block_size) {
    const int64_t block = cache.block_table[s * cache.max_blocks + begin / cache.block_size];
    const int64_t n = entries - begin < cache.block_size ? entries - begin : cache.block_size;
    const int64_t first = (block * cache.kv_heads + head) * cache.block_size;
    const int32_t* positions = cache.positions + block * cache.block_size;
    falls |= positions[0] < last;
    for (int64_t i = 0; i < n; ++i) list[begin + i] = first + i;
    for (int64_t i = 1; i < n; ++i) falls |= positions[i] < positions[i - 1];
    last = positions[n - 1];
  }
  return !falls;
}

int64_t slot_of(const KvCache& cache, int64_t s, int64_t entry) {
  return cache.block_table[s * cache.max_blocks + entry / cache.block_size] * cache.block_size +
         entry % cache.block_size;
}

// How many entries lie at or before a position, where positions never fall.
int64_t count_visible(const KvCache& cache, int64_t s, int32_t position) {
  int64_t low = 0, high = cache.lengths[s];
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cache.positions[slot_of(cache, s, middle)] <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The entries of `all` that a query at `position` sees, in order. Returns their number.
int64_t select_visible(const KvCache& cache, int64_t s, int32_t position, const int64_t* all, int64_t* seen) {
  int64_t n = 0;
  for (int64_t e = 0; e < cache.lengths[s]; ++e) {
    const int64_t slot = slot_of(cache, s, e);
    seen[n] = all[e];
    n += cache.positions[slot] <= position && (cache.until == nullptr || position < cache.until[slot]);
  }
  return n;
}

// Heads first..first + job.heads of queries begin..end, which are of one sequence.
void run_queries(Job& job, const Scratch& scratch, int64_t begin, int64_t end, int64_t first) {
  const Attention& params = job.params;
  const KvCache& cache = params.cache;
  const auto row_of = [&](int64_t i) { return params.index ? params.index[i] : i; };
  const int64_t s = params.query_sequence[row_of(begin)];
  const bool together = list_entries(cache, s, first / job.heads_per_kv, scratch.all) && cache.until == nullptr;

  int64_t rows = 0, read = 0, pairs = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t position = params.query_positions[row_of(i)];
    const int64_t visible =
        together ? count_visible(cache, s, position) : select_visible(cache, s, position, scratch.all, scratch.seen);
    for (int64_t h = first; h < first + job.heads; ++h, ++rows) {
      scratch.rows[rows] = {params.query + i * params.query_stride + h * cache.head_size,
                            params.out + i * params.out_stride + h * cache.head_size,
                            params.log_sum_exp ? params.log_sum_exp + i * params.heads + h : nullptr, visible,
                            scratch.scores + rows * job.longest};
    }
    pairs += visible * job.heads;
    read += first % job.heads_per_kv == 0 ? visible : 0;
    if (!together || i + 1 == end) {
      for_kv_type(cache.type, [&]<KvType kType>() {
        attend<kType>(params, scratch.rows, rows, together ? scratch.all : scratch.seen, scratch.scales);
      });
      rows = 0;
    }
  }
  __atomic_fetch_add(&job.pairs, pairs, __ATOMIC_RELAXED);
  __atomic_fetch_add(&job.vectors, read, __ATOMIC_RELAXED);
}

void run_pieces(Job& job, const Scratch& scratch) {
  const Attention& params = job.params;
  const auto sequence_of = [&](int64_t i) { return params.query_sequence[params.index ? params.index[i] : i]; };
  const int64_t head_pieces = params.heads / job.heads;
  for (;;) {
    const int64_t piece = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (piece >= job.pieces) return;
    // The last queries see most, so they go first.
    const int64_t block = (job.pieces - 1 - piece) / head_pieces;
    const int64_t first = piece % head_pieces * job.heads;
    int64_t begin = block * job.queries;
    const int64_t last = begin + job.queries < params.count ? begin + job.queries : params.count;
    while (begin < last) {
      int64_t end = begin + 1;
      while (end < last && sequence_of(end) == sequence_of(begin)) ++end;
      run_queries(job, scratch, begin, end, first);
      begin = end;
    }
  }
}

}  // namespace

void compacted_attention(const Attention& params) {
  if (params.count <= 0) return;
  const KvCache& cache = params.cache;
  const int64_t workers = threads();
  int64_t longest = 1;
  for (int64_t i = 0; i < params.count; ++i) {
    const int64_t n = cache.lengths[params.query_sequence[params.index ? params.index[i] : i]];
    longest = n > longest ? n : longest;
  }
  Job job{params};
  job.longest = (longest + 15) / 16 * 16;
  job.heads_per_kv = params.heads / cache.kv_heads;
  job.queries = params.count / (4 * workers);
  const int64_t fitting = kMaxScores / (job.longest * job.heads_per_kv);
  job.queries = job.queries < fitting ? job.queries : fitting;
  job.queries = job.queries < 1 ? 1 : job.queries < kMaxQueries ? job.queries : kMaxQueries;
  const int64_t blocks = (params.count + job.queries - 1) / job.queries;
  // Heads that share a KV head stay together unless that leaves threads without work.
  job.heads = blocks * cache.kv_heads >= 3 * workers || workers == 1 ? job.heads_per_kv : 1;
  job.pieces = blocks * (params.heads / job.heads);

  const int64_t bytes = scratch_bytes(job);
  const bool alone = job.pieces * job.queries * job.heads * longest * cache.head_size < 16384;
  char* memory = static_cast<char*>(::operator new(static_cast<size_t>(bytes * (alone ? 1 : workers))));
  if (alone) {
    run_pieces(job, carve(job, memory));
  } else {
    on_all_threads([&](int worker, int) { run_pieces(job, carve(job, memory + worker * bytes)); });
  }
  ::operator delete(memory);

  Counters delta{};
  delta.attention_pairs = job.pairs;
  const int64_t vector_bytes = cache.type == KvType::f32  ? cache.head_size * 4
                               : cache.type == KvType::i8 ? cache.head_size + 4
                                                          : cache.head_size * 2;
  delta.kv_bytes_read = job.vectors * 2 * vector_bytes;
  quicksilver::count(delta);
}

}  // namespace quicksilver::QS_ISA
