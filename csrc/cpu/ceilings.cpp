// The machine's ceilings, by the same instructions and the same threads as the kernels.
#include <time.h>

#include "gemm_micro.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Makes the compiler forget what it knows of a value, so that no product of it can leave the loop.
QS_INLINE void forget(ni& value) {
#if defined(__SSE2__) && !defined(QS_EMULATE_AVX512)
  __asm__("" : "+v"(value));
#else
  __asm__("" : "+m"(value));
#endif
}

constexpr int kSums = 10;  // two dpbusd per cycle, which take 5 each
constexpr int kSteps = 1 << 20;
constexpr int kRounds = 5;
#if QS_AVX2
constexpr int kMacsPerLane = 4;
#else
constexpr int kMacsPerLane = 2;
#endif

QS_INLINE ni multiply_accumulate(ni sum, ni code, ni x, ni ones) {
#if QS_VNNI
  (void)ones;
  return dot4(sum, code, x);
#elif QS_AVX2
  return sum + madd16(maddubs(code, x), ones);
#else
  (void)ones;
  return sum + madd16(code, x);
#endif
}

}  // namespace

double read_ceiling(const void* data, size_t bytes) {
  const double start = now();
  on_all_threads([&](int worker, int workers) {
    // Two places at a time, as a product reads two planes.
    typedef long long Line __attribute__((vector_size(64)));
    const size_t half = bytes / sizeof(Line) / static_cast<size_t>(workers) / 2;
    const Line* p = static_cast<const Line*>(data) + 2 * half * static_cast<size_t>(worker);
    Line low = {}, high = {};
    for (size_t i = 0; i < half; ++i) {
      low ^= p[i];
      high ^= p[half + i];
    }
    const Line all = low ^ high;
    __asm__ volatile("" : : "m"(all));
  });
  return static_cast<double>(bytes) / (now() - start);
}

double int8_ceiling() {
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    int shares = 1;
    const double start = now();
    on_all_threads([&](int worker, int workers) {
      if (worker == 0) shares = workers;
      ni sums[kSums] = {};
      ni code = broadcast_ni(0x01020304), x = broadcast_ni(0x01010101);
      const ni ones = broadcast_ni(0x00010001);
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 10
        for (int i = 0; i < kSums; ++i) {
          forget(x);
          sums[i] = multiply_accumulate(sums[i], code, x, ones);
          in_order(sums[i]);
        }
      }
      ni all = {};
      for (int i = 0; i < kSums; ++i) all += sums[i];
      __asm__ volatile("" : : "m"(all));
    });
    const double macs = static_cast<double>(kSteps) * kSums * kLanes * kMacsPerLane * shares;
    const double rate = macs / (now() - start);
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace quicksilver::QS_ISA
