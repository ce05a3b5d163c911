// How fast the Matryoshka GEMM is, beside what the machine can read.
//
//   gemm_bench [rows ...]      (default 1 4 128)
//
// Weights come out of memory, not out of cache: each shape has copies worth 256 MB, used in turn. For few rows look at
// the share of the read ceiling, for many rows at the share of the INT8 ceiling. Product and plain reading take turns,
// in short rounds, and the best of each counts: on a shared machine the others say what the neighbours were doing.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "quicksilver/ceilings.h"
#include "quicksilver/matryoshka.h"
#include "quicksilver/runtime.h"

namespace {

using namespace quicksilver;
using Clock = std::chrono::steady_clock;
constexpr int kRounds = 40;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Memory of huge pages, where the system has them.
char* huge_alloc(size_t bytes) {
  constexpr size_t kPage = size_t(2) << 20;
  char* p = static_cast<char*>(std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage));
  if (p == nullptr) std::abort();
  madvise(p, bytes, MADV_HUGEPAGE);
  return p;
}

struct Shape {
  int64_t n, k;
};

void bench(const Shape& shape, int64_t rows, char* memory, size_t bytes, double int8) {
  constexpr int32_t kGroup = 64;
  const int64_t plane = shape.n * ((shape.k + 7) / 8) * 4,
                scales = shape.n * ((shape.k + kGroup - 1) / kGroup) * 2;             // offsets take as much
  const auto page = [](int64_t size) { return (size + 8191) / 8192 * 8192 + 4096; };  // an odd number of 4 KiB pages
  const int64_t each = 2 * page(plane) + 2 * page(scales);
  const int64_t copies = std::max<int64_t>(1, static_cast<int64_t>(bytes) / each);

  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * shape.k));
  for (float& value : x) value = normal(engine);
  std::vector<char> buffer(static_cast<size_t>(quantized_rows_bytes(rows, shape.k, kGroup)) + 64);
  void* start = buffer.data();
  size_t space = buffer.size();
  const QuantizedRows q = carve_quantized_rows(std::align(64, 1, start, space), rows, shape.k, kGroup);
  quantize_rows(x.data(), shape.k, nullptr, q);
  std::vector<float> y(static_cast<size_t>(rows * shape.n));

  for (const bool low : {false, true}) {
    double ceiling = 0, rate = 0;
    int64_t copy = 0;
    for (int round = 0; round < kRounds; ++round) {
      const size_t part = bytes / 8;
      ceiling = std::max(ceiling, read_ceiling(memory + static_cast<size_t>(round % 8) * part, part));
      const auto begin = Clock::now();
      int64_t calls = 0;
      double elapsed = 0;
      do {
        char* base = memory + copy * each;
        copy = (copy + 1) % copies;
        MatryoshkaGemm gemm;
        gemm.x = q;
        gemm.w = {reinterpret_cast<uint8_t*>(base),
                  low ? reinterpret_cast<uint8_t*>(base + page(plane)) : nullptr,
                  reinterpret_cast<uint16_t*>(base + 2 * page(plane)),
                  reinterpret_cast<uint16_t*>(base + 2 * page(plane) + page(scales)),
                  shape.n,
                  shape.k,
                  kGroup};
        gemm.y = y.data();
        gemm.y_stride = shape.n;
        matryoshka_gemm(gemm);
        ++calls;
        elapsed = seconds_since(begin);
      } while (elapsed < 0.005);
      rate = std::max(rate, static_cast<double>(calls) / elapsed);
    }
    const double read = rate * static_cast<double>(plane * (low ? 2 : 1) + 2 * scales);
    const double macs = rate * static_cast<double>(rows * shape.n * shape.k);
    std::printf(
        "K %5lld N %5lld rows %4lld %s  %5.1f GB/s, %4.0f%% of the read ceiling  %6.1f GMAC/s, %4.0f%% of "
        "INT8\n",
        static_cast<long long>(shape.k), static_cast<long long>(shape.n), static_cast<long long>(rows),
        low ? "INT8" : "INT4", read / 1e9, 100 * read / ceiling, macs / 1e9, 100 * macs / int8);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> rows;
  for (int i = 1; i < argc; ++i) rows.push_back(std::atoll(argv[i]));
  if (rows.empty()) rows = {1, 4, 128};
  constexpr size_t kBytes = size_t(256) << 20;
  char* memory = huge_alloc(kBytes);
  std::memset(memory, 0x35, kBytes);  // also finite, small scales
  const double int8 = int8_ceiling();
  std::printf("%s, %d threads, read ceiling %.1f GB/s, INT8 ceiling %.1f GMAC/s\n", isa_name(current_isa()), threads(),
              read_ceiling(memory, kBytes) / 1e9, int8 / 1e9);
  for (int64_t count : rows) {
    for (const Shape& shape : {Shape{1536, 576}, Shape{576, 1536}, Shape{49152, 576}, Shape{4096, 4096}}) {
      bench(shape, count, memory, kBytes, int8);
    }
    bench({960, 576}, count, memory, kBytes, int8);
  }
  std::free(memory);
  return 0;
}
