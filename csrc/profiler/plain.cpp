#include "plain.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace profiler {

double half_to_double(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double x = exponent == 0    ? std::ldexp(mantissa, -24)
                   : exponent == 31 ? (mantissa != 0 ? std::nan("") : INFINITY)
                                    : std::ldexp(mantissa + 1024, exponent - 25);
  return (h & 0x8000) != 0 ? -x : x;
}

double bfloat_to_double(uint16_t b) {
  const uint32_t wide = static_cast<uint32_t>(b) << 16;
  float x = 0;
  std::memcpy(&x, &wide, 4);
  return double{x};
}

Row normed(const Norm& norm, const std::vector<float>& weight, const std::vector<float>& bias, Row x) {
  double mean = 0, squares = 0;
  if (norm.kind == NormKind::layer) {
    for (const double v : x) mean += v / double(x.size());
  }
  for (const double v : x) squares += (v - mean) * (v - mean) / double(x.size());
  const double scale = 1 / std::sqrt(squares + double{norm.eps});
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = (x[i] - mean) * scale * double{weight[i]} + (bias.empty() ? 0 : double{bias[i]});
  }
  return x;
}

Row quantized_row(const Row& x, int64_t group) {
  const float most = 127.0f;
  Row out(x.size());
  for (size_t start = 0; start < x.size(); start += static_cast<size_t>(group)) {
    const size_t end = std::min(x.size(), start + static_cast<size_t>(group));
    float largest = 0;
    for (size_t i = start; i < end; ++i) largest = std::max(largest, std::fabs(static_cast<float>(x[i])));
    if (largest == 0) continue;
    largest = std::bit_cast<float>((std::bit_cast<int32_t>(largest) + 0xffff) & ~0xffff);  // up, to bfloat16
    for (size_t i = start; i < end; ++i) {
      const float code = std::nearbyint(static_cast<float>(x[i]) * (most / largest));
      out[i] = double{std::clamp(code, -most, most)} * double{largest / most};
    }
  }
  return out;
}

double activated(Activation activation, double gate, double up) {
  switch (activation) {
    case Activation::silu_gated:
      return up * gate / (1 + std::exp(-gate));
    case Activation::gelu_tanh:
      return up / 2 * (1 + std::tanh(0.7978845608028654 * (up + 0.044715 * up * up * up)));
    case Activation::gelu:
      return up / 2 * std::erfc(-up / std::sqrt(2.0));
    case Activation::relu:
      break;
  }
  return up < 0 ? 0 : up;
}

PlainWeight::PlainWeight(Memory& memory, const Linear& linear) : view_(linear.weight) {
  const int64_t plane = view_.n * ((view_.k + 7) / 8) * 4;
  hi_ = memory.download(view_.hi, plane);
  if (view_.lo != nullptr) lo_ = memory.download(view_.lo, plane);
  const int64_t groups = (view_.k + view_.group - 1) / view_.group;
  scale_ = memory.download(view_.scale, view_.n * groups);
  offset_ = memory.download(view_.offset, view_.n * groups);
  if (linear.bias != nullptr) bias_ = memory.download(linear.bias, view_.n);
}

double PlainWeight::dot(int64_t n, const Row& x, bool eight_bits) const {
  const int64_t lines = (view_.k + 7) / 8, groups = (view_.k + view_.group - 1) / view_.group;
  const int64_t panel = n / 16, row = n % 16, in_panel = std::min<int64_t>(16, view_.n - panel * 16);
  double sum = 0;
  for (int64_t k = 0; k < view_.k; ++k) {
    const auto at = static_cast<size_t>(panel * 16 * lines * 4 + k / 8 * in_panel * 4 + row * 4 + k % 4);
    const int shift = k % 8 < 4 ? 0 : 4;
    double steps = hi_[at] >> shift & 15;
    if (eight_bits && !lo_.empty()) steps += ((lo_[at] >> shift & 15) - 8) / 8.0;
    const auto group = static_cast<size_t>(panel * 16 * groups + k / view_.group * in_panel + row);
    sum += x[static_cast<size_t>(k)] * (steps * half_to_double(scale_[group]) + half_to_double(offset_[group]));
  }
  return sum + (bias_.empty() ? 0 : double{bias_[static_cast<size_t>(n)]});
}

PlainCache::PlainCache(Memory& memory, const KvCache& cache) : memory_(memory), cache_(cache) {
  table_ = memory.download(cache.block_table, cache.sequences * cache.max_blocks);
  lengths_ = memory.download(cache.lengths, cache.sequences);
  positions_ = memory.download(cache.positions, cache.blocks * cache.block_size);
}

int64_t PlainCache::slot(int64_t sequence, int64_t entry) const {
  const int64_t block = table_[static_cast<size_t>(sequence * cache_.max_blocks + entry / cache_.block_size)];
  return block * cache_.block_size + entry % cache_.block_size;
}

Row PlainCache::vector(bool value, int64_t slot, int64_t head) {
  const int64_t number = slot / cache_.block_size, vectors = cache_.kv_heads * cache_.block_size;
  const int64_t element = cache_.type == KvType::f32 ? 4 : cache_.type == KvType::i8 ? 1 : 2;
  if (block_.number != number) {
    block_.number = number;
    const int64_t bytes = vectors * cache_.head_size * element;
    for (const bool values : {false, true}) {
      const char* from = static_cast<const char*>(values ? cache_.value : cache_.key);
      block_.elements[values] = memory_.download(from + number * bytes, bytes);
      if (cache_.type != KvType::i8) continue;
      block_.scale[values] =
          memory_.download((values ? cache_.value_scale : cache_.key_scale) + number * vectors, vectors);
    }
  }
  const int64_t at = head * cache_.block_size + slot % cache_.block_size;
  const char* from = block_.elements[value].data() + at * cache_.head_size * element;
  Row row(static_cast<size_t>(cache_.head_size));
  for (size_t i = 0; i < row.size(); ++i) {
    if (cache_.type == KvType::f32) {
      float x = 0;
      std::memcpy(&x, from + i * 4, 4);
      row[i] = double{x};
    } else if (cache_.type == KvType::i8) {
      row[i] = double(static_cast<signed char>(from[i])) * double{block_.scale[value][static_cast<size_t>(at)]};
    } else {
      uint16_t x = 0;
      std::memcpy(&x, from + i * 2, 2);
      row[i] = cache_.type == KvType::f16 ? half_to_double(x) : bfloat_to_double(x);
    }
  }
  return row;
}

void Error::add(double got, double want) {
  difference_ += (got - want) * (got - want);
  base_ += want * want;
  ++values_;
}

double Error::value() const { return base_ == 0 ? std::sqrt(difference_) : std::sqrt(difference_ / base_); }

}  // namespace profiler
