// The kernels' definitions in double precision, for a few values at a time: what answers are compared with.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"

namespace profiler {

using Row = std::vector<double>;

double half_to_double(uint16_t h);
double bfloat_to_double(uint16_t b);

// x after the norm, whose weight and bias are the host's.
Row normed(const Norm& norm, const std::vector<float>& weight, const std::vector<float>& bias, Row x);
// x as its quantized form says it.
Row quantized_row(const Row& x, int64_t group);
double activated(Activation activation, double gate, double up);

// A weight's planes and scales, copied from a backend.
class PlainWeight {
 public:
  PlainWeight(Memory& memory, const Linear& linear);
  // Row n of the product with x, bias included.
  double dot(int64_t n, const Row& x, bool eight_bits) const;

 private:
  MatryoshkaWeight view_;
  std::vector<uint8_t> hi_, lo_;
  std::vector<uint16_t> scale_, offset_;
  std::vector<float> bias_;
};

// Entries of one layer's cache, block by block.
class PlainCache {
 public:
  PlainCache(Memory& memory, const KvCache& cache);
  int64_t length(int64_t sequence) const { return lengths_[static_cast<size_t>(sequence)]; }
  int64_t slot(int64_t sequence, int64_t entry) const;
  int32_t position(int64_t slot) const { return positions_[static_cast<size_t>(slot)]; }
  // One head of one entry.
  Row vector(bool value, int64_t slot, int64_t head);

 private:
  struct Block {
    int64_t number = -1;
    std::vector<char> elements[2];
    std::vector<float> scale[2];
  };
  Memory& memory_;
  KvCache cache_;
  std::vector<int32_t> table_, lengths_, positions_;
  Block block_;
};

// Relative error in the 2-norm, gathered value by value.
class Error {
 public:
  void add(double got, double want);
  double value() const;
  int64_t values() const { return values_; }

 private:
  double difference_ = 0, base_ = 0;
  int64_t values_ = 0;
};

}  // namespace profiler
