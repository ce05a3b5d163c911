// torch.ops.quicksilver.* on CUDA; and, compiled a second time for the emulator, torch.ops.quicksilver_emulated.*, the
// same operators on CPU tensors.
//
// Nothing here reads a tensor's values, with one exception: fusion_reduce, whose output's size is one of them. So
// values out of range are for quicksilver_ext.ops to find.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "quicksilver/cuda.h"
#ifndef QS_EMULATED
#define QS_TENSORS_ON_CUDA
#endif
#include "schemas.h"
#include "tensors.h"

namespace quicksilver {
namespace {

namespace kernels = QS_CUDA;

// Makes a tensor's device the current one, and names the stream that PyTorch works on there.
class On {
 public:
#ifdef QS_EMULATED
  explicit On(const Tensor&) {}
  kernels::Stream stream() const { return nullptr; }
#else
  explicit On(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  kernels::Stream stream() const { return torch::stable::accelerator::getCurrentStream(index_).nativeHandle(); }

 private:
  torch::stable::accelerator::DeviceIndex index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

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
  const On on(hidden);
  HaltingUpdate p;
  p.hidden = in<float>(hidden, "hidden", {kAny, kAny});
  p.count = hidden.size(0);
  p.d = hidden.size(1);
  p.stride = p.previous_stride = p.d;
  p.previous = in<float>(previous, "previous", {p.count, p.d});
  p.entropy = in<float>(entropy, "entropy", {p.count});
  in<bool>(halted, "halted", {p.count});
  p.positions = in<int32_t>(positions, "positions", {p.count});
  p.overrides = in<int8_t>(overrides, "overrides", {p.count});
  STD_TORCH_CHECK(!std::isnan(drift_threshold), "drift_threshold must not be NaN");
  STD_TORCH_CHECK(!entropy_threshold || p.entropy != nullptr, "entropy_threshold is set, so entropy must be given");
  if (!entropy_threshold) p.entropy = nullptr;
  p.drift_threshold = static_cast<float>(drift_threshold);
  p.entropy_threshold = static_cast<float>(entropy_threshold.value_or(0));
  p.relative = relative;
  p.sink_tokens = static_cast<int32_t>(sink_tokens);
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
  const On on(hidden);
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  auto [out, entropy] = make<float>(hidden, {hidden.size(0)});
  kernels::softmax_entropy(x, hidden.size(1), nullptr, hidden.size(0), hidden.size(1), entropy, nullptr, on.stream());
  return out;
}

Tensor op_kv_allocate(Tensor sequence, Tensor positions, Tensor kv_lengths, Tensor block_table, Tensor kv_positions,
                      std::optional<Tensor> kv_until, Tensor blocks_used) {
  const On on(sequence);
  const int32_t* sequences = in<int32_t>(sequence, "sequence", {kAny});
  const int64_t rows = sequence.size(0);
  const int32_t* position = in<int32_t>(positions, "positions", {rows});
  KvCache cache;
  cache.lengths = inout<int32_t>(kv_lengths, "kv_lengths", {kAny});
  cache.sequences = kv_lengths.size(0);
  cache.block_table = inout<int32_t>(block_table, "block_table", {cache.sequences, kAny});
  cache.max_blocks = block_table.size(1);
  cache.positions = inout<int32_t>(kv_positions, "kv_positions", {kAny, kAny});
  cache.blocks = kv_positions.size(0);
  cache.block_size = kv_positions.size(1);
  if (kv_until) cache.until = inout<int32_t>(*kv_until, "kv_until", {cache.blocks, cache.block_size});
  cache.blocks_used = inout<int32_t>(blocks_used, "blocks_used", {1});
  auto [out, slots] = make<int64_t>(sequence, {rows});
  kernels::kv_allocate(cache, nullptr, rows, sequences, position, slots, nullptr, nullptr, on.stream());
  return out;
}

void op_kv_scatter(Tensor key, Tensor value, Tensor slot_mapping, Tensor key_cache, Tensor value_cache,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const On on(key);
  KvScatter p;
  p.key = in<float>(key, "key", {kAny, kAny, kAny});
  p.count = key.size(0);
  p.cache = kv_arrays(key_cache, value_cache, key_scale, value_scale, key.size(1), key.size(2));
  p.value = in<float>(value, "value", {p.count, key.size(1), key.size(2)});
  p.key_stride = p.value_stride = key.size(1) * key.size(2);
  p.slots = in<int64_t>(slot_mapping, "slot_mapping", {p.count});
  kernels::kv_scatter(p, nullptr, on.stream());
}

void op_kv_merge(Tensor key_cache, Tensor value_cache, Tensor destination, Tensor first, Tensor second,
                 Tensor weight_first, Tensor weight_second, Tensor distance, std::optional<Tensor> cosine,
                 std::optional<Tensor> sine, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const On on(key_cache);
  KvMerge p;
  p.cache = kv_arrays(key_cache, value_cache, key_scale, value_scale, kAny, kAny);
  p.destination = in<int64_t>(destination, "destination", {kAny});
  p.count = destination.size(0);
  p.first = in<int64_t>(first, "first", {p.count});
  p.second = in<int64_t>(second, "second", {p.count});
  p.weight_first = in<float>(weight_first, "weight_first", {p.count});
  p.weight_second = in<float>(weight_second, "weight_second", {p.count});
  p.distance = in<int32_t>(distance, "distance", {p.count});
  STD_TORCH_CHECK(cosine.has_value() == sine.has_value(), "cosine and sine must be given together");
  p.cosine = in<float>(cosine, "cosine", {kAny, p.cache.head_size / 2});
  p.sine = in<float>(sine, "sine", {cosine ? cosine->size(0) : kAny, p.cache.head_size / 2});
  STD_TORCH_CHECK(!cosine || p.cache.head_size % 2 == 0,
                  "key_cache must have an even head size for a rotary embedding");
  kernels::kv_merge(p, on.stream());
}

std::pair<Tensor, std::optional<Tensor>> run_attention(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
    const Tensor& kv_positions, const Tensor& kv_lengths, const Tensor& query_positions, const Tensor& query_sequence,
    double scale, const std::optional<Tensor>& kv_until, const std::optional<Tensor>& key_scale,
    const std::optional<Tensor>& value_scale, bool want_log_sum_exp) {
  const On on(query);
  Attention p;
  p.query = in<float>(query, "query", {kAny, kAny, kAny});
  p.count = query.size(0);
  p.heads = query.size(1);
  p.query_stride = p.out_stride = p.heads * query.size(2);
  p.cache = kv_arrays(key_cache, value_cache, key_scale, value_scale, kAny, query.size(2));
  STD_TORCH_CHECK(p.heads % p.cache.kv_heads == 0, "query must have a multiple of ", p.cache.kv_heads, " heads, not ",
                  p.heads);
  // The kernel only reads the cache.
  p.cache.lengths = const_cast<int32_t*>(in<int32_t>(kv_lengths, "kv_lengths", {kAny}));
  p.cache.sequences = kv_lengths.size(0);
  p.cache.block_table = const_cast<int32_t*>(in<int32_t>(block_table, "block_table", {p.cache.sequences, kAny}));
  p.cache.max_blocks = block_table.size(1);
  p.cache.positions =
      const_cast<int32_t*>(in<int32_t>(kv_positions, "kv_positions", {p.cache.blocks, p.cache.block_size}));
  p.cache.until = const_cast<int32_t*>(in<int32_t>(kv_until, "kv_until", {p.cache.blocks, p.cache.block_size}));
  p.query_positions = in<int32_t>(query_positions, "query_positions", {p.count});
  p.query_sequence = in<int32_t>(query_sequence, "query_sequence", {p.count});
  p.scale = static_cast<float>(scale);
  auto [out, data] = make<float>(query, {p.count, p.heads, query.size(2)});
  p.out = data;
  std::optional<Tensor> log_sum_exp;
  if (want_log_sum_exp) {
    auto [tensor, values] = make<float>(query, {p.count, p.heads});
    log_sum_exp = tensor;
    p.log_sum_exp = values;
  }
  auto [owner, memory] = scratch(query, kernels::attention_scratch_bytes(p));
  kernels::compacted_attention(p, nullptr, memory, on.stream());
  return {out, log_sum_exp};
}

Tensor op_compacted_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                              Tensor kv_positions, Tensor kv_lengths, Tensor query_positions, Tensor query_sequence,
                              double scale, std::optional<Tensor> kv_until, std::optional<Tensor> key_scale,
                              std::optional<Tensor> value_scale) {
  return run_attention(query, key_cache, value_cache, block_table, kv_positions, kv_lengths, query_positions,
                       query_sequence, scale, kv_until, key_scale, value_scale, false)
      .first;
}

std::tuple<Tensor, Tensor> op_attention_lse(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                                            Tensor kv_positions, Tensor kv_lengths, Tensor query_positions,
                                            Tensor query_sequence, double scale, std::optional<Tensor> kv_until,
                                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  auto [out, log_sum_exp] =
      run_attention(query, key_cache, value_cache, block_table, kv_positions, kv_lengths, query_positions,
                    query_sequence, scale, kv_until, key_scale, value_scale, true);
  return {out, *log_sum_exp};
}

std::tuple<Tensor, Tensor> op_fusion_groups(Tensor hidden, Tensor positions, Tensor sequence, Tensor fusible,
                                            double tau, bool relative, int64_t max_group) {
  const On on(hidden);
  FusionGroups p;
  p.hidden = in<float>(hidden, "hidden", {kAny, kAny});
  p.count = hidden.size(0);
  p.d = p.stride = hidden.size(1);
  p.positions = in<int32_t>(positions, "positions", {p.count});
  p.sequence = in<int32_t>(sequence, "sequence", {p.count});
  p.fusible = reinterpret_cast<const uint8_t*>(in<bool>(fusible, "fusible", {p.count}));
  STD_TORCH_CHECK(!std::isnan(tau), "tau must not be NaN");
  STD_TORCH_CHECK(max_group >= 1 && max_group <= INT32_MAX, "max_group must be at least 1, not ", max_group);
  p.threshold = static_cast<float>(tau);
  p.relative = relative;
  p.max_group = static_cast<int32_t>(max_group);
  auto [group_out, group] = make<int32_t>(hidden, {p.count});
  auto [count_out, count] = make<int32_t>(hidden, {1});
  p.group = group;
  auto [owner, memory] = scratch(hidden, kernels::fusion_scratch_bytes(p));
  kernels::fusion_groups(p, count, memory, on.stream());
  return {group_out, count_out};
}

Tensor op_fusion_reduce(Tensor hidden, Tensor weight, Tensor group) {
  const On on(hidden);
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  const int64_t rows = hidden.size(0), d = hidden.size(1);
  const float* weights = in<float>(weight, "weight", {rows});
  const int32_t* groups = in<int32_t>(group, "group", {rows});
  int32_t last = 0;
  kernels::copy_out(&last, groups + rows - 1, sizeof last, on.stream());
  kernels::synchronize(on.stream());
  STD_TORCH_CHECK(last >= 0 && last < rows, "group must rise from 0 by steps of 0 or 1, but its last number is ", last);
  auto [out, fused] = make<float>(hidden, {int64_t{last} + 1, d});
  kernels::fusion_reduce(x, d, weights, groups, rows, d, fused, on.stream());
  return out;
}

Tensor op_fusion_expand(Tensor fused, Tensor group) {
  const On on(fused);
  const float* x = in<float>(fused, "fused", {kAny, kAny});
  const int32_t* groups = in<int32_t>(group, "group", {kAny});
  auto [out, hidden] = make<float>(fused, {group.size(0), fused.size(1)});
  kernels::fusion_expand(x, groups, group.size(0), fused.size(1), hidden, fused.size(1), on.stream());
  return out;
}

Tensor op_matryoshka_gemm(Tensor x, Tensor hi, std::optional<Tensor> lo, Tensor scale, std::optional<Tensor> bits,
                          std::optional<Tensor> bias, int64_t planes) {
  const On on(x);
  check_planes(planes);
  const float* rows = in<float>(x, "x", {kAny, kAny});
  const int64_t count = x.size(0), k = x.size(1);
  MatryoshkaGemm p;
  p.w.hi = in<uint8_t>(hi, "hi", {kAny, ceil_div(k, 8) * 4});
  p.w.n = hi.size(0);
  p.w.k = k;
  p.w.lo = in<uint8_t>(lo, "lo", {p.w.n, hi.size(1)});
  check(scale, "scale", ScalarType::Half, {p.w.n, kAny});
  p.w.scale = static_cast<const uint16_t*>(scale.const_data_ptr());
  p.w.group = group_size_of(k, scale.size(1));
  const auto check_aligned = [](const void* data, const char* name) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                    " must be aligned to 16 bytes, which a part of a tensor may not be: clone() it");
  };
  check_aligned(p.w.hi, "hi");
  check_aligned(p.w.lo, "lo");
  check_aligned(p.w.scale, "scale");
  p.bits = in<int32_t>(bits, "bits", {count});
  p.bias = in<float>(bias, "bias", {p.w.n});
  auto [buffer_owner, buffer] =
      make<uint8_t>(x, {quantized_rows_bytes(count, k, p.w.group, static_cast<int>(planes)) + 64});
  void* aligned = buffer + (64 - reinterpret_cast<uintptr_t>(buffer) % 64) % 64;
  p.x = carve_quantized_rows(aligned, count, k, p.w.group, static_cast<int>(planes));
  auto [out, y] = make<float>(x, {count, p.w.n});
  p.y = y;
  p.y_stride = p.w.n;
  kernels::quantize_rows(rows, k, nullptr, p.x, nullptr, on.stream());
  kernels::matryoshka_gemm(p, nullptr, on.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> op_quantize_rows(Tensor x, int64_t group_size, int64_t planes) {
  const On on(x);
  check_planes(planes);
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128, "group_size must be 32, 64 or 128, not ",
                  group_size);
  const float* rows = in<float>(x, "x", {kAny, kAny});
  QuantizedRows q;
  q.rows = x.size(0);
  q.k = x.size(1);
  q.k_padded = ceil_div(q.k, 8) * 8;
  q.group = static_cast<int32_t>(group_size);
  q.groups = ceil_div(q.k, group_size);
  auto [q_out, q_data] = make<int8_t>(x, {q.rows, q.k_padded});
  auto [low_out, low] = make<int8_t>(x, {q.rows, planes == 2 ? q.k_padded : 0});
  auto [scale_out, scale] = make<float>(x, {q.rows, q.groups});
  auto [sum_out, sum] = make<int32_t>(x, {q.rows, q.groups});
  q.q = q_data;
  q.q_low = planes == 2 ? low : nullptr;
  q.scale = scale;
  q.sum = sum;
  kernels::quantize_rows(rows, q.k, nullptr, q, nullptr, on.stream());
  return {q_out, low_out, scale_out, sum_out};
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
