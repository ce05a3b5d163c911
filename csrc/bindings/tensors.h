// Tensors in, pointers out: the operators' arguments as the kernels take them, checked with the same words on every
// device but for their values, which only the CPU's operators can look at. Included by one source of operators at a
// time; QS_TENSORS_ON_CUDA says that its tensors live there.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "quicksilver/attention.h"
#include "quicksilver/fusion.h"
#include "quicksilver/halting.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/matryoshka.h"

namespace quicksilver {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;

// Checks dtype and shape (kAny: any size), and that the tensor is contiguous, on the right device and not empty.
void check(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
#ifdef QS_TENSORS_ON_CUDA
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device");
#else
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
#endif
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", not ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(),
                  " dimensions, not ", tensor.dim());
  int64_t dim = 0;
  for (int64_t size : shape) {
    const int64_t have = tensor.size(dim);
    STD_TORCH_CHECK(have > 0, name, " must not be empty");
    STD_TORCH_CHECK(size == kAny || have == size, name, " must have size ", size, " in dimension ", dim, ", not ",
                    have);
    ++dim;
  }
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

template <typename T>
constexpr ScalarType kType = ScalarType::Undefined;
template <>
constexpr ScalarType kType<float> = ScalarType::Float;
template <>
constexpr ScalarType kType<uint8_t> = ScalarType::Byte;
template <>
constexpr ScalarType kType<int8_t> = ScalarType::Char;
template <>
constexpr ScalarType kType<int32_t> = ScalarType::Int;
template <>
constexpr ScalarType kType<int64_t> = ScalarType::Long;
template <>
constexpr ScalarType kType<bool> = ScalarType::Bool;

template <typename T>
const T* in(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, kType<T>, shape);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* in(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  return tensor ? in<T>(*tensor, name, shape) : nullptr;
}

template <typename T>
T* inout(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, kType<T>, shape);
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A new tensor beside `like`, and its data.
template <typename T>
std::pair<Tensor, T*> make(const Tensor& like, std::vector<int64_t> shape) {
  Tensor out = torch::stable::new_empty(like, shape, kType<T>);
  return {out, static_cast<T*>(out.mutable_data_ptr())};
}

KvType kv_type(const Tensor& key_cache) {
  switch (key_cache.scalar_type()) {
    case ScalarType::Float:
      return KvType::f32;
    case ScalarType::Half:
      return KvType::f16;
    case ScalarType::BFloat16:
      return KvType::bf16;
    case ScalarType::Char:
      return KvType::i8;
    default:
      STD_TORCH_CHECK(false, "key_cache must be Float, Half, BFloat16 or Char");
      return KvType::f32;
  }
}

// The key and value arrays of a cache, with the scales that an INT8 one must have and no other may; the rest is null.
KvCache kv_arrays(const Tensor& key_cache, const Tensor& value_cache, const std::optional<Tensor>& key_scale,
                  const std::optional<Tensor>& value_scale, int64_t kv_heads, int64_t head_size) {
  KvCache cache;
  cache.type = kv_type(key_cache);
  check(key_cache, "key_cache", key_cache.scalar_type(), {kAny, kv_heads, kAny, head_size});
  cache.blocks = key_cache.size(0);
  cache.kv_heads = key_cache.size(1);
  cache.block_size = key_cache.size(2);
  cache.head_size = key_cache.size(3);
  check(value_cache, "value_cache", key_cache.scalar_type(),
        {cache.blocks, cache.kv_heads, cache.block_size, cache.head_size});
  cache.key = key_cache.mutable_data_ptr();
  cache.value = value_cache.mutable_data_ptr();
  const bool scaled = cache.type == KvType::i8;
  STD_TORCH_CHECK(key_scale.has_value() == scaled, "key_scale must be given for an INT8 cache, and for no other");
  STD_TORCH_CHECK(value_scale.has_value() == scaled, "value_scale must be given for an INT8 cache, and for no other");
  if (scaled) {
    cache.key_scale = inout<float>(*key_scale, "key_scale", {cache.blocks, cache.kv_heads, cache.block_size});
    cache.value_scale = inout<float>(*value_scale, "value_scale", {cache.blocks, cache.kv_heads, cache.block_size});
  }
  return cache;
}

// What kv_allocate works on: the cache without its keys and values.
KvCache kv_tables(const Tensor& kv_lengths, const Tensor& block_table, const Tensor& kv_positions,
                  const std::optional<Tensor>& kv_until, const Tensor& blocks_used,
                  const std::optional<Tensor>& free_blocks, int64_t window) {
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
  cache.free_blocks = in<int32_t>(free_blocks, "free_blocks", {cache.blocks});
  STD_TORCH_CHECK(window >= 0 && window <= INT32_MAX, "window must be at least 0, not ", window);
  STD_TORCH_CHECK(window == 0 || kv_until, "window is set, so kv_until must be given");
  cache.window = static_cast<int32_t>(window);
  return cache;
}

KvScatter scatter_of(const Tensor& key, const Tensor& value, const Tensor& slot_mapping, const Tensor& key_cache,
                     const Tensor& value_cache, const std::optional<Tensor>& key_scale,
                     const std::optional<Tensor>& value_scale) {
  KvScatter p;
  p.key = in<float>(key, "key", {kAny, kAny, kAny});
  p.count = key.size(0);
  p.cache = kv_arrays(key_cache, value_cache, key_scale, value_scale, key.size(1), key.size(2));
  p.value = in<float>(value, "value", {p.count, key.size(1), key.size(2)});
  p.key_stride = p.value_stride = key.size(1) * key.size(2);
  p.slots = in<int64_t>(slot_mapping, "slot_mapping", {p.count});
  return p;
}

KvMerge merge_of(const Tensor& key_cache, const Tensor& value_cache, const Tensor& destination, const Tensor& first,
                 const Tensor& second, const Tensor& weight_first, const Tensor& weight_second, const Tensor& distance,
                 const std::optional<Tensor>& cosine, const std::optional<Tensor>& sine,
                 const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
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
  return p;
}

// `log_sum_exp`, where it is wanted, gets a tensor.
std::pair<Attention, Tensor> attention_of(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                          const Tensor& block_table, const Tensor& kv_positions,
                                          const Tensor& kv_lengths, const Tensor& query_positions,
                                          const Tensor& query_sequence, double scale,
                                          const std::optional<Tensor>& kv_until, const std::optional<Tensor>& key_scale,
                                          const std::optional<Tensor>& value_scale,
                                          std::optional<Tensor>* log_sum_exp) {
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
  if (log_sum_exp != nullptr) {
    auto [tensor, values] = make<float>(query, {p.count, p.heads});
    *log_sum_exp = tensor;
    p.log_sum_exp = values;
  }
  return {p, out};
}

// But for the rows to judge and what comes out. The entropy is the operator's, one for each row.
HaltingUpdate halting_of(const Tensor& hidden, const Tensor& previous, const std::optional<Tensor>& entropy,
                         const Tensor& positions, double drift_threshold, bool relative,
                         const std::optional<double>& entropy_threshold, int64_t sink_tokens,
                         const std::optional<Tensor>& overrides) {
  HaltingUpdate p;
  p.hidden = in<float>(hidden, "hidden", {kAny, kAny});
  p.count = hidden.size(0);
  p.d = hidden.size(1);
  p.stride = p.previous_stride = p.d;
  p.previous = in<float>(previous, "previous", {p.count, p.d});
  p.entropy = in<float>(entropy, "entropy", {p.count});
  p.positions = in<int32_t>(positions, "positions", {p.count});
  p.overrides = in<int8_t>(overrides, "overrides", {p.count});
  STD_TORCH_CHECK(!std::isnan(drift_threshold), "drift_threshold must not be NaN");
  STD_TORCH_CHECK(!entropy_threshold || p.entropy != nullptr, "entropy_threshold is set, so entropy must be given");
  if (!entropy_threshold) p.entropy = nullptr;
  p.drift_threshold = static_cast<float>(drift_threshold);
  p.entropy_threshold = static_cast<float>(entropy_threshold.value_or(0));
  p.relative = relative;
  p.sink_tokens = static_cast<int32_t>(sink_tokens);
  return p;
}

std::pair<FusionGroups, Tensor> groups_of(const Tensor& hidden, const Tensor& positions, const Tensor& sequence,
                                          const Tensor& fusible, double tau, bool relative, int64_t max_group) {
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
  p.group = group;
  return {p, group_out};
}

// Rows of fusion_reduce's result.
void check_groups(int64_t groups, int64_t rows) {
  STD_TORCH_CHECK(groups >= 1 && groups <= rows, "groups must be 1 to ", rows, ", the number of rows, not ", groups);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t group_size_of(int64_t k, int64_t groups) {
  for (int32_t group : {128, 64, 32}) {
    if (ceil_div(k, group) == groups) return group;
  }
  STD_TORCH_CHECK(false, "scale has ", groups, " groups, which fits no group size of 32, 64 or 128 for ", k,
                  " columns");
  return 0;
}

// A product of rows x, which have yet to be quantized to gemm.x, in memory of their own.
struct Product {
  MatryoshkaGemm gemm;
  const float* x;
  Tensor y;
  Tensor memory;
};
Product product_of(const Tensor& x, const Tensor& hi, const std::optional<Tensor>& lo, const Tensor& scale,
                   const std::optional<Tensor>& bits, const std::optional<Tensor>& bias, const Tensor& offset) {
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
  check(offset, "offset", ScalarType::Half, {p.w.n, scale.size(1)});
  p.w.offset = static_cast<const uint16_t*>(offset.const_data_ptr());
  p.bits = in<int32_t>(bits, "bits", {count});
  p.bias = in<float>(bias, "bias", {p.w.n});
  const int64_t bytes = quantized_rows_bytes(count, k, p.w.group);
  auto [memory, buffer] = make<uint8_t>(x, {bytes + 64});
  void* aligned = buffer + (64 - reinterpret_cast<uintptr_t>(buffer) % 64) % 64;
  p.x = carve_quantized_rows(aligned, count, k, p.w.group);
  auto [out, y] = make<float>(x, {count, p.w.n});
  p.y = y;
  p.y_stride = p.w.n;
  return {p, rows, out, memory};
}

// Where rows are quantized to: q, scale and sum as tensors, and as the kernels take them.
struct Quantized {
  QuantizedRows rows;
  const float* x;
  std::tuple<Tensor, Tensor, Tensor> out;
};
Quantized quantized_of(const Tensor& x, int64_t group_size) {
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
  auto [scale_out, scale] = make<float>(x, {q.rows, q.groups});
  auto [sum_out, sum] = make<int32_t>(x, {q.rows, q.groups});
  q.q = q_data;
  q.scale = scale;
  q.sum = sum;
  return {q, rows, {q_out, scale_out, sum_out}};
}

}  // namespace
}  // namespace quicksilver
