// Drift of every active row, the decision to halt, and the compaction of what goes on, in one launch; entropy of rows.
#include "halting.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;

struct Halting {
  HaltingUpdate update;
  const int32_t* count;
  int32_t* next_count;
  int32_t* counter;
};

// A warp per row; whichever block is last decides for all of them.
QS_KERNEL void __launch_bounds__(kThreads) halting_update_kernel(Halting p) {
  const HaltingUpdate& update = p.update;
  int32_t* shared = shared_memory<int32_t>();
  const int32_t count = p.count ? load(p.count) : static_cast<int32_t>(update.count);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp();
  if (i < count) {
    const int64_t row = update.active ? load(update.active + i) : i;
    const float* before = update.previous + (update.previous_compact ? i : row) * update.previous_stride;
    float drift = 0;
    if (update.active || load(update.halted + row) == 0) {
      drift = row_distance(update.hidden + row * update.stride, before, update.d, update.relative);
    }
    if (lane() == 0) store(update.drift + i, drift);
  }
  bool* is_last = reinterpret_cast<bool*>(shared + kHaltShared);
  if (!last_block(p.counter, static_cast<int>(gridDim.x), is_last)) return;

  HaltDecision decision;
  decision.drift_threshold = update.drift_threshold;
  decision.tests_entropy = update.entropy != nullptr;
  decision.entropy_threshold = update.entropy_threshold;
  decision.sink_tokens = update.sink_tokens;
  decision.positions = update.positions;
  decision.overrides = update.overrides;
  decision.halted = update.halted;
  decision.active = update.active;
  decision.next_active = update.next_active;
  decision.next_count = p.next_count;
  halt_and_compact(
      decision, count, [&](int64_t row) { return load(update.drift + row); },
      [&](int64_t row) { return load(update.entropy + row); }, shared);
}

struct Entropy {
  const float* x;
  int64_t stride;
  const int32_t* index;
  int64_t rows;
  int64_t d;
  float* out;
  const int32_t* count;
};

QS_KERNEL void __launch_bounds__(kThreads) softmax_entropy_kernel(Entropy p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp();
  if (i >= (p.count ? load(p.count) : p.rows)) return;  // whole warps: the others share nothing with this one
  const int64_t row = p.index ? load(p.index + i) : i;
  const float entropy = row_entropy(p.x + row * p.stride, p.d);
  if (lane() == 0) store(p.out + i, entropy);
}

}  // namespace

int64_t halting_scratch_bytes(const HaltingUpdate&) { return sizeof(int32_t); }

void halting_update(const HaltingUpdate& params, const int32_t* count, int32_t* next_count, void* scratch,
                    Stream stream) {
  const Dim grid =
      blocks_in_x(params.count > 0 ? params.count : 1, kRowsPerBlock);  // no rows at all still make a count of 0
  launch("halting_update", halting_update_kernel, grid, kThreads, (kHaltShared + 1) * sizeof(int32_t), stream,
         Halting{params, count, next_count, static_cast<int32_t*>(scratch)});
}

void softmax_entropy(const float* x, int64_t stride, const int32_t* index, int64_t rows, int64_t d, float* out,
                     const int32_t* count, Stream stream) {
  launch("softmax_entropy", softmax_entropy_kernel, blocks_in_x(rows, kRowsPerBlock), kThreads, 0, stream,
         Entropy{x, stride, index, rows, d, out, count});
}

}  // namespace quicksilver::QS_CUDA
