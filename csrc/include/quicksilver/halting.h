// Dynamic Token Halting: drift, entropy, decision and order-preserving compaction.
#pragma once

#include <cstdint>

namespace quicksilver {

struct HaltingUpdate {
  const float* hidden = nullptr;    // state after the layer, row r at hidden + r * stride
  const float* previous = nullptr;  // state before it
  int64_t stride = 0;
  int64_t previous_stride = 0;
  int64_t d = 0;
  const int32_t* active = nullptr;  // [count] rows to judge, ascending; null: rows 0..count-1
  int64_t count = 0;
  bool previous_compact = false;       // previous row i belongs to active[i], else to row active[i]
  const float* entropy = nullptr;      // [count], bits, in the order of `active`; null: no entropy test
  const int32_t* positions = nullptr;  // indexed by row
  const int8_t* overrides = nullptr;   // indexed by row: 1 halts, -1 never halts, 0 leaves it to the test; or null
  float drift_threshold = 0;
  float entropy_threshold = 0;
  bool relative = true;            // drift = ||h - h'|| / ||h'|| (0 / 0 is 0), else ||h - h'||
  int32_t sink_tokens = 0;         // positions below this never halt (overrides = 1 can't move them)
  float* drift = nullptr;          // [count]
  uint8_t* halted = nullptr;       // indexed by row: set to 1 where a row halts, untouched elsewhere
  int32_t* next_active = nullptr;  // [count]: rows that go on, in order; may be `active` itself
};
// Halts row r where drift < drift_threshold and, if entropy is given, entropy < entropy_threshold. A NaN never halts.
// Norms: sum of squares in 16 fp32 lanes, lane = column % 16, then lanes pairwise (8, 4, 2, 1). Returns the new count.
int64_t halting_update(const HaltingUpdate& params);

// Entropy, in bits, of softmax over each row (the paper's "latent" entropy): out[i] for row index[i].
void softmax_entropy(const float* x, int64_t stride, const int32_t* index, int64_t count, int64_t d, float* out);

}  // namespace quicksilver
