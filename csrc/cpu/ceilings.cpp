// The machine's ceilings, by the same instructions and the same threads as the kernels.
#include "gemm_micro.h"
#include "kernels.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

// Makes the compiler forget what it knows of a value, so that no product of it can leave the loop.
QS_INLINE void forget(ni& value) {
#if defined(__SSE2__) && !defined(QS_EMULATE_AVX512)
  __asm__("" : "+v"(value));
#else
  __asm__("" : "+m"(value));
#endif
}

constexpr int kSums = QS_AVX512 ? 16 : 12;  // two dpbusd a cycle, which take 5 each, want ten
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
  const int64_t start = nanoseconds();
  on_all_threads([&](int worker, int workers) {
    // Several places at a time and fetched ahead, as the products do it. On Zen 3 one place gives 10 GB/s, two give 16,
    // four 22 and six no more.
    typedef long long Line __attribute__((vector_size(64)));
    constexpr size_t kPlaces = 4, kAhead = 16;
    const size_t part = bytes / sizeof(Line) / static_cast<size_t>(workers) / kPlaces;
    const Line* p = static_cast<const Line*>(data) + kPlaces * part * static_cast<size_t>(worker);
    Line sums[kPlaces] = {};
    for (size_t i = 0; i < part; ++i) {
#pragma GCC unroll 4
      for (size_t place = 0; place < kPlaces; ++place) {
        __builtin_prefetch(p + place * part + i + kAhead, 0, 0);
        sums[place] ^= p[place * part + i];
      }
    }
    const Line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    __asm__ volatile("" : : "m"(all));
  });
  return static_cast<double>(bytes) / (1e-9 * static_cast<double>(nanoseconds() - start));
}

double int8_ceiling() {
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    int shares = 1;
    const int64_t start = nanoseconds();
    on_all_threads([&](int worker, int workers) {
      if (worker == 0) shares = workers;
      ni sums[kSums] = {};
      ni code = broadcast_ni(0x01020304), x = broadcast_ni(0x01010101);
      const ni ones = broadcast_ni(0x00010001);
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) {
          if (!QS_VNNI) forget(x);
          sums[i] = multiply_accumulate(sums[i], code, x, ones);
          in_order(sums[i]);
        }
      }
      ni all = {};
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) all += sums[i];  // unrolled, or the sums would live in memory
      __asm__ volatile("" : : "m"(all));
    });
    const double macs = static_cast<double>(kSteps) * kSums * kLanes * kMacsPerLane * shares;
    const double rate = macs / (1e-9 * static_cast<double>(nanoseconds() - start));
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace quicksilver::QS_ISA
