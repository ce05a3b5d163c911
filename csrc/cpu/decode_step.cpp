// A whole decode step.
#include "quicksilver/decode_step.h"

#include <new>

#include "kernels.h"
#include "kv_types.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

void embed(const DecodeStep& step, int64_t d) {
  for (int64_t i = 0; i < step.count; ++i) {
    const float* position = step.position_embedding ? step.position_embedding + step.positions[i] * d : nullptr;
    for (int64_t k = 0; k < d; k += 16) {
      const int n = d - k < 16 ? static_cast<int>(d - k) : 16;
      const f32x16 x = kv_load<KvType::f16>(step.embedding, step.ids[i] * d + k, n);
      store(step.hidden + i * d + k, position ? x + load(position + k, n) : x, n);
    }
  }
}

// What a step's decisions need beside its rows: [count] each.
struct Scratch {
  float* entropy;
  float* drift;
  int32_t* next_active;
  uint8_t* halted;
};

// What was measured of the active rows, to their places in a line of the observers' arrays.
void note(float* log, int64_t layer, const DecodeStep& step, const Rows& rows, const float* values) {
  if (log == nullptr) return;
  for (int64_t i = 0; i < rows.count; ++i) log[layer * step.count + rows.active[i]] = values[i];
}

void choose_bits(const DecodeStep& step, const Rows& rows, int64_t d, float* entropy) {
  QS_ISA::softmax_entropy(rows.hidden, d, rows.active, rows.count, d, entropy);
  note(step.entropy, step.amq->layer, step, rows, entropy);
  for (int64_t i = 0; i < rows.count; ++i) {
    const int32_t row = rows.active[i];
    const bool sink = step.positions[row] < step.amq->sink_tokens;
    step.bits[row] = sink || entropy[i] / step.amq->full_entropy >= step.amq->threshold ? 8 : 4;
  }
}

// After `ran` layers. Returns the number of rows that go on.
int64_t halt(const DecodeStep& step, int64_t ran, const Rows& rows, int64_t d, const Workspace& work,
             const Scratch& scratch) {
  const StepHalting& halting = *step.halting;
  if (halting.tests_entropy) {
    QS_ISA::softmax_entropy(rows.hidden, d, rows.active, rows.count, d, scratch.entropy);
    note(step.entropy, ran, step, rows, scratch.entropy);
  }
  HaltingUpdate update;
  update.hidden = rows.hidden;
  update.previous = work.previous;
  update.stride = update.previous_stride = update.d = d;
  update.previous_compact = true;
  update.active = rows.active;
  update.count = rows.count;
  update.entropy = halting.tests_entropy ? scratch.entropy : nullptr;
  update.positions = step.positions;
  update.drift_threshold = halting.drift_threshold;
  update.entropy_threshold = halting.entropy_threshold;
  update.relative = halting.relative;
  update.sink_tokens = halting.sink_tokens;
  update.drift = scratch.drift;
  update.halted = scratch.halted;
  update.next_active = scratch.next_active;
  const int64_t left = QS_ISA::halting_update(update);
  note(step.drift, ran - 1, step, rows, scratch.drift);
  memcpy(step.active, scratch.next_active, static_cast<size_t>(left) * 4);
  return left;
}

}  // namespace

bool decode_step(const DecodeStep& step, Workspace& work) {
  if (step.count <= 0 || step.layer_count <= 0) return true;
  const int64_t began = nanoseconds(), attention_before = counters().attention_nanoseconds;
  const int64_t d = step.layers[0]->d;
  embed(step, d);
  for (int64_t i = 0; i < step.count; ++i) {
    step.active[i] = static_cast<int32_t>(i);
    step.depth[i] = 0;
    if (step.amq) step.bits[i] = 8;
  }
  Rows rows;
  rows.hidden = step.hidden;
  rows.rows = rows.count = step.count;
  rows.active = step.active;
  rows.positions = step.positions;
  rows.sequence = step.sequence;

  char* const memory = static_cast<char*>(::operator new(static_cast<size_t>(step.count) * 13));
  float* const floats = reinterpret_cast<float*>(memory);
  int32_t* const next_active = reinterpret_cast<int32_t*>(floats + 2 * step.count);
  const Scratch scratch{floats, floats + step.count, next_active, reinterpret_cast<uint8_t*>(next_active + step.count)};
  for (float* log : {step.drift, step.entropy}) {
    for (int64_t i = 0; log != nullptr && i < step.layer_count * step.count; ++i) log[i] = __builtin_nanf("");
  }
  // Layers up to the next decision run in one go.
  const int64_t judged_from = step.halting ? step.halting->min_layer - 1 : step.layer_count;
  bool fits = true;
  for (int64_t index = 0; index < step.layer_count && rows.count > 0;) {
    if (step.amq && index == step.amq->layer) {
      choose_bits(step, rows, d, scratch.entropy);
      rows.bits = step.bits;
    }
    int64_t last = index < judged_from ? judged_from : index + 1;
    if (step.amq && index < step.amq->layer && step.amq->layer < last) last = step.amq->layer;
    if (last > step.layer_count) last = step.layer_count;
    fits = QS_ISA::run_layers(step.layers + index, step.caches + index, last - index, rows, work) == last - index;
    if (!fits) break;
    for (int64_t i = 0; i < rows.count; ++i) step.depth[step.active[i]] = static_cast<int32_t>(last);
    if (last > judged_from && last < step.layer_count) rows.count = halt(step, last, rows, d, work, scratch);
    index = last;
  }
  ::operator delete(memory);
  if (!fits) return false;

  rows.count = step.count;
  rows.active = nullptr;
  work.reserve(*step.layers[0], step.count);
  QS_ISA::lm_head(step.final_norm, step.head, rows, d, step.logits, step.head.weight.n, work);
  Counters delta{};
  delta.step_nanoseconds = nanoseconds() - began;
  delta.step_attention_nanoseconds = counters().attention_nanoseconds - attention_before;
  quicksilver::count(delta);
  return true;
}

}  // namespace quicksilver::QS_ISA
