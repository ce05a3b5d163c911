// Halting, entropy, fusion, merging of entries and argmax.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

using namespace quicksilver;

double distance(const float* x, const float* y, int64_t d, bool relative) {
  double difference = 0, base = 0;
  for (int64_t k = 0; k < d; ++k) {
    difference += (double(x[k]) - y[k]) * (double(x[k]) - y[k]);
    base += double(y[k]) * y[k];
  }
  if (!relative) return std::sqrt(difference);
  return difference == 0 && base == 0 ? 0 : std::sqrt(difference) / std::sqrt(base);
}

void test_halting(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " halting " + std::to_string(seed);
  const int64_t rows = random.integer(1, 60), d = random.integer(1, 700), stride = d + random.integer(0, 9);
  const bool compact = random.integer(0, 1) == 1, relative = random.integer(0, 1) == 1,
             with_entropy = random.integer(0, 1) == 1;
  std::vector<float> hidden = random.normals(rows * stride), previous = random.normals(rows * stride);
  std::vector<int32_t> active, positions(static_cast<size_t>(rows));
  std::vector<int8_t> overrides(static_cast<size_t>(rows));
  for (int32_t i = 0; i < rows; ++i) {
    positions[static_cast<size_t>(i)] = random.integer(0, 9);
    overrides[static_cast<size_t>(i)] = static_cast<int8_t>(random.integer(0, 5) == 0 ? random.integer(-1, 1) : 0);
    if (random.integer(0, 3) != 0) active.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(active.size());
  std::vector<float> entropy = random.normals(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (compact ? i : active[static_cast<size_t>(i)]) * stride;
    const float* h = hidden.data() + active[static_cast<size_t>(i)] * stride;
    const int kind = random.integer(0, 9);
    for (int64_t k = 0; k < d; ++k) previous[static_cast<size_t>(at + k)] = h[k] * (kind < 3 ? 1.01f : 2.0f);
    if (kind == 3) previous[static_cast<size_t>(at)] = std::nanf("");
    if (kind == 4) std::copy(h, h + d, previous.begin() + at);
    if (kind == 5) {
      std::fill(hidden.begin() + active[static_cast<size_t>(i)] * stride,
                hidden.begin() + active[static_cast<size_t>(i)] * stride + d, 0.0f);
      std::fill(previous.begin() + at, previous.begin() + at + d, 0.0f);
    }
    if (random.integer(0, 9) == 0) entropy[static_cast<size_t>(i)] = std::nanf("");
  }
  std::vector<float> drift = poisoned(count);
  std::vector<uint8_t> halted(static_cast<size_t>(rows), 9);
  std::vector<int32_t> next = active;
  HaltingUpdate p;
  p.hidden = hidden.data();
  p.previous = previous.data();
  p.stride = p.previous_stride = stride;
  p.d = d;
  p.active = next.data();
  p.count = count;
  p.previous_compact = compact;
  p.entropy = with_entropy ? entropy.data() : nullptr;
  p.positions = positions.data();
  p.overrides = seed % 3 ? overrides.data() : nullptr;
  p.drift_threshold = 0.1f;
  p.entropy_threshold = 0.5f;
  p.relative = relative;
  p.sink_tokens = random.integer(0, 3);
  p.drift = drift.data();
  p.halted = halted.data();
  p.next_active = next.data();  // in place
  const int64_t kept = variant.kernels->halting_update(p);

  std::vector<int32_t> want;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = active[static_cast<size_t>(i)];
    const double x =
        distance(hidden.data() + row * stride, previous.data() + (compact ? i : row) * stride, d, relative);
    const float got = drift[static_cast<size_t>(i)];
    report(std::isnan(x) ? std::isnan(got) : std::fabs(got - x) <= 1e-5 * x, name + ": drift");
    bool halts = got < p.drift_threshold && (!with_entropy || entropy[static_cast<size_t>(i)] < p.entropy_threshold);
    if (p.overrides && p.overrides[row] != 0) halts = p.overrides[row] == 1;
    if (positions[static_cast<size_t>(row)] < p.sink_tokens) halts = false;
    if (!halts) want.push_back(row);
    report(halted[static_cast<size_t>(row)] == (halts ? 1 : 9), name + ": halted");
  }
  next.resize(static_cast<size_t>(kept));
  report(next == want, name + ": active rows");
  compare_with_others(variant, "drift " + std::to_string(seed), drift, false);
}

void test_entropy(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " entropy " + std::to_string(seed);
  const int64_t d = random.integer(1, 600), count = 7;
  const float scales[] = {0, 0.01f, 1, 10, 1000, 1, 1};
  std::vector<float> x;
  for (float scale : scales) {
    const std::vector<float> row = random.normals(d, scale);
    x.insert(x.end(), row.begin(), row.end());
  }
  x[static_cast<size_t>(5 * d)] = std::nanf("");
  if (d > 1) x[static_cast<size_t>(6 * d)] = -INFINITY;
  const int32_t index[] = {6, 1, 2, 3, 4, 5, 0};
  std::vector<float> out = poisoned(count);
  variant.kernels->softmax_entropy(x.data(), d, index, count, d, out.data());
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x.data() + index[i] * d;
    const double top = *std::max_element(row, row + d);
    double z = 0, weighted = 0;
    for (int64_t k = 0; k < d; ++k) {
      const double e = std::exp(row[k] - top);
      z += e;
      if (e > 0) weighted += (row[k] - top) * e;
    }
    const double want = index[i] == 5 ? NAN : (std::log(z) - weighted / z) / std::log(2.0);
    report(std::isnan(want) ? std::isnan(out[static_cast<size_t>(i)])
                            : std::fabs(out[static_cast<size_t>(i)] - want) < 1e-5 * (1 + std::fabs(want)) &&
                                  out[static_cast<size_t>(i)] >= 0,
           name + " row " + std::to_string(index[i]));
  }
}

void test_fusion(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " fusion " + std::to_string(seed);
  const int64_t count = random.integer(1, 50), d = random.integer(1, 200), stride = d + 1;
  std::vector<float> hidden = random.normals(count * stride);
  std::vector<int32_t> positions, sequence, group(static_cast<size_t>(count), -5);
  std::vector<uint8_t> fusible;
  for (int64_t t = 0; t < count; ++t) {
    const bool breaks = random.integer(0, 9) == 0;
    positions.push_back(t == 0 ? 0 : positions.back() + (breaks ? 2 : 1));
    sequence.push_back(t == 0 ? 0 : sequence.back() + (random.integer(0, 9) == 0));
    fusible.push_back(random.integer(0, 5) != 0);
    if (t > 0 && random.integer(0, 2) != 0) {
      for (int64_t k = 0; k < d; ++k)
        hidden[static_cast<size_t>(t * stride + k)] = hidden[static_cast<size_t>((t - 1) * stride + k)] * 1.001f;
    }
  }
  FusionGroups p{hidden.data(),  stride, count,         d, positions.data(), sequence.data(),
                 fusible.data(), 0.1f,   seed % 2 == 0, 3, group.data()};
  const int64_t groups = variant.kernels->fusion_groups(p);
  int32_t number = -1, members = 0;
  std::vector<int32_t> want;
  for (int64_t t = 0; t < count; ++t) {
    const size_t i = static_cast<size_t>(t);
    const bool joins = t > 0 && members < 3 && fusible[i] && fusible[i - 1] && sequence[i] == sequence[i - 1] &&
                       positions[i] == positions[i - 1] + 1 &&
                       distance(&hidden[i * static_cast<size_t>(stride)],
                                &hidden[(i - 1) * static_cast<size_t>(stride)], d, p.relative) < 0.1;
    members = joins ? members + 1 : 1;
    number += !joins;
    want.push_back(number);
  }
  report(group == want && groups == number + 1, name + ": groups");

  std::vector<float> weight, fused = poisoned(groups * d);
  for (int64_t t = 0; t < count; ++t) weight.push_back(std::fabs(random.normal()) + 0.1f);
  variant.kernels->fusion_reduce(hidden.data(), stride, weight.data(), group.data(), count, d, fused.data(), groups);
  std::vector<double> mean(static_cast<size_t>(groups * d), 0.0), total(static_cast<size_t>(groups), 0.0);
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) total[static_cast<size_t>(group[t])] += weight[t];
  for (size_t t = 0; t < static_cast<size_t>(count); ++t) {
    for (size_t k = 0; k < static_cast<size_t>(d); ++k) {
      const size_t g = static_cast<size_t>(group[t]);
      mean[g * static_cast<size_t>(d) + k] +=
          double(weight[t]) * hidden[t * static_cast<size_t>(stride) + k] / total[g];
    }
  }
  report(error(fused, mean) < 1e-6, name + ": mean");
  compare_with_others(variant, "fusion " + std::to_string(seed), fused, false);

  std::vector<float> expanded = poisoned(count * stride);
  variant.kernels->fusion_expand(fused.data(), group.data(), count, d, expanded.data(), stride);
  bool equal = true;
  for (int64_t t = 0; t < count; ++t) {
    const float* row = expanded.data() + t * stride;
    equal &= same(row, fused.data() + group[static_cast<size_t>(t)] * d, d) && std::isnan(row[d]);
  }
  report(equal, name + ": map back");
}

// Vectors of `size` elements as INT8, each with its own scale.
struct Quantized {
  size_t size;
  std::vector<int8_t> codes;
  std::vector<float> scale;

  Quantized(const std::vector<float>& x, int64_t size_)
      : size(static_cast<size_t>(size_)), codes(x.size()), scale(x.size() / size) {
    for (size_t v = 0; v < scale.size(); ++v) write(v, x);
  }
  void write(size_t v, const std::vector<float>& x) {
    float largest = 0;
    for (size_t j = 0; j < size; ++j) largest = std::max(largest, std::fabs(x[v * size + j]));
    largest = rounded_magnitude(largest);
    scale[v] = largest / 127.0f;
    for (size_t j = v * size; j < (v + 1) * size; ++j) {
      codes[j] = static_cast<int8_t>(std::nearbyint(x[j] * (127.0f / largest)));
    }
  }
  std::vector<float> values() const {
    std::vector<float> x;
    for (size_t j = 0; j < codes.size(); ++j) x.push_back(scale[j / size] * static_cast<float>(codes[j]));
    return x;
  }
};

// An INT8 cache is merged as its values in fp32 are, and quantized anew after every item.
void test_int8_merge(const Variant& variant, KvMerge p, const std::vector<float>& key, const std::vector<float>& value,
                     const std::string& name) {
  Quantized got_key(key, p.cache.head_size), got_value(value, p.cache.head_size);
  Quantized want_key = got_key, want_value = got_value;
  KvMerge one = p;
  one.count = 1;
  for (int64_t item = 0; item < p.count; ++item) {
    std::vector<float> keys = want_key.values(), values = want_value.values();
    one.cache.key = keys.data();
    one.cache.value = values.data();
    variant.kernels->kv_merge(one);
    for (int64_t h = 0; h < p.cache.kv_heads; ++h) {
      const int64_t slot = *one.destination, bs = p.cache.block_size;
      const size_t v = static_cast<size_t>((slot / bs * p.cache.kv_heads + h) * bs + slot % bs);
      want_key.write(v, keys);
      want_value.write(v, values);
    }
    ++one.destination, ++one.first, ++one.second, ++one.weight_first, ++one.weight_second, ++one.distance;
  }
  p.cache.type = KvType::i8;
  p.cache.key = got_key.codes.data();
  p.cache.value = got_value.codes.data();
  p.cache.key_scale = got_key.scale.data();
  p.cache.value_scale = got_value.scale.data();
  variant.kernels->kv_merge(p);
  report(got_key.codes == want_key.codes && got_value.codes == want_value.codes, name + ": int8");
  report(same(got_key.scale, want_key.scale) && same(got_value.scale, want_value.scale), name + ": int8 scales");
}

void test_merge(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " merge " + std::to_string(seed);
  const int64_t heads = random.integer(1, 3), block_size = random.integer(1, 5), blocks = 4;
  const int64_t half = random.integer(1, 40), size = 2 * half, slots = blocks * block_size;
  const bool rotary = random.integer(0, 2) != 0;
  std::vector<float> key = random.normals(slots * heads * size), value = random.normals(slots * heads * size);
  std::vector<double> want_key(key.begin(), key.end()), want_value(value.begin(), value.end());
  std::vector<float> cosine, sine;
  for (int64_t i = 0; i < 4 * half; ++i) {
    const double angle = double(i / half) * std::pow(0.3, double(i % half) / double(half));
    cosine.push_back(static_cast<float>(std::cos(angle)));
    sine.push_back(static_cast<float>(std::sin(angle)));
  }
  const int64_t count = random.integer(1, 6);
  std::vector<int64_t> destination, first, second;
  std::vector<float> a, b;
  std::vector<int32_t> turn;
  const auto vector = [&](int64_t slot, int64_t head) {
    return ((slot / block_size * heads + head) * block_size + slot % block_size) * size;
  };
  for (int64_t i = 0; i < count; ++i) {
    first.push_back(random.integer(0, static_cast<int>(slots) - 1));
    second.push_back(random.integer(0, static_cast<int>(slots) - 1));
    const int kind = random.integer(0, 2);
    destination.push_back(kind == 0   ? first.back()
                          : kind == 1 ? second.back()
                                      : random.integer(0, static_cast<int>(slots) - 1));
    a.push_back(std::fabs(random.normal()) + 0.1f);
    b.push_back(std::fabs(random.normal()) + 0.1f);
    turn.push_back(random.integer(0, 3));
    for (int64_t h = 0; h < heads; ++h) {
      const size_t to = static_cast<size_t>(vector(destination.back(), h)),
                   x = static_cast<size_t>(vector(first.back(), h)), y = static_cast<size_t>(vector(second.back(), h));
      const double u = double(a.back()) / (double(a.back()) + b.back()), w = 1 - u;
      std::vector<double> k(static_cast<size_t>(size)), v(static_cast<size_t>(size));
      for (size_t j = 0; j < static_cast<size_t>(size); ++j) {
        const size_t pair = j % static_cast<size_t>(half), at = static_cast<size_t>(turn.back() * half) + pair;
        const double low = want_key[x + pair], high = want_key[x + pair + static_cast<size_t>(half)];
        double turned = want_key[x + j];
        if (rotary)
          turned =
              j < static_cast<size_t>(half) ? low * cosine[at] - high * sine[at] : high * cosine[at] + low * sine[at];
        k[j] = u * turned + w * want_key[y + j];
        v[j] = u * want_value[x + j] + w * want_value[y + j];
      }
      std::copy(k.begin(), k.end(), want_key.begin() + static_cast<int64_t>(to));
      std::copy(v.begin(), v.end(), want_value.begin() + static_cast<int64_t>(to));
    }
  }
  KvMerge p;
  p.destination = destination.data();
  p.first = first.data();
  p.second = second.data();
  p.weight_first = a.data();
  p.weight_second = b.data();
  p.distance = turn.data();
  p.count = count;
  p.cosine = rotary ? cosine.data() : nullptr;
  p.sine = rotary ? sine.data() : nullptr;
  p.cache.key = key.data();
  p.cache.value = value.data();
  p.cache.blocks = blocks;
  p.cache.block_size = block_size;
  p.cache.kv_heads = heads;
  p.cache.head_size = size;
  variant.kernels->kv_merge(p);
  report(error(key, want_key) < 1e-6 && error(value, want_value) < 1e-6, name);
  compare_with_others(variant, "merge " + std::to_string(seed), key, false);
  test_int8_merge(variant, p, key, value, name);
}

void test_argmax(const Variant& variant) {
  Random random(3);
  for (int n : {1, 2, 15, 16, 17, 40, 500}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> x = random.normals(n);
      for (float& v : x) v = std::round(v);  // equals
      if (round % 5 == 4) x[static_cast<size_t>(random.integer(0, n - 1))] = std::nanf("");
      if (round == 1) std::fill(x.begin(), x.end(), -INFINITY);
      int64_t want = 0;
      for (int64_t i = 1; i < n; ++i) {
        const float a = x[static_cast<size_t>(want)], b = x[static_cast<size_t>(i)];
        if (!std::isnan(a) && (std::isnan(b) || b > a)) want = i;
      }
      report(variant.kernels->argmax(x.data(), n) == want, variant.name + " argmax " + std::to_string(n));
    }
  }
}

}  // namespace

void test_mechanisms(const Variant& variant) {
  for (uint32_t seed = 0; seed < 40; ++seed) {
    test_halting(variant, seed);
    test_entropy(variant, seed);
    test_fusion(variant, seed);
    test_merge(variant, seed);
  }
  test_argmax(variant);
}

}  // namespace check
