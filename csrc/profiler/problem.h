// A kernel's parameters at a shape, filled with random data in a backend's memory.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "arguments.h"
#include "backend.h"

namespace profiler {

// Random numbers fast enough to fill gigabytes of planes.
class Random {
 public:
  explicit Random(int64_t seed) : state_(static_cast<uint64_t>(seed)) {}
  uint64_t next();
  float value();  // uniform, mean 0, variance 1
  std::vector<float> values(int64_t n, float scale = 1, float mean = 0);
  // `count` of the numbers below n, ascending
  std::vector<int32_t> choice(int64_t n, int64_t count);

 private:
  uint64_t state_;
};

// The least that a run must do: every byte that it reads or writes, once, and the multiply-adds of its products and of
// attention.
struct Work {
  double bytes = 0;
  double multiply_adds = 0;
};

constexpr float kFusionThreshold = 0.5f, kDriftThreshold = 0.1f;
constexpr int64_t kBlockSize = 64;

class Problem {
 public:
  Problem(Backend& backend, const Arguments& arguments);

  void restore();  // before every run
  void run();
  Work work() const;
  // One stage of one layer, on the state as it is.
  void run_stage(Kernel stage, size_t layer);

  const Arguments& arguments;
  Backend& backend;
  Memory memory;

  std::vector<Layer> layers;
  std::vector<KvCache> caches;  // one per layer
  Norm final_norm;
  Linear head;
  float* logits = nullptr;

  // Rows that take part: host's view before a run, and the device's.
  Rows rows;
  int32_t* active = nullptr;
  int32_t* count = nullptr;
  uint8_t* halted = nullptr;
  std::vector<int32_t> taking_part, survivors, positions, sequence, bits, group_of;
  std::vector<float> hidden;

  // Of the mechanisms' own kernels.
  QuantizedRows quantized;
  MatryoshkaGemm gemm;
  KvScatter scatter;
  HaltingUpdate halting;
  FusionGroups fusion;
  int32_t* groups = nullptr;
  float* weights = nullptr;
  float* fused = nullptr;
  Rows fused_rows;

 private:
  MatryoshkaWeight weight(int64_t n, int64_t k, bool low);
  Linear linear(int64_t n, int64_t k, bool low);
  Norm norm();
  Layer layer();
  void make_rows();
  void make_caches(int64_t how_many);
  void make_mechanism();
  void run_step();
  size_t halting_layer() const;
  Work stage_work(Kernel stage, const std::vector<int32_t>& who) const;
  Work head_work(int64_t count) const;

  Random random_;
  const float* cosine_ = nullptr;
  const float* sine_ = nullptr;
  int8_t* overrides_ = nullptr;  // 1 for rows that halt, -1 for others
  int8_t* never_ = nullptr;
  int32_t* cache_state_ = nullptr;  // tables, lengths and blocks used of all caches
  std::vector<int32_t> initial_state_;
};

}  // namespace profiler
