// Attention of active queries over the entries that are present.
//
// A piece of work is a few neighbouring queries and the heads that share one KV head: they read each key and value once
// out of the first-level cache. What a query sees is a list of entries; for causal order without expiry the lists of a
// sequence's queries are prefixes of one list, and the queries go through it together. Where that makes too few pieces
// for the threads, as for one token of one sequence, the entries of a query are divided among them instead.
#include <new>

#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

constexpr int64_t kMaxRows = 48;           // queries times heads of a piece: they share each key's transposition
constexpr int64_t kMaxScores = 64 * 1024;  // fp32 values a piece may hold where it has several queries
constexpr int64_t kValueBlock = 64;        // entries whose values stay in the first-level cache
constexpr int64_t kPanelFloats = 4096;     // of it, what values as fp32 may take
constexpr int64_t kSplit = 512;            // entries whose values are added up apart from the others'
constexpr int64_t kFetchAhead = 32;        // entries
constexpr int64_t kSplitColumns = 32;      // columns of a value that one thread adds up, where entries are divided

// One query and head.
struct Row {
  const float* query;
  float* out;
  float* sums;  // where values are added up: out, or memory for one split
  float* log_sum_exp;
  int64_t visible;  // the first so many entries of the list
  float* scores;    // [visible rounded up to 16]
};

struct Job {
  const Attention& params;
  int64_t queries = 0;  // per piece
  int64_t heads_per_kv = 0;
  int64_t pieces = 0;
  int64_t longest = 0;  // entries, rounded up to 16
  int64_t next = 0;     // first piece that no worker has taken
  int64_t vectors = 0;  // keys read
};

constexpr std::align_val_t kLine{64};  // where memory begins, so that no vector lies across two cache lines

// A worker's scratch.
struct Scratch {
  int64_t* all;   // [longest] each entry of a sequence, as the number of its vector in the cache
  int64_t* seen;  // [longest] those that one query sees
  float* sums;    // [queries * heads, head_size]: of one split
  float* scores;  // [queries * heads, longest]
  Row* rows;      // [queries * heads]
  float* panel;   // [head_size rounded up to 16, 16] sixteen keys; or [value_entries, head_size] values
};

// How many entries' values are converted to fp32 at a time.
int64_t value_entries(int64_t size) {
  const int64_t fitting = kPanelFloats / size;
  return fitting < 1 ? 1 : fitting < kValueBlock ? fitting : kValueBlock;
}

int64_t panel_floats(int64_t size) {
  const int64_t keys = 2 * 16 * ((size + 15) / 16 * 16), values = value_entries(size) * size;
  return keys > values ? keys : values;
}

int64_t rows_bytes(int64_t rows) { return (rows * static_cast<int64_t>(sizeof(Row)) + 63) / 64 * 64; }

int64_t scratch_bytes(const Job& job) {
  const int64_t rows = job.queries * job.heads_per_kv, size = job.params.cache.head_size;
  const int64_t bytes = rows_bytes(rows) + job.longest * (16 + rows * 4) + rows * size * 4 + panel_floats(size) * 4;
  return (bytes + 63) / 64 * 64;
}

Scratch carve(const Job& job, char* memory) {
  const int64_t rows = job.queries * job.heads_per_kv;
  Scratch s;
  s.rows = reinterpret_cast<Row*>(memory);
  s.all = reinterpret_cast<int64_t*>(memory + rows_bytes(rows));
  s.seen = s.all + job.longest;
  s.scores = reinterpret_cast<float*>(s.seen + job.longest);
  s.panel = s.scores + rows * job.longest;
  s.sums = s.panel + panel_floats(job.params.cache.head_size);
  return s;
}

// Neighbouring rows that go together, so that they share the conversion of keys and values to fp32.
constexpr int kGroup = 3;
// From so many rows on, keys and values are converted first, keys so that their elements lie side by side. Then this
// many share what is loaded: as many as there are registers for.
constexpr int64_t kMany = 8;
constexpr int kTile = QS_AVX512 ? 4 : 2;
constexpr int kWide = QS_AVX512 ? 6 : 3;

// Fetches columns k..k + n of a vector of the cache.
template <KvType kType>
QS_INLINE void fetch(const void* array, int64_t vector, int64_t size, int64_t k, int64_t n) {
  constexpr int64_t kBytes = kType == KvType::f32 ? 4 : kType == KvType::i8 ? 1 : 2;
  const char* p = static_cast<const char*>(array) + (vector * size + k) * kBytes;
  for (int64_t i = 0; i < n * kBytes; i += 64) __builtin_prefetch(p + i, 0, 0);
}

// q . k for kRows neighbouring rows and four entries.
template <KvType kType, int kRows>
QS_INLINE void four_dots(const Row* rows, const void* keys, const int64_t* at, int64_t size, f32x4 (&dots)[kRows]) {
  f32x16 sums[kRows][4];
  QS_PARTS(part) {  // of the lanes: of three rows and four entries just fit the registers
    nf acc[kRows][4] = {};
    int64_t k = 0;
    for (; k + 16 <= size; k += 16) {
      nf key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = kv_load_part<kType>(keys, at[i] + k + part * kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        const nf q = load_as<nf>(rows[r].query + k + part * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = fma_nf(q, key[i], acc[r][i]);
      }
    }
    if (k < size) {
      const int n = static_cast<int>(size - k);
      f32x16 key[4], q[kRows];
      for (int i = 0; i < 4; ++i) key[i] = kv_load<kType>(keys, at[i] + k, n);
      for (int r = 0; r < kRows; ++r) q[r] = load(rows[r].query + k, n);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = fma_nf(q[r].v[part], key[i].v[part], acc[r][i]);
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i].v[part] = acc[r][i];
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r) dots[r] = sum(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
}

// The entries that a query sees, each as the number of its vector in the cache: vectors[e] + shift.
struct Entries {
  const int64_t* vectors;
  int64_t shift;

  QS_INLINE_MEMBER int64_t operator[](int64_t e) const { return vectors[e] + shift; }
};

// Entries whose vectors follow one another, the first one's being number 0.
struct Neighbours {
  int64_t first;

  QS_INLINE_MEMBER int64_t operator[](int64_t e) const { return e - first; }
};

// sums[k..k+16*kVectors) of neighbouring rows += sum of p * value over entries begin..end. n: of the only vector.
// Entries before `fetched` are fetched ahead.
template <KvType kType, int kRows, int kVectors, class List>
QS_INLINE void add_values(const Row* rows, const void* values, int64_t size, const List& list, int64_t begin,
                          int64_t end, int64_t k, int n, int64_t fetched) {
  f32x16 acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const float* const from = rows[r].sums + k + i * 16;
      acc[r][i] = kVectors == 1 ? load(from, n) : load(from);
    }
  }
  for (int64_t e = begin; e < end; ++e) {
    const int64_t at = list[e] * size + k;
    if (e + kFetchAhead < fetched) fetch<kType>(values, list[e + kFetchAhead], size, k, (kVectors - 1) * 16 + n);
    nf p[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) p[r] = broadcast_nf(rows[r].scores[e]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      f32x16 tail;
      if (kVectors == 1) tail = kv_load<kType>(values, at, n);
      QS_PARTS(part) {
        const nf v = kVectors == 1 ? tail.v[part] : kv_load_part<kType>(values, at + i * 16 + part * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) acc[r][i].v[part] = fma_nf(p[r], v, acc[r][i].v[part]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* const to = rows[r].sums + k + i * 16;
      kVectors == 1 ? store(to, acc[r][i], n) : store(to, acc[r][i]);
    }
  }
}

// The same for a group of kRows rows, over the entries that all of them see.
template <KvType kType, int kRows, int kVectors, class List>
QS_INLINE void add_group(const Row* rows, const void* values, int64_t size, const List& list, int64_t begin,
                         int64_t end, int64_t k, int n, int64_t fetched) {
  constexpr int kFit = kRows == 1 || QS_AVX512 ? 4 : 2;  // what fits the registers
  constexpr int kPart = kVectors < kFit ? kVectors : kFit;
  for (int i = 0; i < kVectors; i += kPart) {
    add_values<kType, kRows, kPart>(rows, values, size, list, begin, end, k + i * 16, n, fetched);
  }
}

// The same for all rows, kMost at a time, each over those entries that it sees.
template <KvType kType, int kMost, int kVectors, class List>
void add_block(const void* values, int64_t size, const Row* rows, int64_t count, const List& list, int64_t begin,
               int64_t end, int64_t k, int n, int64_t last) {
  for (int64_t r = 0; r < count; r += kMost) {
    const int64_t fetched = r == 0 ? last : 0;  // the first group fetches for all
    const int64_t together = count - r < kMost ? count - r : kMost;
    int64_t all = end;
    for (int64_t i = 0; i < together; ++i) all = rows[r + i].visible < all ? rows[r + i].visible : all;
    if (all <= begin) {
      all = begin;
    } else {
      with_constant<kMost>(static_cast<int>(together), [&]<int kRows>() __attribute__((always_inline)) {
        add_group<kType, kRows, kVectors>(rows + r, values, size, list, begin, all, k, n, fetched);
      });
    }
    for (int64_t i = r; i < r + together; ++i) {
      const int64_t own = end < rows[i].visible ? end : rows[i].visible;
      if (all < own) add_group<kType, 1, kVectors>(rows + i, values, size, list, all, own, k, n, fetched);
    }
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

int64_t most_visible(const Row* rows, int64_t count) {
  int64_t most = 0;
  for (int64_t r = 0; r < count; ++r) most = rows[r].visible > most ? rows[r].visible : most;
  return most;
}

// The scores of all rows with entries begin..end, begin a multiple of 4.
template <KvType kType>
void score(const Attention& params, const Row* rows, int64_t count, const Entries& list, int64_t begin, int64_t end) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size, most = most_visible(rows, count);
  for (int64_t e = begin; e < end && e < most; e += 4) {
    // Four neighbours in the list are neighbours in the cache, but for blocks that lost entries.
    if (e + kFetchAhead < most) fetch<kType>(cache.key, list[e + kFetchAhead], size, 0, 4 * size);
    int64_t vector[4], at[4];
    for (int i = 0; i < 4; ++i) {
      vector[i] = list[e + i < most ? e + i : most - 1];
      at[i] = vector[i] * size;
    }
    const auto put = [&](const Row& row, f32x4 dots) __attribute__((always_inline)) {
      if constexpr (kType == KvType::i8) {
        const float* const of = cache.key_scale;
        dots *= f32x4{of[vector[0]], of[vector[1]], of[vector[2]], of[vector[3]]};
      }
      store_as(row.scores + e, dots * params.scale);
    };
    // A row that sees fewer entries than its neighbours gets scores that nobody looks at.
    const auto group = [&]<int kRows>(const Row* of) __attribute__((always_inline)) {
      f32x4 dots[kRows];
      four_dots<kType, kRows>(of, cache.key, at, size, dots);
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) put(of[i], dots[i]);
    };
    for (int64_t r = 0; r < count; r += kGroup) {
      const int64_t together = count - r < kGroup ? count - r : kGroup;
      if (e >= most_visible(rows + r, together)) continue;
      with_constant<kGroup>(static_cast<int>(together), [&]<int kRows>() __attribute__((always_inline)) {
        group.template operator()<kRows>(rows + r);
      });
    }
  }
}

// Turns a row's scores into what its values are multiplied by.
template <KvType kType>
void weigh(const KvCache& cache, const Row& row, const Entries& list) {
  if (row.visible == 0) {
    if (row.log_sum_exp) *row.log_sum_exp = -__builtin_inff();
    return;
  }
  softmax(row);
  if constexpr (kType == KvType::i8) {
    for (int64_t e = 0; e < row.visible; ++e) row.scores[e] *= cache.value_scale[list[e]];
  }
}

// Columns from..to of all rows' sums: += the values of entries begin..end, kMost rows at a time.
template <KvType kType, int kMost, class List>
void add_columns(const void* values, int64_t size, const Row* rows, int64_t count, const List& list, int64_t begin,
                 int64_t end, int64_t from, int64_t to, int64_t last) {
  for (int64_t k = from; k < to;) {
    const int64_t left = to - k;
    if (left >= 64) {
      add_block<kType, kMost, 4>(values, size, rows, count, list, begin, end, k, 16, last);
      k += 64;
    } else if (left >= 32) {
      add_block<kType, kMost, 2>(values, size, rows, count, list, begin, end, k, 16, last);
      k += 32;
    } else {
      const int n = left < 16 ? static_cast<int>(left) : 16;
      add_block<kType, kMost, 1>(values, size, rows, count, list, begin, end, k, n, last);
      k += 16;
    }
  }
}

// Columns from..to of all rows' sums: the values of entries begin..end. Of many rows with memory of their own, `panel`.
template <KvType kType>
void add_up(const KvCache& cache, const Row* rows, int64_t count, const Entries& list, int64_t begin, int64_t end,
            int64_t from, int64_t to, float* panel = nullptr) {
  const int64_t size = cache.head_size;
  for (int64_t r = 0; r < count; ++r) memset(rows[r].sums + from, 0, static_cast<size_t>(to - from) * 4);
  const int64_t most = most_visible(rows, count), last = end < most ? end : most;
  const int64_t block = panel ? value_entries(size) : kValueBlock;
  for (int64_t e = begin; e < last; e += block) {
    const int64_t next = e + block < last ? e + block : last;
    if (panel == nullptr) {
      add_columns<kType, kGroup>(cache.value, size, rows, count, list, e, next, from, to, last);
      continue;
    }
    for (int64_t i = e; i < next; ++i) {
      if (i + kFetchAhead < last) fetch<kType>(cache.value, list[i + kFetchAhead], size, 0, size);
      for (int64_t k = 0; k < size; k += 16) {
        const int n = size - k < 16 ? static_cast<int>(size - k) : 16;
        store(panel + (i - e) * size + k, kv_load<kType>(cache.value, list[i] * size + k, n), n);
      }
    }
    add_columns<KvType::f32, kWide>(panel, size, rows, count, Neighbours{e}, e, next, from, to, 0);
  }
}

void add_to(float* out, const float* sums, int64_t size) {
  for (int64_t k = 0; k < size; k += 16) {
    const int n = size - k < 16 ? static_cast<int>(size - k) : 16;
    store(out + k, load(out + k, n) + load(sums + k, n), n);
  }
}

// --- many rows
// -----------------------------------------------------------------------------------------------------

// Sixteen keys as fp32, their lanes: element k of all of them is at panel + 16 * k. What follows them is used as memory
// for the way there.
template <KvType kType>
void transpose_keys(const void* keys, const int64_t (&at)[16], int64_t size, float* panel) {
  const int64_t padded = (size + 15) / 16 * 16;
  float* const straight = panel + 16 * padded;
  for (int i = 0; i < 16; ++i) {
    for (int64_t k = 0; k < size; k += 16) {
      const int n = size - k < 16 ? static_cast<int>(size - k) : 16;
      store(straight + i * padded + k, kv_load<kType>(keys, at[i] + k, n));
    }
  }
  for (int64_t k = 0; k < padded; k += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const float* const from = straight + i * padded + k;
      const f32x4 a = load_as<f32x4>(from), b = load_as<f32x4>(from + padded);
      const f32x4 c = load_as<f32x4>(from + 2 * padded), d = load_as<f32x4>(from + 3 * padded);
      const f32x4 ab = QS_SHUFFLE4(a, b, 0, 4, 1, 5), cd = QS_SHUFFLE4(c, d, 0, 4, 1, 5);
      const f32x4 ab_high = QS_SHUFFLE4(a, b, 2, 6, 3, 7), cd_high = QS_SHUFFLE4(c, d, 2, 6, 3, 7);
      float* const to = panel + 16 * k + i;
      store_as(to, QS_SHUFFLE4(ab, cd, 0, 1, 4, 5));
      store_as(to + 16, QS_SHUFFLE4(ab, cd, 2, 3, 6, 7));
      store_as(to + 32, QS_SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5));
      store_as(to + 48, QS_SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7));
    }
  }
}

// The part of q . k that comes from elements `first`, `first` + 4, ...: what sum_to_four leaves in its lane `first`.
template <int kRows>
QS_INLINE void every_fourth(const Row* rows, const float* panel, int64_t size, int first, nf (&sums)[kRows]) {
  nf acc[kRows][4] = {};
  const auto add = [&](int64_t k, int j) __attribute__((always_inline)) {
    const nf key = load_as<nf>(panel + 16 * k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r][j] = fma_nf(broadcast_nf(rows[r].query[k]), key, acc[r][j]);
  };
  int64_t k = first;
  for (; k + 12 < size; k += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add(k + 4 * j, j);
  }
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    if (k + 4 * j < size) add(k + 4 * j, j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = (acc[r][0] + acc[r][2]) + (acc[r][1] + acc[r][3]);
}

// The scores of kRows rows with a panel's keys, the first being entry e: the same operations as `score` does, in the
// same order, with keys in the lanes, so that nothing is added up across them.
template <KvType kType, int kRows>
void score_panel(const Row* rows, const float* panel, int64_t size, float scale, const float* key_scale, int64_t e) {
  QS_PARTS(part) {
    const float* const keys = panel + part * kLanes;
    nf even[kRows], odd[kRows], more[kRows];
    every_fourth<kRows>(rows, keys, size, 0, even);
    every_fourth<kRows>(rows, keys, size, 2, more);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) even[r] += more[r];
    every_fourth<kRows>(rows, keys, size, 1, odd);
    every_fourth<kRows>(rows, keys, size, 3, more);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      nf dots = even[r] + (odd[r] + more[r]);
      if constexpr (kType == KvType::i8) dots *= load_as<nf>(key_scale + part * kLanes);
      store_as(rows[r].scores + e + part * kLanes, dots * scale);
    }
  }
}

// The scores of many rows with all entries.
template <KvType kType>
void score_many(const Attention& params, const Row* rows, int64_t count, const Entries& list, float* panel) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size, most = most_visible(rows, count);
  for (int64_t e = 0; e < most; e += 16) {
    int64_t at[16];
    float key_scale[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t vector = list[e + i < most ? e + i : most - 1];
      at[i] = vector * size;
      if constexpr (kType == KvType::i8) key_scale[i] = cache.key_scale[vector];
      if (e + i + kFetchAhead < most) fetch<kType>(cache.key, list[e + i + kFetchAhead], size, 0, size);
    }
    transpose_keys<kType>(cache.key, at, size, panel);
    for (int64_t r = 0; r < count; r += kTile) {
      const int64_t together = count - r < kTile ? count - r : kTile;
      if (e >= most_visible(rows + r, together)) continue;
      with_constant<kTile>(static_cast<int>(together), [&]<int kRows>() {
        score_panel<kType, kRows>(rows + r, panel, size, params.scale, key_scale, e);
      });
    }
  }
}

// All rows over one list of entries, each over its first row.visible ones.
template <KvType kType>
void attend(const Attention& params, const Scratch& scratch, int64_t count, const Entries& list) {
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size;
  Row* const rows = scratch.rows;
  const int64_t most = most_visible(rows, count);
  float* const panel = count >= kMany ? scratch.panel : nullptr;
  if (panel) {
    score_many<kType>(params, rows, count, list, panel);
  } else {
    score<kType>(params, rows, count, list, 0, most);
  }
  for (int64_t r = 0; r < count; ++r) weigh<kType>(cache, rows[r], list);
  add_up<kType>(cache, rows, count, list, 0, kSplit, 0, size, panel);
  for (int64_t begin = kSplit; begin < most; begin += kSplit) {
    for (int64_t r = 0; r < count; ++r) rows[r].sums = scratch.sums + r * size;
    add_up<kType>(cache, rows, count, list, begin, begin + kSplit, 0, size, panel);
    for (int64_t r = 0; r < count; ++r) add_to(rows[r].out, rows[r].sums, size);
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

// The entries of `all` that a query at `position` sees, in order; `seen` may be `all`. Returns their number.
int64_t select_visible(const KvCache& cache, int64_t s, int32_t position, const int64_t* all, int64_t* seen) {
  int64_t n = 0;
  for (int64_t e = 0; e < cache.lengths[s]; ++e) {
    const int64_t slot = slot_of(cache, s, e);
    seen[n] = all[e];
    n += cache.positions[slot] <= position && (cache.until == nullptr || position < cache.until[slot]);
  }
  return n;
}

int64_t row_of(const Attention& params, int64_t i) { return params.index ? params.index[i] : i; }

Row row_for(const Attention& params, int64_t i, int64_t head, int64_t visible, float* scores) {
  const int64_t size = params.cache.head_size;
  float* const out = params.out + i * params.out_stride + head * size;
  return {params.query + i * params.query_stride + head * size,
          out,
          out,
          params.log_sum_exp ? params.log_sum_exp + i * params.heads + head : nullptr,
          visible,
          scores};
}

// --- pieces that are whole queries
// --------------------------------------------------------------------------------------

// Queries begin..end, which are of one sequence, with the heads of one KV head.
void run_queries(Job& job, const Scratch& scratch, int64_t begin, int64_t end, int64_t kv_head) {
  const Attention& params = job.params;
  const KvCache& cache = params.cache;
  const int64_t s = params.query_sequence[row_of(params, begin)];
  const bool together = list_entries(cache, s, kv_head, scratch.all) && cache.until == nullptr;

  int64_t rows = 0, read = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t position = params.query_positions[row_of(params, i)];
    const int64_t visible =
        together ? count_visible(cache, s, position) : select_visible(cache, s, position, scratch.all, scratch.seen);
    for (int64_t h = 0; h < job.heads_per_kv; ++h, ++rows) {
      scratch.rows[rows] =
          row_for(params, i, kv_head * job.heads_per_kv + h, visible, scratch.scores + rows * job.longest);
    }
    read += visible;
    if (!together || i + 1 == end) {
      for_kv_type(cache.type, [&]<KvType kType>() {
        attend<kType>(params, scratch, rows, {together ? scratch.all : scratch.seen, 0});
      });
      rows = 0;
    }
  }
  __atomic_fetch_add(&job.vectors, read, __ATOMIC_RELAXED);
}

void run_pieces(Job& job, const Scratch& scratch) {
  const Attention& params = job.params;
  const auto sequence_of = [&](int64_t i) { return params.query_sequence[row_of(params, i)]; };
  for (;;) {
    const int64_t piece = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (piece >= job.pieces) return;
    // The last queries see most, so they go first.
    const int64_t block = (job.pieces - 1 - piece) / params.cache.kv_heads;
    int64_t begin = block * job.queries;
    const int64_t last = begin + job.queries < params.count ? begin + job.queries : params.count;
    while (begin < last) {
      int64_t end = begin + 1;
      while (end < last && sequence_of(end) == sequence_of(begin)) ++end;
      run_queries(job, scratch, begin, end, piece % params.cache.kv_heads);
      begin = end;
    }
  }
}

// --- pieces of a query
// -------------------------------------------------------------------------------------------------

// body(piece) for pieces 0..count, each taken by the next worker that is free.
template <class Body>
void run_each(int64_t count, const Body& body) {
  int64_t next = 0;
  on_all_threads([&](int, int) {
    for (;;) {
      const int64_t piece = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (piece >= count) return;
      body(piece);
    }
  });
}

// Few queries, a region for each step: scores by ranges of entries, probabilities by rows, values by splits and
// columns.
void run_divided(Job& job, int64_t workers) {
  const Attention& params = job.params;
  const KvCache& cache = params.cache;
  const int64_t size = cache.head_size, units = params.count * cache.kv_heads, rows = params.count * params.heads;
  const int64_t splits = (job.longest + kSplit - 1) / kSplit;
  const int64_t bytes =
      rows_bytes(rows) + params.count * job.longest * 8 + rows * job.longest * 4 + (splits - 1) * rows * size * 4;
  char* const memory = static_cast<char*>(::operator new(static_cast<size_t>(bytes), kLine));
  Row* const row = reinterpret_cast<Row*>(memory);
  int64_t* const lists = reinterpret_cast<int64_t*>(memory + rows_bytes(rows));
  float* const scores = reinterpret_cast<float*>(lists + params.count * job.longest);
  float* const sums = scores + rows * job.longest;

  for (int64_t i = 0; i < params.count; ++i) {
    const int64_t s = params.query_sequence[row_of(params, i)];
    const int32_t position = params.query_positions[row_of(params, i)];
    int64_t* const list = lists + i * job.longest;
    const bool together = list_entries(cache, s, 0, list) && cache.until == nullptr;
    const int64_t visible =
        together ? count_visible(cache, s, position) : select_visible(cache, s, position, list, list);
    for (int64_t h = 0; h < params.heads; ++h) {
      const int64_t at = i * params.heads + h;
      row[at] = row_for(params, i, h, visible, scores + at * job.longest);
    }
    job.vectors += visible * cache.kv_heads;
  }

  for_kv_type(cache.type, [&]<KvType kType>() {
    const auto rows_of = [&](int64_t unit) { return row + unit * job.heads_per_kv; };
    const auto entries_of = [&](int64_t unit) {
      return Entries{lists + unit / cache.kv_heads * job.longest, unit % cache.kv_heads * cache.block_size};
    };
    // Ranges so long that each worker gets a few, but not shorter than is worth the taking.
    int64_t range = job.longest * units / (8 * workers) / 64 * 64;
    range = range < 64 ? 64 : range;
    const int64_t ranges = (job.longest + range - 1) / range;
    run_each(units * ranges, [&](int64_t piece) {
      const int64_t unit = piece / ranges, begin = piece % ranges * range;
      score<kType>(params, rows_of(unit), job.heads_per_kv, entries_of(unit), begin, begin + range);
    });
    in_parallel(rows, job.longest * 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) weigh<kType>(cache, row[r], entries_of(r / job.heads_per_kv));
    });
    const int64_t parts = (size + kSplitColumns - 1) / kSplitColumns;
    run_each(units * splits * parts, [&](int64_t piece) {
      const int64_t unit = piece / parts / splits, split = piece / parts % splits, from = piece % parts * kSplitColumns;
      const int64_t to = from + kSplitColumns < size ? from + kSplitColumns : size;
      for (int64_t h = 0; h < job.heads_per_kv; h += kGroup) {
        const int64_t first = unit * job.heads_per_kv + h;
        const int64_t together = job.heads_per_kv - h < kGroup ? job.heads_per_kv - h : kGroup;
        Row mine[kGroup];
        for (int64_t r = 0; r < together; ++r) {
          mine[r] = row[first + r];
          if (split > 0) mine[r].sums = sums + ((split - 1) * rows + first + r) * size;
        }
        add_up<kType>(cache, mine, together, entries_of(unit), split * kSplit, (split + 1) * kSplit, from, to);
      }
    });
  });
  for (int64_t split = 1; split < splits; ++split) {
    for (int64_t r = 0; r < rows; ++r) {
      if (split * kSplit < row[r].visible) add_to(row[r].out, sums + ((split - 1) * rows + r) * size, size);
    }
  }
  ::operator delete(memory, kLine);
}

}  // namespace

void compacted_attention(const Attention& params) {
  if (params.count <= 0) return;
  const int64_t began = nanoseconds();
  const KvCache& cache = params.cache;
  const int64_t workers = threads();
  int64_t longest = 1;
  for (int64_t i = 0; i < params.count; ++i) {
    const int64_t n = cache.lengths[params.query_sequence[row_of(params, i)]];
    longest = n > longest ? n : longest;
  }
  Job job{params};
  job.longest = (longest + 15) / 16 * 16;
  job.heads_per_kv = params.heads / cache.kv_heads;
  job.queries = params.count / (4 * workers);
  const int64_t most = kMaxRows < kMaxScores / job.longest ? kMaxRows : kMaxScores / job.longest;
  job.queries = job.queries < most / job.heads_per_kv ? job.queries : most / job.heads_per_kv;
  job.queries = job.queries < 1 ? 1 : job.queries;
  job.pieces = (params.count + job.queries - 1) / job.queries * cache.kv_heads;

  const bool alone = params.count * params.heads * longest * cache.head_size < 16384;
  if (!alone && workers > 1 && job.pieces < 3 * workers) {
    run_divided(job, workers);
  } else {
    const int64_t bytes = scratch_bytes(job);
    char* memory = static_cast<char*>(::operator new(static_cast<size_t>(bytes * (alone ? 1 : workers)), kLine));
    if (alone) {
      run_pieces(job, carve(job, memory));
    } else {
      on_all_threads([&](int worker, int) { run_pieces(job, carve(job, memory + worker * bytes)); });
    }
    ::operator delete(memory, kLine);
  }

  Counters delta{};
  delta.attention_pairs = job.vectors * job.heads_per_kv;
  const int64_t vector_bytes = cache.type == KvType::f32  ? cache.head_size * 4
                               : cache.type == KvType::i8 ? cache.head_size + 4
                                                          : cache.head_size * 2;
  delta.kv_bytes_read = job.vectors * 2 * vector_bytes;
  delta.attention_nanoseconds = nanoseconds() - began;
  quicksilver::count(delta);
}

}  // namespace quicksilver::QS_ISA
