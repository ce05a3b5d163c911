// Models of the warp-level matrix instructions, fragment for fragment: registers are those of the PTX ISA's tables.
#include <cstring>

#include "block.h"
#include "half.h"

namespace quicksilver::emulator {
namespace {

constexpr int kRows = 16, kColumns = 8;

template <class T>
struct Operands {
  T* d;
  const uint32_t *a, *b;
};

template <class T>
const Operands<T>& operands(const void* in) {
  return *static_cast<const Operands<T>*>(in);
}

// d[2i + j] of lane 4g + t is row g + 8i, column 2t + j.
template <class T, class Product>
void for_results(const void* const* in, const Product& product) {
  for (int lane = 0; lane < kLanes; ++lane) {
    T* d = operands<T>(in[lane]).d;
    for (int r = 0; r < 4; ++r) d[r] = product(lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2, d[r]);
  }
}

// In both shapes a register holds 4 bytes along k: of a row of A at bytes 4t + 16 * (i / 2) of row g + 8 * (i % 2), of
// a column of B at bytes 4t + 16 * i of column g.
struct Bytes {
  unsigned char a[kRows][32], b[kColumns][32];
  template <class T>
  void gather(const void* const* in) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Operands<T>& from = operands<T>(in[lane]);
      for (int i = 0; i < 4; ++i) std::memcpy(&a[g + 8 * (i % 2)][4 * t + 16 * (i / 2)], &from.a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[g][4 * t + 16 * i], &from.b[i], 4);
    }
  }
};

template <class A, class B>  // the bytes' types
void compute_integer(const void* const* in, void* const*) {
  Bytes bytes;
  bytes.gather<int32_t>(in);
  int16_t a[kRows][32], b[kColumns][32];
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < 32; ++k) a[i][k] = static_cast<A>(bytes.a[i][k]);
  }
  for (int j = 0; j < kColumns; ++j) {
    for (int k = 0; k < 32; ++k) b[j][k] = static_cast<B>(bytes.b[j][k]);
  }
  for_results<int32_t>(in, [&](int row, int column, int32_t sum) {
    int32_t dot = 0;
    for (int k = 0; k < 32; ++k) dot += a[row][k] * b[column][k];
    return static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(dot));  // wraps
  });
}

template <float (*to_float)(uint16_t)>
void compute_float(const void* const* in, void* const*) {
  Bytes bytes;
  bytes.gather<float>(in);
  float a[kRows][16], b[kColumns][16];
  const auto element = [](const unsigned char* row, int k) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * k, 2);
    return to_float(bits);
  };
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < kRows; ++i) a[i][k] = element(bytes.a[i], k);
    for (int j = 0; j < kColumns; ++j) b[j][k] = element(bytes.b[j], k);
  }
  // Products are exact; hardware doesn't say how it rounds their sum.
  for_results<float>(in, [&](int row, int column, float sum) {
    for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
    return sum;
  });
}

template <int matrices, bool transposed>
void load_matrices(const void* const* rows, void* const* out) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < matrices; ++i) {
      const auto element = [&](int row, int column) {
        uint16_t bits;
        std::memcpy(&bits, static_cast<const unsigned char*>(rows[8 * i + row]) + 2 * column, 2);
        return uint32_t{bits};
      };
      static_cast<uint32_t*>(out[lane])[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                        : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
  }
  if (BlockCounter* counter = running().block->counter()) counter->ldmatrix(rows, matrices);
}

template <class T>
void mma(const char* what, T* d, const uint32_t* a, const uint32_t* b, Compute compute, int64_t KernelCounts::* count,
         const Site& site) {
  const auto [block, fiber] = running();
  const Operands<T> operands{d, a, b};
  block->collective(what, &operands, nullptr, compute, false, site);
  if (block->counter() != nullptr && fiber->lane() == 0) ++(block->counter()->counts().*count);
}

}  // namespace

void mma_u8s8(int32_t* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  mma("mma_u8s8", d, a, b, compute_integer<uint8_t, int8_t>, &KernelCounts::mma_u8s8, site);
}
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  mma("mma_f16", d, a, b, compute_float<half_to_float>, &KernelCounts::mma_f16, site);
}
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  mma("mma_bf16", d, a, b, compute_float<bfloat_to_float>, &KernelCounts::mma_bf16, site);
}

void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed, const Site& site) {
  const auto [block, fiber] = running();
  // Every address must be good, though those past the last row aren't used.
  block->shared().access(Access::load, fiber->number, row, 16, site);
  const Compute compute = matrices == 4 ? (transposed ? load_matrices<4, true> : load_matrices<4, false>)
                                        : (transposed ? load_matrices<2, true> : load_matrices<2, false>);
  block->collective(transposed ? "ldmatrix_trans" : "ldmatrix", row, r, compute, false, site);
}

}  // namespace quicksilver::emulator
