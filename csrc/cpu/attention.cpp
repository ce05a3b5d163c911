// Attention of active queries over the entries that are present.
//
// A piece of work is a few neighbouring queries and the heads that share one KV head: they read each key and value once
// out of the first-level cache. What a query sees is a list of entries; for causal order without expiry the lists of a
// sequence's queries are prefixes of one list, and the queries go through it together. Where that makes too few pieces
// for the threads, as for one token of one sequence, the entries of a query are divided among them instead.
#include <new>

#include "attention_rows.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

constexpr int64_t kMaxRows = 48;           // queries times heads of a piece: they share each key's transposition
constexpr int64_t kMaxScores = 64 * 1024;  // fp32 values a piece may hold where it has several queries
constexpr int64_t kSplit = 512;            // entries whose values are added up apart from the others'
constexpr int64_t kSplitColumns = 32;      // columns of a value that one thread adds up, where entries are divided

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

// --- pieces that are whole queries -----------------------------------------------------------------------------------

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

// --- pieces of a query -----------------------------------------------------------------------------------------------

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
