// torch.ops.quicksilver.* on CUDA; and, compiled a second time for the emulator, torch.ops.quicksilver_emulated.*, the
// same operators on CPU tensors.
//
// Nothing here reads a tensor's values, with one exception: fusion_reduce where it isn't told its output's size. So
// values out of range are for quicksilver_ext.ops to find; the kernels only leave out what they'd be an index of.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#ifndef QS_EMULATED
#define QS_TENSORS_ON_CUDA
#endif
#include "cuda_device.h"
#include "schemas.h"
#include "tensors.h"

namespace quicksilver {
namespace {

// A tensor's device. One on the CPU, where the emulator's are, has none.
int32_t device_of(const Tensor& tensor) { return tensor.is_cpu() ? 0 : tensor.get_device_index(); }

// Zeroed bytes beside `like`.
std::pair<Tensor, void*> scratch(const Tensor& like, int64_t bytes) {
  Tensor out = torch::stable::new_zeros(like, {bytes > 0 ? bytes : 1}, ScalarType::Byte);
  return {out, out.mutable_data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> op_halting_update(Tensor hidden, Tensor previous,
                                                             std::optional<Tensor> entropy, Tensor halted,
                                                             Tensor positions, double drift_threshold, bool relative,
                                                             std::optional<double> entropy_threshold,
                                                             int64_t sink_tokens, std::optional<Tensor> overrides) {
  const On on(device_of(hidden));
  HaltingUpdate p = halting_of(hidden, previous, entropy, positions, drift_threshold, relative, entropy_threshold,
                               sink_tokens, overrides);
  check(halted, "halted", ScalarType::Bool, {p.count});
  auto [drift_out, drift] = make<float>(hidden, {p.count});
  auto [index_out, index] = make<int32_t>(hidden, {p.count});
  auto [count_out, count] = make<int32_t>(hidden, {1});
  Tensor halted_out = torch::stable::clone(halted);  // rows halted before are neither judged nor in the list
  torch::stable::fill_(index_out, -1);
  p.drift = drift;
  p.halted = static_cast<uint8_t*>(halted_out.mutable_data_ptr());
  p.next_active = index;
  auto [owner, memory] = scratch(hidden, kernels::halting_scratch_bytes(p));
  kernels::halting_update(p, nullptr, count, memory, on.stream());
  return {drift_out, halted_out, index_out, count_out};
}

Tensor op_softmax_entropy(Tensor hidden) {
  const On on(device_of(hidden));
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  auto [out, entropy] = make<float>(hidden, {hidden.size(0)});
  kernels::softmax_entropy(x, hidden.size(1), nullptr, hidden.size(0), hidden.size(1), entropy, nullptr, on.stream());
  return out;
}

Tensor op_kv_allocate(Tensor sequence, Tensor positions, Tensor kv_lengths, Tensor block_table, Tensor kv_positions,
                      std::optional<Tensor> kv_until, Tensor blocks_used, std::optional<Tensor> free_blocks,
                      int64_t window) {
  const On on(device_of(sequence));
  const int32_t* sequences = in<int32_t>(sequence, "sequence", {kAny});
  const int64_t rows = sequence.size(0);
  const int32_t* position = in<int32_t>(positions, "positions", {rows});
  const KvCache cache = kv_tables(kv_lengths, block_table, kv_positions, kv_until, blocks_used, free_blocks, window);
  auto [out, slots] = make<int64_t>(sequence, {rows});
  kernels::kv_allocate(cache, nullptr, rows, sequences, position, slots, nullptr, nullptr, on.stream());
  return out;
}

void op_kv_scatter(Tensor key, Tensor value, Tensor slot_mapping, Tensor key_cache, Tensor value_cache,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const On on(device_of(key));
  const KvScatter p = scatter_of(key, value, slot_mapping, key_cache, value_cache, key_scale, value_scale);
  kernels::kv_scatter(p, nullptr, on.stream());
}

void op_kv_merge(Tensor key_cache, Tensor value_cache, Tensor destination, Tensor first, Tensor second,
                 Tensor weight_first, Tensor weight_second, Tensor distance, std::optional<Tensor> cosine,
                 std::optional<Tensor> sine, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const On on(device_of(key_cache));
  const KvMerge p = merge_of(key_cache, value_cache, destination, first, second, weight_first, weight_second, distance,
                             cosine, sine, key_scale, value_scale);
  kernels::kv_merge(p, on.stream());
}

Tensor run_attention(const On& on, const std::pair<Attention, Tensor>& attention) {
  const auto& [p, out] = attention;
  auto [owner, memory] = scratch(out, kernels::attention_scratch_bytes(p));
  kernels::compacted_attention(p, nullptr, memory, on.stream());
  return out;
}

Tensor op_compacted_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                              Tensor kv_positions, Tensor kv_lengths, Tensor query_positions, Tensor query_sequence,
                              double scale, std::optional<Tensor> kv_until, std::optional<Tensor> key_scale,
                              std::optional<Tensor> value_scale) {
  const On on(device_of(query));
  return run_attention(
      on, attention_of(query, key_cache, value_cache, block_table, kv_positions, kv_lengths, query_positions,
                       query_sequence, scale, kv_until, key_scale, value_scale, nullptr));
}

std::tuple<Tensor, Tensor> op_attention_lse(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                                            Tensor kv_positions, Tensor kv_lengths, Tensor query_positions,
                                            Tensor query_sequence, double scale, std::optional<Tensor> kv_until,
                                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const On on(device_of(query));
  std::optional<Tensor> log_sum_exp;
  Tensor out = run_attention(
      on, attention_of(query, key_cache, value_cache, block_table, kv_positions, kv_lengths, query_positions,
                       query_sequence, scale, kv_until, key_scale, value_scale, &log_sum_exp));
  return {out, *log_sum_exp};
}

std::tuple<Tensor, Tensor> op_fusion_groups(Tensor hidden, Tensor positions, Tensor sequence, Tensor fusible,
                                            double tau, bool relative, int64_t max_group) {
  const On on(device_of(hidden));
  auto [p, group_out] = groups_of(hidden, positions, sequence, fusible, tau, relative, max_group);
  auto [count_out, count] = make<int32_t>(hidden, {1});
  auto [owner, memory] = scratch(hidden, kernels::fusion_scratch_bytes(p));
  kernels::fusion_groups(p, count, memory, on.stream());
  return {group_out, count_out};
}

Tensor op_fusion_reduce(Tensor hidden, Tensor weight, Tensor group, std::optional<int64_t> groups) {
  const On on(device_of(hidden));
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  const int64_t rows = hidden.size(0), d = hidden.size(1);
  const float* weights = in<float>(weight, "weight", {rows});
  const int32_t* group_of = in<int32_t>(group, "group", {rows});
  if (!groups) {
    int32_t last = 0;
    kernels::copy_out(&last, group_of + rows - 1, sizeof last, on.stream());
    kernels::synchronize(on.stream());
    groups = int64_t{last} + 1;
  }
  check_groups(*groups, rows);
  Tensor out = torch::stable::new_zeros(hidden, {*groups, d}, ScalarType::Float);
  float* fused = static_cast<float*>(out.mutable_data_ptr());
  kernels::fusion_reduce(x, d, weights, group_of, rows, d, fused, *groups, on.stream());
  return out;
}

Tensor op_fusion_expand(Tensor fused, Tensor group) {
  const On on(device_of(fused));
  const float* x = in<float>(fused, "fused", {kAny, kAny});
  const int32_t* groups = in<int32_t>(group, "group", {kAny});
  auto [out, hidden] = make<float>(fused, {group.size(0), fused.size(1)});
  kernels::fusion_expand(x, fused.size(0), groups, group.size(0), fused.size(1), hidden, fused.size(1), on.stream());
  return out;
}

Tensor op_matryoshka_gemm(Tensor x, Tensor hi, std::optional<Tensor> lo, Tensor scale, std::optional<Tensor> bits,
                          std::optional<Tensor> bias, Tensor offset) {
  const On on(device_of(x));
  const Product product = product_of(x, hi, lo, scale, bits, bias, offset);
  const MatryoshkaGemm& p = product.gemm;
  const auto check_aligned = [](const void* data, const char* name) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                    " must be aligned to 16 bytes, which a part of a tensor may not be: clone() it");
  };
  check_aligned(p.w.hi, "hi");
  check_aligned(p.w.lo, "lo");
  check_aligned(p.w.scale, "scale");
  check_aligned(p.w.offset, "offset");
  kernels::quantize_rows(product.x, p.w.k, nullptr, p.x, nullptr, on.stream());
  kernels::matryoshka_gemm(p, nullptr, on.stream());
  return product.y;
}

std::tuple<Tensor, Tensor, Tensor> op_quantize_rows(Tensor x, int64_t group_size) {
  const On on(device_of(x));
  const Quantized quantized = quantized_of(x, group_size);
  kernels::quantize_rows(quantized.x, quantized.rows.k, nullptr, quantized.rows, nullptr, on.stream());
  return quantized.out;
}

}  // namespace
}  // namespace quicksilver

#ifdef QS_EMULATED
STABLE_TORCH_LIBRARY(quicksilver_emulated, m) { quicksilver::define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(quicksilver_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(quicksilver, CUDA, m) {
#endif
  m.impl("halting_update", TORCH_BOX(&quicksilver::op_halting_update));
  m.impl("softmax_entropy", TORCH_BOX(&quicksilver::op_softmax_entropy));
  m.impl("kv_allocate", TORCH_BOX(&quicksilver::op_kv_allocate));
  m.impl("kv_scatter", TORCH_BOX(&quicksilver::op_kv_scatter));
  m.impl("kv_merge", TORCH_BOX(&quicksilver::op_kv_merge));
  m.impl("compacted_attention", TORCH_BOX(&quicksilver::op_compacted_attention));
  m.impl("attention_lse", TORCH_BOX(&quicksilver::op_attention_lse));
  m.impl("fusion_groups", TORCH_BOX(&quicksilver::op_fusion_groups));
  m.impl("fusion_reduce", TORCH_BOX(&quicksilver::op_fusion_reduce));
  m.impl("fusion_expand", TORCH_BOX(&quicksilver::op_fusion_expand));
  m.impl("matryoshka_gemm", TORCH_BOX(&quicksilver::op_matryoshka_gemm));
  m.impl("quantize_rows", TORCH_BOX(&quicksilver::op_quantize_rows));
}
