// A decode step in one call: one new token for each of a few sequences, from the embedding to the logits. What stands
// between the kernels is then no more than a few function calls, where a small model's step takes milliseconds.
#pragma once

#include <cstdint>

#include "quicksilver/layer.h"

namespace quicksilver {

// Halting with kv_policy skip and frozen states: see halting.h for the test.
struct StepHalting {
  float drift_threshold = 0;
  bool relative = true;
  bool tests_entropy = false;  // the latent one
  float entropy_threshold = 0;
  int32_t sink_tokens = 0;
  int64_t min_layer = 1;  // layers run before the first test
};

// Adaptive bits from a layer on: 8 where softmax_entropy / full_entropy >= threshold or the position is below
// sink_tokens, else 4.
struct StepAmq {
  int64_t layer = 0;
  float threshold = 0;
  float full_entropy = 1;  // log2(d)
  int32_t sink_tokens = 0;
};

struct DecodeStep {
  const Layer* const* layers = nullptr;
  KvCache* const* caches = nullptr;  // a layer's each
  int64_t layer_count = 0;
  const uint16_t* embedding = nullptr;        // fp16 [vocab, d]
  const float* position_embedding = nullptr;  // [max_positions, d] or null
  Norm final_norm;
  Linear head;
  const StepHalting* halting = nullptr;  // null: off
  const StepAmq* amq = nullptr;          // null: off

  int64_t count = 0;                   // rows
  const int64_t* ids = nullptr;        // [count]
  const int32_t* positions = nullptr;  // [count]
  const int32_t* sequence = nullptr;   // [count]
  float* hidden = nullptr;             // [count, d]: written
  int32_t* active = nullptr;           // [count]: written
  int32_t* bits = nullptr;             // [count]: the bits of each row at the end; may be null without amq
  int32_t* depth = nullptr;            // [count]: layers that a row ran
  float* logits = nullptr;             // [count, head.weight.n]

  // For observers, or null; NaN where nothing was measured. A row's drift over layer l, if it was judged there, and the
  // latent entropy of its state as it comes into layer l, if halting (after the layer below) or amq asked for it.
  float* drift = nullptr;    // [layer_count, count]
  float* entropy = nullptr;  // [layer_count, count]
};

// Returns false where a cache is full; what was written then stays.
bool decode_step(const DecodeStep& step, Workspace& work);

}  // namespace quicksilver
