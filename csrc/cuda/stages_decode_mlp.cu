// Stage 4 and the head: norm, product, and for stage 4 the activation.
#include "stages_decode.cuh"

namespace quicksilver::QS_CUDA {
namespace decode {
namespace {

// A block makes the same columns of gate and up, and so of the activation.
struct Gated : NormedGemm {
  static constexpr bool kPaired = true;
  Linear gate, up;
  float* inner = nullptr;

  QS_DEVICE Panel panel(int p) const { return panel_of(p == 0 ? gate.weight : up.weight, x, blockIdx.x); }
  QS_DEVICE void write(int32_t i, int64_t column, const float (&sum)[2], bool valid) const {
    if (!valid) return;
    const float of_gate = gate.bias ? add_rn(sum[0], load(gate.bias + column)) : sum[0];
    const float of_up = up.bias ? add_rn(sum[1], load(up.bias + column)) : sum[1];
    store(inner + i * up.weight.n + column, silu_gated(of_gate, of_up));
  }
};

// One product, with or without an activation.
template <bool kActivates>
struct Single : NormedGemm {
  static constexpr bool kPaired = false;
  Linear linear;
  float* y = nullptr;
  int64_t y_stride = 0;
  Activation activation = Activation::gelu_tanh;

  QS_DEVICE Panel panel(int p) const { return panel_of(linear.weight, x, 2 * blockIdx.x + p); }
  QS_DEVICE void write(int32_t i, int64_t column, float sum, bool valid) const {
    if (!valid) return;
    const float value = linear.bias ? add_rn(sum, load(linear.bias + column)) : sum;
    store(y + i * y_stride + column, kActivates ? activate(activation, value) : value);
  }
};

}  // namespace
}  // namespace decode

void decode_mlp_input(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                      Stream stream) {
  const MatryoshkaWeight& weight = layer.up.weight;
  if (layer.activation == Activation::silu_gated) {
    decode::Gated stage;
    decode::fill(stage, rows, count, weight, layer.mlp_norm, work);
    stage.gate = layer.gate;
    stage.up = layer.up;
    stage.inner = work.inner;
    decode::launch_stage("decode_mlp_input", stage, decode::panels_of(weight), stream);
  } else {
    decode::Single<true> stage;
    decode::fill(stage, rows, count, weight, layer.mlp_norm, work);
    stage.linear = layer.up;
    stage.y = work.inner;
    stage.y_stride = weight.n;
    stage.activation = layer.activation;
    decode::launch_stage("decode_mlp_input", stage, decode::tiles_of(weight), stream);
  }
}

void decode_lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t,
                    float* logits, int64_t logits_stride, const DeviceWorkspace& work, Stream stream) {
  decode::Single<false> stage;
  decode::fill(stage, rows, count, head.weight, norm, work);
  stage.bits = nullptr;  // always all that the head has
  stage.linear = head;
  stage.y = logits;
  stage.y_stride = logits_stride;
  decode::launch_stage("decode_lm_head", stage, decode::tiles_of(head.weight), stream);
}

}  // namespace quicksilver::QS_CUDA
