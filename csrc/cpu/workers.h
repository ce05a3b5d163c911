// Splitting work over the pool, and those kernels that a stage runs inside a parallel region of its own.
#pragma once

#include <time.h>

#include "isa.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/matryoshka.h"
#include "quicksilver/runtime.h"

namespace quicksilver::QS_ISA {

QS_INLINE int64_t nanoseconds() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
}

struct Range {
  int64_t begin;
  int64_t end;
};
// Worker's part of 0..count: contiguous, sizes at most one apart.
QS_INLINE Range split(int64_t count, int worker, int workers) {
  return {count * worker / workers, count * (worker + 1) / workers};
}

// body(worker, workers) on every thread.
template <class Body>
static void on_all_threads(const Body& body) {
  parallel([](void* context, int worker, int workers) { (*static_cast<const Body*>(context))(worker, workers); },
           const_cast<Body*>(&body));
}

// body(begin, end) over parts of 0..count, on the calling thread alone where the work wouldn't repay waking the others.
template <class Body>
static void in_parallel(int64_t count, int64_t work_each, const Body& body) {
  if (count <= 0) return;
  if (count == 1 || count * work_each < 16384) return body(int64_t{0}, count);
  on_all_threads([&](int worker, int workers) {
    const Range part = split(count, worker, workers);
    if (part.begin < part.end) body(part.begin, part.end);
  });
}

// The weights that this worker's share of the products begins with: what it would wait for first.
struct FirstWeights {
  const uint8_t* hi = nullptr;
  const uint8_t* lo = nullptr;  // null where the rows want none
  int64_t bytes = 0;            // of either plane

  // Fetches the next two lines of each plane into the second-level cache. The memory would idle while a worker prepares
  // its rows, so it is given this to do; called a few dozen times, which is as much as the cache and the time hold.
  QS_INLINE_MEMBER void fetch() {
    if (bytes < 128) return;
    __builtin_prefetch(hi, 0, 2);
    __builtin_prefetch(hi + 64, 0, 2);
    hi += 128;
    if (lo) {
      __builtin_prefetch(lo, 0, 2);
      __builtin_prefetch(lo + 64, 0, 2);
      lo += 128;
    }
    bytes -= 128;
  }
};
FirstWeights first_weights(const MatryoshkaGemm* params, int count, int worker, int workers);
// This worker's share of the products. The quantized rows must be there.
void gemm_worker(const MatryoshkaGemm* params, int count, int worker, int workers);
// Adds the products to the counters; once per call, not per worker.
void gemm_count(const MatryoshkaGemm* params, int count);

// KV heads begin..end of row i of kv_scatter.
void kv_scatter_heads(const KvScatter& params, int64_t i, int64_t begin, int64_t end);

}  // namespace quicksilver::QS_ISA
