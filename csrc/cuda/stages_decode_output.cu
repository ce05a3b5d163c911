// Stages 3 and 5: a product that is added to the rows. After stage 5 the rows' depth goes up, and rows that hardly
// moved are halted.
#include "halting.cuh"
#include "stages_decode.cuh"

namespace quicksilver::QS_CUDA {
namespace decode {
namespace {

struct Output : Gemm {
  static constexpr bool kPaired = false;
  static constexpr bool kPerforms = true;
  Linear linear;
  const float* input = nullptr;  // [count, k], compact
  float* hidden = nullptr;
  const int32_t* active = nullptr;
  int32_t* depth = nullptr;  // or null
  bool judges = false;       // then also:
  DeviceHalting halting;
  const int32_t* positions = nullptr;
  const float* previous = nullptr;
  float2* parts = nullptr;
  float* drift = nullptr;

  QS_DEVICE int32_t row_of(int32_t i) const { return active ? load(active + i) : i; }
  QS_DEVICE int64_t parts_of_row() const { return (linear.weight.n + kPartColumns - 1) / kPartColumns; }

  QS_DEVICE int32_t tasks(int32_t count) const { return count * parts_of(x); }
  QS_DEVICE void perform(int32_t task, int32_t, void*) const {
    const int32_t row = task / parts_of(x), part = task % parts_of(x);
    quantize_part<1>(PlainRow{input + row * x.k, x.k}, x, row, part * kPartValues);
  }
  QS_DEVICE Panel panel(int p) const { return panel_of(linear.weight, x, 2 * blockIdx.x + p); }

  QS_DEVICE void write(int32_t i, int64_t column, float sum, bool valid) const {
    const int64_t d = linear.weight.n;
    float now = 0, before = 0;
    if (valid) {
      float* const at = hidden + row_of(i) * d + column;
      now = add_rn(load(at), linear.bias ? add_rn(sum, load(linear.bias + column)) : sum);
      store(at, now);
      if (judges) before = load(previous + i * d + column);
    }
    if (!judges) return;
    const Squares part = part_of_lanes(squares_of(now, before));
    if (valid && column % kPartColumns == 0) {
      store(parts + i * parts_of_row() + column / kPartColumns, make_float2(part.step, part.before));
    }
  }
  QS_DEVICE void finish(int64_t, int64_t, int32_t, void*) const {}

  QS_DEVICE void conclude(int32_t count, void* scratch) const {
    static_assert(kPanelRows == kPartColumns && kScratchBytes >= 4 * (2 * kDecodeRows + kHaltShared));
    if (depth) {
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
        int32_t* const at = depth + row_of(i);
        store(at, load(at) + 1);
      }
    }
    if (!judges) return;
    float* const drifts = static_cast<float*>(scratch);
    float* const entropies = drifts + kDecodeRows;
    for (int32_t i = warp(); i < count; i += kWarps) {
      const float of_row = drift_from(sum_parts(parts + i * parts_of_row(), parts_of_row()), halting.relative);
      float entropy = 0;
      if (halting.tests_entropy) entropy = row_entropy(hidden + row_of(i) * linear.weight.n, linear.weight.n);
      if (lane() == 0) {
        store(drift + i, of_row);
        store_shared(drifts + i, of_row);
        store_shared(entropies + i, entropy);
      }
    }
    sync_block();
    const HaltDecision decision{halting.drift_threshold,
                                halting.tests_entropy,
                                halting.entropy_threshold,
                                halting.sink_tokens,
                                positions,
                                halting.overrides,
                                halting.halted,
                                active,
                                halting.active,
                                halting.count};
    halt_and_compact(
        decision, count, [&](int32_t i) { return load_shared(drifts + i); },
        [&](int32_t i) { return load_shared(entropies + i); }, reinterpret_cast<int32_t*>(entropies + kDecodeRows));
  }
};

Output output(const Linear& linear, const Rows& rows, const int32_t* count, const float* input,
              const DeviceWorkspace& work) {
  Output stage;
  fill(stage, rows, count, linear.weight, work);
  stage.linear = linear;
  stage.input = input;
  stage.hidden = rows.hidden;
  stage.active = rows.active;
  return stage;
}

}  // namespace
}  // namespace decode

void decode_attention_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                             Stream stream) {
  const decode::Output stage = decode::output(layer.o, rows, count, work.attention, work);
  decode::launch_stage("decode_attention_output", stage, decode::tiles_of(layer.o.weight), stream);
}

void decode_mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                       int32_t* depth, const DeviceHalting* halting, Stream stream) {
  decode::Output stage = decode::output(layer.down, rows, count, work.inner, work);
  stage.depth = depth;
  if (halting) {
    stage.judges = true;
    stage.halting = *halting;
    stage.positions = rows.positions;
    stage.previous = work.previous;
    stage.parts = reinterpret_cast<float2*>(work.drift_parts);
    stage.drift = work.drift;
  }
  decode::launch_stage("decode_mlp_output", stage, decode::tiles_of(layer.down.weight), stream);
}

}  // namespace quicksilver::QS_CUDA
