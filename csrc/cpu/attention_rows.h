// Attention's arithmetic: neighbouring rows, of which each is a query and a head, over the entries that they see.
// Scores, probabilities, sums of values. Which rows go together, and on which thread, is attention.cpp's.
#pragma once

#include "kernels.h"
#include "kv_types.h"

namespace quicksilver::QS_ISA {
namespace {

constexpr int64_t kValueBlock = 64;     // entries whose values stay in the first-level cache
constexpr int64_t kPanelFloats = 4096;  // of it, what values as fp32 may take
constexpr int64_t kFetchAhead = 64;     // entries

// One query and head.
struct Row {
  const float* query;
  float* out;
  float* sums;  // where values are added up: out, or memory for one split
  float* log_sum_exp;
  int64_t visible;  // the first so many entries of the list
  float* scores;    // [visible rounded up to 16]
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

// Neighbouring rows that go together, so that they share the conversion of keys and values to fp32.
constexpr int kGroup = 3;
// From so many rows on, keys and values are converted first, keys so that their elements lie side by side. Then this
// many share what is loaded: as many as there are registers for.
constexpr int64_t kMany = 8;
constexpr int kTile = QS_AVX512 ? 4 : 2;
constexpr int kWide = QS_AVX512 ? 6 : 3;

// Fetches columns k..k + n of a vector of the cache, into the second-level cache: the first-level one can't wait for as
// many lines at once.
template <KvType kType>
QS_INLINE void fetch(const void* array, int64_t vector, int64_t size, int64_t k, int64_t n) {
  constexpr int64_t kBytes = kType == KvType::f32 ? 4 : kType == KvType::i8 ? 1 : 2;
  const char* p = static_cast<const char*>(array) + (vector * size + k) * kBytes;
  for (int64_t i = 0; i < n * kBytes; i += 64) __builtin_prefetch(p + i, 0, 2);
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
    const int64_t ahead = e + kFetchAhead;
    if (ahead < most) {
      fetch<kType>(cache.key, list[ahead], size, 0, 4 * size);
    } else if (ahead - most < most) {  // the first values, which come next
      fetch<kType>(cache.value, list[ahead - most], size, 0, 4 * size);
    }
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

// --- many rows -------------------------------------------------------------------------------------------------------

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

}  // namespace
}  // namespace quicksilver::QS_ISA
