// torch.ops.quicksilver.*: schemas and CPU kernels, through LibTorch's stable ABI.
//
// quicksilver_ext.ops explains bad input in the proper exception; the checks here are for those who call
// torch.ops.quicksilver directly, and make sure that no call reads or writes outside its tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "quicksilver/attention.h"
#include "quicksilver/fusion.h"
#include "quicksilver/gguf.h"
#include "quicksilver/halting.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/matryoshka.h"
#include "schemas.h"
#include "tensors.h"

namespace quicksilver {
namespace {

template <typename T>
void check_range(const T* values, int64_t count, const char* name, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= low && values[i] < high, name, "[", i, "] = ", values[i], " is out of range, wanted ",
                    low, " to ", high - 1);
  }
}

// Every entry that a length says is there must lie in a block that exists.
void check_table(const KvCache& cache) {
  check_range(cache.lengths, cache.sequences, "kv_lengths", 0, cache.max_blocks * cache.block_size + 1);
  for (int64_t s = 0; s < cache.sequences; ++s) {
    const int64_t used = (cache.lengths[s] + cache.block_size - 1) / cache.block_size;
    check_range(cache.block_table + s * cache.max_blocks, used, "block_table", 0, cache.blocks);
  }
}

// --- halting ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> op_halting_update(Tensor hidden, Tensor previous,
                                                             std::optional<Tensor> entropy, Tensor halted,
                                                             Tensor positions, double drift_threshold, bool relative,
                                                             std::optional<double> entropy_threshold,
                                                             int64_t sink_tokens, std::optional<Tensor> overrides) {
  HaltingUpdate p = halting_of(hidden, previous, entropy, positions, drift_threshold, relative, entropy_threshold,
                               sink_tokens, overrides);
  const int64_t rows = p.count;
  const float* entropy_of = p.entropy;
  const bool* halted_before = in<bool>(halted, "halted", {rows});

  std::vector<int32_t> active;
  std::vector<float> entropy_of_active;
  for (int64_t row = 0; row < rows; ++row) {
    if (halted_before[row]) continue;
    active.push_back(static_cast<int32_t>(row));
    if (entropy_of != nullptr) entropy_of_active.push_back(entropy_of[row]);
  }
  std::vector<float> drift_of_active(active.size());
  p.active = active.data();
  p.count = static_cast<int64_t>(active.size());
  if (entropy_of != nullptr) p.entropy = entropy_of_active.data();
  p.drift = drift_of_active.data();

  auto [drift_out, drift] = make<float>(hidden, {rows});
  auto [halted_out, halted_now] = make<bool>(hidden, {rows});
  auto [index_out, index] = make<int32_t>(hidden, {rows});
  auto [count_out, count] = make<int32_t>(hidden, {1});
  std::memcpy(halted_now, halted_before, static_cast<size_t>(rows));
  static_assert(sizeof(bool) == 1);
  p.halted = reinterpret_cast<uint8_t*>(halted_now);
  p.next_active = index;
  *count = p.count > 0 ? static_cast<int32_t>(halting_update(p)) : 0;
  std::fill(index + *count, index + rows, -1);
  std::fill(drift, drift + rows, 0.0f);
  for (size_t i = 0; i < active.size(); ++i) drift[active[i]] = drift_of_active[i];
  return {drift_out, halted_out, index_out, count_out};
}

Tensor op_softmax_entropy(Tensor hidden) {
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  auto [out, entropy] = make<float>(hidden, {hidden.size(0)});
  softmax_entropy(x, hidden.size(1), nullptr, hidden.size(0), hidden.size(1), entropy);
  return out;
}

// --- KV cache --------------------------------------------------------------------------------------------------------

Tensor op_kv_allocate(Tensor sequence, Tensor positions, Tensor kv_lengths, Tensor block_table, Tensor kv_positions,
                      std::optional<Tensor> kv_until, Tensor blocks_used, std::optional<Tensor> free_blocks,
                      int64_t window) {
  const int32_t* sequences = in<int32_t>(sequence, "sequence", {kAny});
  const int64_t rows = sequence.size(0);
  const int32_t* position = in<int32_t>(positions, "positions", {rows});
  KvCache cache = kv_tables(kv_lengths, block_table, kv_positions, kv_until, blocks_used, free_blocks, window);
  check_range(sequences, rows, "sequence", 0, cache.sequences);
  check_range(cache.blocks_used, 1, "blocks_used", 0, cache.blocks + 1);
  check_table(cache);
  // A new entry goes where the table says, and takes a block only where it says -1.
  check_range(cache.block_table, cache.sequences * cache.max_blocks, "block_table", -1, cache.blocks);
  if (cache.free_blocks) {
    check_range(cache.free_blocks + *cache.blocks_used, cache.blocks - *cache.blocks_used, "free_blocks", 0,
                cache.blocks);
  }
  auto [out, slots] = make<int64_t>(sequence, {rows});
  STD_TORCH_CHECK(kv_allocate(cache, nullptr, rows, sequences, position, slots),
                  "the KV cache is full: no block left, or a sequence outgrew its row of block_table");
  return out;
}

void op_kv_scatter(Tensor key, Tensor value, Tensor slot_mapping, Tensor key_cache, Tensor value_cache,
                   std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const KvScatter p = scatter_of(key, value, slot_mapping, key_cache, value_cache, key_scale, value_scale);
  check_range(p.slots, p.count, "slot_mapping", -1, p.cache.blocks * p.cache.block_size);
  kv_scatter(p);
}

void op_kv_merge(Tensor key_cache, Tensor value_cache, Tensor destination, Tensor first, Tensor second,
                 Tensor weight_first, Tensor weight_second, Tensor distance, std::optional<Tensor> cosine,
                 std::optional<Tensor> sine, std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  const KvMerge p = merge_of(key_cache, value_cache, destination, first, second, weight_first, weight_second, distance,
                             cosine, sine, key_scale, value_scale);
  const int64_t slots = p.cache.blocks * p.cache.block_size;
  check_range(p.destination, p.count, "destination", 0, slots);
  check_range(p.first, p.count, "first", 0, slots);
  check_range(p.second, p.count, "second", 0, slots);
  if (cosine) check_range(p.distance, p.count, "distance", 0, cosine->size(0));
  kv_merge(p);
}

// --- attention -------------------------------------------------------------------------------------------------------

Tensor run_attention(const std::pair<Attention, Tensor>& attention) {
  const auto& [p, out] = attention;
  check_range(p.query_sequence, p.count, "query_sequence", 0, p.cache.sequences);
  check_table(p.cache);
  compacted_attention(p);
  return out;
}

Tensor op_compacted_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                              Tensor kv_positions, Tensor kv_lengths, Tensor query_positions, Tensor query_sequence,
                              double scale, std::optional<Tensor> kv_until, std::optional<Tensor> key_scale,
                              std::optional<Tensor> value_scale) {
  return run_attention(attention_of(query, key_cache, value_cache, block_table, kv_positions, kv_lengths,
                                    query_positions, query_sequence, scale, kv_until, key_scale, value_scale, nullptr));
}

std::tuple<Tensor, Tensor> op_attention_lse(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table,
                                            Tensor kv_positions, Tensor kv_lengths, Tensor query_positions,
                                            Tensor query_sequence, double scale, std::optional<Tensor> kv_until,
                                            std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  std::optional<Tensor> log_sum_exp;
  Tensor out =
      run_attention(attention_of(query, key_cache, value_cache, block_table, kv_positions, kv_lengths, query_positions,
                                 query_sequence, scale, kv_until, key_scale, value_scale, &log_sum_exp));
  return {out, *log_sum_exp};
}

// --- fusion ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> op_fusion_groups(Tensor hidden, Tensor positions, Tensor sequence, Tensor fusible,
                                            double tau, bool relative, int64_t max_group) {
  auto [p, group_out] = groups_of(hidden, positions, sequence, fusible, tau, relative, max_group);
  auto [count_out, count] = make<int32_t>(hidden, {1});
  *count = static_cast<int32_t>(fusion_groups(p));
  return {group_out, count_out};
}

Tensor op_fusion_reduce(Tensor hidden, Tensor weight, Tensor group, std::optional<int64_t> groups) {
  const float* x = in<float>(hidden, "hidden", {kAny, kAny});
  const int64_t rows = hidden.size(0), d = hidden.size(1);
  const float* weights = in<float>(weight, "weight", {rows});
  const int32_t* group_of = in<int32_t>(group, "group", {rows});
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t step = t == 0 ? group_of[0] : int64_t{group_of[t]} - group_of[t - 1];
    STD_TORCH_CHECK(t == 0 ? step == 0 : (step == 0 || step == 1),
                    "group must rise from 0 by steps of 0 or 1, but group[", t, "] = ", group_of[t]);
  }
  const int64_t count = int64_t{group_of[rows - 1]} + 1;
  const int64_t out_rows = groups.value_or(count);
  check_groups(out_rows, rows);
  STD_TORCH_CHECK(out_rows >= count, "groups must be at least ", count, ", as many as group numbers, not ", out_rows);
  auto [out, fused] = make<float>(hidden, {out_rows, d});
  fusion_reduce(x, d, weights, group_of, rows, d, fused, count);
  std::fill(fused + count * d, fused + out_rows * d, 0.0f);
  return out;
}

Tensor op_fusion_expand(Tensor fused, Tensor group) {
  const float* rows = in<float>(fused, "fused", {kAny, kAny});
  const int32_t* groups = in<int32_t>(group, "group", {kAny});
  const int64_t count = group.size(0), d = fused.size(1);
  check_range(groups, count, "group", 0, fused.size(0));
  auto [out, hidden] = make<float>(fused, {count, d});
  fusion_expand(rows, groups, count, d, hidden, d);
  return out;
}

// --- matryoshka ------------------------------------------------------------------------------------------------------

Tensor op_matryoshka_gemm(Tensor x, Tensor hi, std::optional<Tensor> lo, Tensor scale, std::optional<Tensor> bits,
                          std::optional<Tensor> bias, Tensor offset) {
  const Product product = product_of(x, hi, lo, scale, bits, bias, offset);
  const MatryoshkaGemm& p = product.gemm;
  for (int64_t i = 0; p.bits != nullptr && i < p.x.rows; ++i) {
    STD_TORCH_CHECK(p.bits[i] == 4 || p.bits[i] == 8, "bits[", i, "] = ", p.bits[i], ", wanted 8 or 4");
  }
  quantize_rows(product.x, p.w.k, nullptr, p.x);
  matryoshka_gemm(p);
  return product.y;
}

FloatType float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::f32;
    case ScalarType::Half:
      return FloatType::f16;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      STD_TORCH_CHECK(false, name, " must be Float, Half or BFloat16");
      return FloatType::f32;
  }
}

void op_matryoshka_pack(Tensor weight, Tensor hi, std::optional<Tensor> lo, Tensor scale, Tensor offset,
                        std::optional<Tensor> importance) {
  MatryoshkaPack p;
  p.type = float_type(weight, "weight");
  check(weight, "weight", weight.scalar_type(), {kAny, kAny});
  p.weight = weight.const_data_ptr();
  p.n = weight.size(0);
  p.k = weight.size(1);
  p.hi = inout<uint8_t>(hi, "hi", {p.n, ceil_div(p.k, 8) * 4});
  if (lo) p.lo = inout<uint8_t>(*lo, "lo", {p.n, hi.size(1)});
  check(scale, "scale", ScalarType::Half, {p.n, kAny});
  p.scale = static_cast<uint16_t*>(scale.mutable_data_ptr());
  p.group = group_size_of(p.k, scale.size(1));
  check(offset, "offset", ScalarType::Half, {p.n, scale.size(1)});
  p.offset = static_cast<uint16_t*>(offset.mutable_data_ptr());
  p.importance = in<float>(importance, "importance", {p.k});
  matryoshka_pack(p);
}

void op_gguf_dequantize(Tensor blocks, int64_t type, Tensor values) {
  const GgufBlock block = gguf_block(static_cast<GgufType>(type));
  STD_TORCH_CHECK(block.values != 0, "type must be 2, 3, 8, 12 or 14, not ", type);
  const uint8_t* in_blocks = in<uint8_t>(blocks, "blocks", {kAny, block.bytes});
  float* out = inout<float>(values, "values", {blocks.size(0), block.values});
  gguf_dequantize(in_blocks, blocks.size(0), static_cast<GgufType>(type), out);
}

std::tuple<Tensor, Tensor, Tensor> op_quantize_rows(Tensor x, int64_t group_size) {
  const Quantized quantized = quantized_of(x, group_size);
  quantize_rows(quantized.x, quantized.rows.k, nullptr, quantized.rows);
  return quantized.out;
}

}  // namespace
}  // namespace quicksilver

STABLE_TORCH_LIBRARY(quicksilver, m) {
  quicksilver::define_schemas(m);
  // Weights are read and packed on the CPU, wherever they go from there.
  m.def("gguf_dequantize(Tensor blocks, int type, Tensor(a!) values) -> ()");
  m.def(
      "matryoshka_pack(Tensor weight, Tensor(a!) hi, Tensor(b!)? lo, Tensor(c!) scale, Tensor(d!) offset, "
      "Tensor? importance=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(quicksilver, CPU, m) {
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
  m.impl("matryoshka_pack", TORCH_BOX(&quicksilver::op_matryoshka_pack));
  m.impl("gguf_dequantize", TORCH_BOX(&quicksilver::op_gguf_dequantize));
  m.impl("quantize_rows", TORCH_BOX(&quicksilver::op_quantize_rows));
}
