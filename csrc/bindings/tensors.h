// Tensors in, pointers out: what the operators check of their arguments, with the same words on every device. Included
// by one source of operators at a time; QS_TENSORS_ON_CUDA says that its tensors live there.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "quicksilver/kv_cache.h"

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

[[maybe_unused]] int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[maybe_unused]] int32_t group_size_of(int64_t k, int64_t groups) {
  for (int32_t group : {128, 64, 32}) {
    if (ceil_div(k, group) == groups) return group;
  }
  STD_TORCH_CHECK(false, "scale has ", groups, " groups, which fits no group size of 32, 64 or 128 for ", k,
                  " columns");
  return 0;
}

[[maybe_unused]] void check_planes(int64_t planes) {
  STD_TORCH_CHECK(planes == 1 || planes == 2, "planes must be 1 or 2, not ", planes);
}

}  // namespace
}  // namespace quicksilver
