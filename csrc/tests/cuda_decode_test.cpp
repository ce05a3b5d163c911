// The decode kernels against the CPU's. Products are equal to the bit, given the same quantized rows; norms and
// quantization have tests of their own, so a stage that starts with a norm is compared with the CPU's products of the
// rows that it quantized itself.
#include <algorithm>
#include <memory>

#include "cuda_check.h"
#include "cuda_model.h"
#include "launch.cuh"
#include "matryoshka_decode.cuh"
#include "stages_decode.cuh"

namespace check {
namespace {

using namespace quicksilver;
namespace gpu = quicksilver::QS_CUDA;

// Memory for quantized rows, aligned as their layout wants it.
struct QuantizedMemory {
  std::vector<char> memory;
  void* start;
  explicit QuantizedMemory(int64_t bytes) : memory(static_cast<size_t>(bytes + 64), char(0x5a)), start(memory.data()) {
    size_t space = memory.size();
    start = std::align(64, 1, start, space);
  }
};

std::vector<float> floats(const float* x, int64_t n) { return std::vector<float>(x, x + n); }

// --- activations by themselves
// ----------------------------------------------------------------------------------------

QS_KERNEL void activate_kernel(Activation activation, const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += gpu::kWarp) {
    const float x = gpu::load(up + i);
    gpu::store(y + i, activation == Activation::silu_gated ? gpu::silu_gated(gpu::load(gate + i), x)
                                                           : gpu::activate(activation, x));
  }
}

// What the kernels make of values inside the MLP.
std::vector<float> activated(Activation activation, const std::vector<float>& gate, const std::vector<float>& up) {
  std::vector<float> y = poisoned(static_cast<int64_t>(up.size()));
  gpu::launch("activate", activate_kernel, {1}, gpu::kWarp, 0, nullptr, activation, gate.data(), up.data(), y.data(),
              static_cast<int64_t>(up.size()));
  gpu::synchronize(nullptr);
  return y;
}

// --- the product alone
// ------------------------------------------------------------------------------------------------

struct GemmCase {
  int64_t rows, count, n, k;
  int group;
  bool low, mixed, extras;
};

void gemm_case(const GemmCase& c, uint32_t seed) {
  Random random(seed);
  const std::string name = "decode gemm T" + std::to_string(c.count) + " of " + std::to_string(c.rows) + " N" +
                           std::to_string(c.n) + " K" + std::to_string(c.k) + " g" + std::to_string(c.group) +
                           (c.low ? "" : " int4") + (c.mixed ? " mixed" : "") + (c.extras ? " extras" : "");
  const Weight w = random_weight(random, c.n, c.k, c.group);
  const std::vector<float> x = random.normals(c.rows * c.k), bias = random.normals(c.n);
  OwnedRows quantized(c.rows, c.k, c.group);
  std::vector<int32_t> bits, out_index;
  for (int32_t i = 0; i < c.rows; ++i) {
    bits.push_back(random.integer(0, 1) ? 8 : 4);
    out_index.push_back(2 * i + 1);
  }
  MatryoshkaGemm p;
  p.x = quantized.rows;
  quantize_rows(x.data(), c.k, nullptr, p.x);
  p.w = w.view(c.low);
  p.bits = c.mixed ? bits.data() : nullptr;
  p.y_stride = c.n + 3;
  const int64_t y_size = (2 * c.rows + 1) * p.y_stride;
  const std::vector<float> before = c.extras ? random.normals(y_size) : poisoned(y_size);
  if (c.extras) {
    p.bias = bias.data();
    p.out_index = out_index.data();
  }
  std::vector<float> want = before;
  p.y = want.data();
  if (c.extras) p.residual = want.data();
  MatryoshkaGemm fewer = p;
  fewer.x.rows = c.count;
  matryoshka_gemm(fewer);

  // Rows past the count hold garbage.
  std::fill(p.x.q + c.count * p.x.k_padded, p.x.q + c.rows * p.x.k_padded, int8_t(99));
  const int32_t count = static_cast<int32_t>(c.count);
  schedules(name, [&] {
    std::vector<float> y = before;
    p.y = y.data();
    if (c.extras) p.residual = y.data();
    gpu::decode_gemm(p, c.count == c.rows ? nullptr : &count, nullptr);
    report(same(want, y), name);
  });
}

// --- the stages ------------------------------------------------------------------------------------------------------

struct Cache {
  std::vector<float> key, value, key_scale, value_scale;  // the arrays' bytes, whatever their type
  std::vector<int32_t> table, lengths, positions;
  int32_t used = 3;
  int64_t sequences;
  Cache(const Shape& s, int64_t of_sequences, int64_t entries) : sequences(of_sequences) {
    const int64_t blocks = of_sequences * kMaxBlocks;
    key.assign(static_cast<size_t>(blocks * s.kv_heads * kBlock * s.head_size), 7.0f);
    value = key;
    key_scale.assign(static_cast<size_t>(blocks * s.kv_heads * kBlock), 7.0f);
    value_scale = key_scale;
    table.assign(static_cast<size_t>(blocks), -1);
    for (int64_t i = 0; i < of_sequences; ++i) table[static_cast<size_t>(i * kMaxBlocks)] = used++;
    lengths.assign(static_cast<size_t>(of_sequences), static_cast<int32_t>(entries));
    positions.assign(static_cast<size_t>(blocks * kBlock), -1);
  }
  static constexpr int64_t kBlock = 4, kMaxBlocks = 12;
  KvCache view(const Shape& s) {
    KvCache c;
    c.key = key.data();
    c.value = value.data();
    c.key_scale = key_scale.data();
    c.value_scale = value_scale.data();
    c.type = s.type;
    c.blocks = sequences * kMaxBlocks;
    c.block_size = kBlock;
    c.kv_heads = s.kv_heads;
    c.head_size = s.head_size;
    c.block_table = table.data();
    c.max_blocks = kMaxBlocks;
    c.sequences = sequences;
    c.lengths = lengths.data();
    c.positions = positions.data();
    c.blocks_used = &used;
    return c;
  }
  bool operator==(const Cache& other) const {
    const auto bytes = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
    };
    return bytes(key, other.key) && bytes(value, other.value) && bytes(key_scale, other.key_scale) &&
           bytes(value_scale, other.value_scale) && table == other.table && lengths == other.lengths &&
           positions == other.positions && used == other.used;
  }
};

// A batch on the "device": `bound` rows may be active, `count` are.
struct Batch {
  int64_t total, bound, count, sequences = 3;
  std::vector<float> hidden;
  std::vector<int32_t> active, positions, sequence, bits, counters, depth;
  std::vector<float> previous, q, k, v, attention, inner, drift, drift_parts;
  std::vector<int64_t> slots;
  int32_t full = 0, device_count = 0;
  QuantizedMemory quantized;
  gpu::DeviceWorkspace work;
  Rows rows;

  Batch(Random& random, const Shape& s, int64_t of_bound, int64_t of_count, bool mixed, bool compacted)
      : total(compacted ? of_bound + 5 : of_bound),
        bound(of_bound),
        count(of_count),
        hidden(random.normals(total * s.d)),
        device_count(static_cast<int32_t>(of_count)),
        quantized(quantized_rows_bytes(of_bound, std::max({s.d, s.ffn, s.heads * s.head_size}), 32)) {
    for (int32_t i = 0; i < total; ++i) {
      positions.push_back(random.integer(0, static_cast<int>(Model::kPositions) - 1));
      sequence.push_back(random.integer(0, 2));
      bits.push_back(random.integer(0, 1) ? 8 : 4);
      depth.push_back(i);
      if (random.integer(0, 4) != 0 || total - i <= of_count - static_cast<int64_t>(active.size())) active.push_back(i);
    }
    active.resize(static_cast<size_t>(of_count));
    active.resize(static_cast<size_t>(of_bound), 1 << 30);  // garbage past the count
    counters.assign(gpu::kCounters, 0);
    previous = poisoned(bound * s.d);
    q = poisoned(bound * s.heads * s.head_size);
    k = poisoned(bound * s.kv_heads * s.head_size);
    v = k;
    attention = poisoned(bound * s.heads * s.head_size);
    inner = poisoned(bound * s.ffn);
    drift = poisoned(bound);
    drift_parts = poisoned(bound * ((s.d + 15) / 16) * 2);
    slots.assign(static_cast<size_t>(bound), -77);
    work.previous = previous.data();
    work.q = q.data();
    work.k = k.data();
    work.v = v.data();
    work.attention = attention.data();
    work.inner = inner.data();
    work.drift = drift.data();
    work.drift_parts = drift_parts.data();
    work.slots = slots.data();
    work.full = &full;
    work.quantized = quantized.start;
    work.counters = counters.data();
    work.rows = bound;
    rows.hidden = hidden.data();
    rows.rows = total;
    rows.active = compacted ? active.data() : nullptr;
    rows.count = bound;
    rows.positions = positions.data();
    rows.sequence = sequence.data();
    rows.bits = mixed ? bits.data() : nullptr;
  }
  int64_t row_of(int64_t i) const { return rows.active ? active[static_cast<size_t>(i)] : i; }
  const int32_t* device() const { return count == bound ? nullptr : &device_count; }
  std::vector<int32_t> compact_bits() const {
    std::vector<int32_t> of;
    for (int64_t i = 0; i < count; ++i) of.push_back(rows.bits ? bits[static_cast<size_t>(row_of(i))] : 8);
    return of;
  }
  // y = linear(the rows that the stage quantized), by the CPU
  std::vector<float> product(const Linear& linear, bool with_bits = true) const {
    const std::vector<int32_t> of = compact_bits();
    std::vector<float> y = poisoned(count * linear.weight.n);
    MatryoshkaGemm gemm;
    gemm.x = carve_quantized_rows(quantized.start, bound, linear.weight.k, linear.weight.group);
    gemm.x.rows = count;
    gemm.w = linear.weight;
    gemm.bits = with_bits ? of.data() : nullptr;
    gemm.bias = linear.bias;
    gemm.y = y.data();
    gemm.y_stride = linear.weight.n;
    matryoshka_gemm(gemm);
    return y;
  }
  // How far the quantized rows are from `want`, [count, k].
  double quantized_error(const MatryoshkaWeight& w, const std::vector<double>& want) const {
    const QuantizedRows x = carve_quantized_rows(quantized.start, bound, w.k, w.group);
    std::vector<float> got;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < w.k; ++c) {
        got.push_back(x.scale[i * x.groups + c / w.group] * static_cast<float>(x.q[i * x.k_padded + c]));
      }
    }
    return error(got, want);
  }
  std::vector<double> normed(const Norm& norm, int64_t d) const {
    std::vector<double> all;
    for (int64_t i = 0; i < count; ++i) {
      const float* x = hidden.data() + row_of(i) * d;
      double mean = 0, squares = 0;
      for (int64_t c = 0; c < d && norm.kind == NormKind::layer; ++c) mean += x[c] / double(d);
      for (int64_t c = 0; c < d; ++c) squares += (x[c] - mean) * (x[c] - mean) / double(d);
      for (int64_t c = 0; c < d; ++c) {
        all.push_back((x[c] - mean) / std::sqrt(squares + double(norm.eps)) * norm.weight[c] +
                      (norm.bias ? norm.bias[c] : 0));
      }
    }
    return all;
  }
};

// A head's RMS norm in the order of sums that csrc/cpu/norm.h promises.
void normalize(const Norm& norm, float* x, int64_t size) {
  float sums[256] = {};
  for (int64_t e = 0; e < size; ++e) sums[e % 256] = std::fma(x[e], x[e], sums[e % 256]);
  float total = 0;
  for (float* chunk = sums; chunk < sums + 256; chunk += 32) {
    for (int apart = 16; apart > 0; apart /= 2) {
      for (int i = 0; i < apart; ++i) chunk[i] += chunk[i + apart];
    }
    total += chunk[0];
  }
  const float inverse = 1.0f / std::sqrt(total / static_cast<float>(size) + norm.eps);
  for (int64_t e = 0; e < size; ++e) {
    const float scaled = x[e] * inverse;
    x[e] = scaled * norm.weight[e];
  }
}

void finish(const Layer& layer, const Norm& norm, int64_t position, float* x, int64_t heads) {
  const int64_t size = layer.head_size, half = size / 2;
  for (int64_t h = 0; h < heads; ++h, x += size) {
    if (norm.weight) normalize(norm, x, size);
    for (int64_t e = 0; layer.cosine && e < half; ++e) {
      const float a = x[e], b = x[half + e], c = layer.cosine[position * half + e], s = layer.sine[position * half + e];
      const float ac = a * c, bs = b * s, bc = b * c, as = a * s;
      x[e] = ac - bs;
      x[half + e] = bc + as;
    }
  }
}

constexpr double kRounding = 1e-2;  // of INT8 rows

struct StageCase {
  int64_t bound, count;
  bool mixed, compacted;
};

// Runs `body` with a copy of the batch, under every schedule.
void with_batch(const std::string& name, const Shape& s, const StageCase& c, uint32_t seed,
                const std::function<void(Batch&)>& body) {
  schedules(name, [&] {
    Random random(seed);
    Batch batch(random, s, c.bound, c.count, c.mixed, c.compacted);
    body(batch);
    report(all_zero(batch.counters), name + ": counters");
  });
}

void test_attention_input(const std::string& name, const Shape& s, Model& model, const StageCase& c, bool with_query,
                          bool given_slots) {
  with_batch(name, s, c, 3, [&](Batch& b) {
    Cache cache(s, b.sequences, 3), wanted_cache = cache;
    const std::vector<float> before = b.hidden;
    std::vector<int64_t> want_slots(static_cast<size_t>(c.bound), -77);
    KvCache want_view = wanted_cache.view(s);
    kv_allocate(want_view, b.rows.active, c.count, b.rows.sequence, b.rows.positions, want_slots.data());
    if (given_slots) {
      cache = wanted_cache;
      b.rows.slots = want_slots.data();
    }
    gpu::decode_attention_input(model.layer, b.rows, b.device(), cache.view(s), b.work, with_query, nullptr);

    const Layer& layer = model.layer;
    report(b.quantized_error(layer.k.weight, b.normed(layer.attention_norm, s.d)) < kRounding, name + ": norm");
    std::vector<float> q = b.product(layer.q), k = b.product(layer.k), v = b.product(layer.v);
    for (int64_t i = 0; i < c.count; ++i) {
      const int64_t position = b.positions[static_cast<size_t>(b.row_of(i))];
      finish(layer, layer.q_norm, position, q.data() + i * layer.q.weight.n, s.heads);
      finish(layer, layer.k_norm, position, k.data() + i * layer.k.weight.n, s.kv_heads);
    }
    KvScatter scatter;
    scatter.key = k.data();
    scatter.value = v.data();
    scatter.key_stride = scatter.value_stride = layer.k.weight.n;
    scatter.slots = want_slots.data();
    scatter.count = c.count;
    scatter.cache = wanted_cache.view(s);
    kv_scatter(scatter);
    const auto rest = [](std::vector<float> head, const std::vector<float>& whole) {
      head.resize(whole.size(), std::nanf(""));
      return head;
    };
    report(same(rest(with_query ? q : std::vector<float>(), b.q), b.q), name + ": q");
    report(same(rest(k, b.k), b.k), name + ": k");
    report(same(rest(v, b.v), b.v), name + ": v");
    report(given_slots || b.slots == want_slots, name + ": slots");
    report(cache == wanted_cache, name + ": cache");
    report(b.full == 0, name + ": full");
    report(before == b.hidden, name + ": hidden");
    std::vector<float> previous;
    for (int64_t i = 0; i < c.count && with_query; ++i) {
      previous.insert(previous.end(), before.begin() + b.row_of(i) * s.d, before.begin() + (b.row_of(i) + 1) * s.d);
    }
    report(same(rest(previous, b.previous), b.previous), name + ": previous");
  });
}

// hidden += linear(input), by the CPU, from the input itself
std::vector<float> added(const Batch& b, const Linear& linear, const float* input) {
  const MatryoshkaWeight& w = linear.weight;
  OwnedRows quantized(b.count, w.k, w.group);
  MatryoshkaGemm gemm;
  gemm.x = quantized.rows;
  quantize_rows(input, w.k, nullptr, gemm.x);
  const std::vector<int32_t> bits = b.compact_bits();
  std::vector<float> hidden = b.hidden;
  gemm.w = w;
  gemm.bits = bits.data();
  gemm.bias = linear.bias;
  gemm.y = hidden.data();
  gemm.residual = hidden.data();
  gemm.y_stride = w.n;
  gemm.out_index = b.rows.active;
  matryoshka_gemm(gemm);
  return hidden;
}

void test_attention_output(const std::string& name, const Shape& s, Model& model, const StageCase& c) {
  with_batch(name, s, c, 4, [&](Batch& b) {
    const std::vector<float> input = Random(5).normals(c.count * s.heads * s.head_size);
    std::copy(input.begin(), input.end(), b.attention.begin());
    const std::vector<float> want = added(b, model.layer.o, input.data());
    gpu::decode_attention_output(model.layer, b.rows, b.device(), b.work, nullptr);
    report(same(want, b.hidden), name);
  });
}

void test_mlp_input(const std::string& name, const Shape& s, Model& model, const StageCase& c) {
  with_batch(name, s, c, 6, [&](Batch& b) {
    const Layer& layer = model.layer;
    gpu::decode_mlp_input(layer, b.rows, b.device(), b.work, nullptr);
    report(b.quantized_error(layer.up.weight, b.normed(layer.mlp_norm, s.d)) < kRounding, name + ": norm");
    const std::vector<float> up = b.product(layer.up);
    const std::vector<float> gate = s.llama ? b.product(layer.gate) : up;
    std::vector<float> want = activated(layer.activation, gate, up);
    want.resize(b.inner.size(), std::nanf(""));
    report(same(want, b.inner), name);
  });
}

void test_mlp_output(const std::string& name, const Shape& s, Model& model, const StageCase& c, bool relative,
                     bool entropy) {
  with_batch(name, s, c, 8, [&](Batch& b) {
    Random random(9);
    const std::vector<float> input = random.normals(c.count * s.ffn);
    std::copy(input.begin(), input.end(), b.inner.begin());
    const std::vector<float> want = added(b, model.layer.down, input.data());
    for (int64_t i = 0; i < c.count; ++i) {
      for (int64_t k = 0; k < s.d; ++k) {
        b.previous[static_cast<size_t>(i * s.d + k)] =
            want[static_cast<size_t>(b.row_of(i) * s.d + k)] + 0.1f * float(i % 5) * random.normal();
      }
    }
    std::vector<int8_t> overrides(static_cast<size_t>(b.total), 0);
    overrides[static_cast<size_t>(b.row_of(0))] = 1;
    overrides[static_cast<size_t>(b.row_of(c.count - 1))] = -1;

    // The CPU's decisions, by thresholds that lie between two rows' values.
    std::vector<float> drift(static_cast<size_t>(c.count)), entropies = drift;
    softmax_entropy(want.data(), s.d, b.rows.active, c.count, s.d, entropies.data());
    std::vector<uint8_t> want_halted(static_cast<size_t>(b.total), 0), halted = want_halted;
    HaltingUpdate update;
    update.hidden = want.data();
    update.previous = b.previous.data();
    update.stride = update.previous_stride = update.d = s.d;
    update.active = b.rows.active;
    update.count = c.count;
    update.previous_compact = true;
    update.entropy = entropy ? entropies.data() : nullptr;
    update.positions = b.positions.data();
    update.overrides = overrides.data();
    update.relative = relative;
    update.sink_tokens = 4;
    update.drift = drift.data();
    update.halted = want_halted.data();
    std::vector<int32_t> next(static_cast<size_t>(c.bound), 1 << 30);
    update.next_active = next.data();
    halting_update(update);
    const auto middle = [](std::vector<float> x, size_t at) {
      std::sort(x.begin(), x.end());
      return at + 1 < x.size() ? (x[at] + x[at + 1]) / 2 : x.back() * 2;
    };
    update.drift_threshold = middle(drift, drift.size() * 3 / 5);
    update.entropy_threshold = middle(entropies, drift.size() / 2);
    std::fill(want_halted.begin(), want_halted.end(), uint8_t(0));
    const int64_t kept = halting_update(update);
    std::vector<int32_t> want_depth = b.depth;
    for (int64_t i = 0; i < c.count; ++i) ++want_depth[static_cast<size_t>(b.row_of(i))];

    gpu::DeviceHalting halting;
    halting.drift_threshold = update.drift_threshold;
    halting.relative = relative;
    halting.tests_entropy = entropy;
    halting.entropy_threshold = update.entropy_threshold;
    halting.sink_tokens = 4;
    halting.overrides = overrides.data();
    halting.halted = halted.data();
    halting.active = b.active.data();
    halting.count = &b.device_count;
    gpu::decode_mlp_output(model.layer, b.rows, b.device(), b.work, b.depth.data(), &halting, nullptr);
    report(same(want, b.hidden), name);
    report(b.device_count == kept, name + ": count " + std::to_string(b.device_count));
    report(std::equal(next.begin(), next.begin() + kept, b.active.begin()), name + ": active");
    report(halted == want_halted, name + ": halted");
    report(b.depth == want_depth, name + ": depth");
    report(error(floats(b.drift.data(), c.count), std::vector<double>(drift.begin(), drift.end())) < 1e-5,
           name + ": drift");
  });
}

void test_lm_head(const std::string& name, const Shape& s, const Model& model, const StageCase& c) {
  with_batch(name, s, c, 10, [&](Batch& b) {
    const int64_t n = model.head.weight.n, stride = n + 2;
    std::vector<float> logits = poisoned(c.bound * stride), want = logits;
    gpu::decode_lm_head(model.layer.mlp_norm, model.head, b.rows, b.device(), s.d, logits.data(), stride, b.work,
                        nullptr);
    const std::vector<float> product = b.product(model.head, false);
    for (int64_t i = 0; i < c.count; ++i) {
      std::copy(product.begin() + i * n, product.begin() + (i + 1) * n, want.begin() + i * stride);
    }
    report(same(want, logits), name);
  });
}

// Nothing is written where no row is active.
void test_no_rows(const Shape& s, Model& model) {
  const std::string name = std::string("decode ") + s.name + " no rows";
  with_batch(name, s, {9, 0, true, true}, 11, [&](Batch& b) {
    Cache cache(s, b.sequences, 3);
    const Cache untouched = cache;
    const Batch before = b;
    gpu::DeviceHalting halting;
    halting.active = b.active.data();
    halting.count = &b.device_count;
    gpu::decode_attention_input(model.layer, b.rows, b.device(), cache.view(s), b.work, true, nullptr);
    gpu::decode_attention_output(model.layer, b.rows, b.device(), b.work, nullptr);
    gpu::decode_mlp_input(model.layer, b.rows, b.device(), b.work, nullptr);
    gpu::decode_mlp_output(model.layer, b.rows, b.device(), b.work, b.depth.data(), &halting, nullptr);
    report(cache == untouched && b.hidden == before.hidden && b.depth == before.depth && b.device_count == 0 &&
               same(b.q, before.q) && same(b.inner, before.inner) && b.slots == before.slots,
           name);
  });
}

// A full cache: the rows with room are served, the others get slot -1.
void test_full_cache(const Shape& s, Model& model) {
  const std::string name = std::string("decode ") + s.name + " full cache";
  with_batch(name, s, {8, 8, false, false}, 12, [&](Batch& b) {
    std::fill(b.sequence.begin(), b.sequence.end(), 0);
    Cache cache(s, b.sequences, Cache::kBlock * Cache::kMaxBlocks - 3);
    for (int32_t i = 0; i < Cache::kMaxBlocks; ++i) cache.table[static_cast<size_t>(i)] = i;
    cache.used = 20;
    gpu::decode_attention_input(model.layer, b.rows, b.device(), cache.view(s), b.work, true, nullptr);
    report(b.full == 1, name + ": full");
    for (size_t i = 0; i < 8; ++i) {
      report(b.slots[i] == (i < 3 ? Cache::kMaxBlocks * Cache::kBlock - 3 + int64_t(i) : -1), name + ": slots");
    }
  });
}

// gelu against double precision, in units of the last place.
void test_gelu() {
  Random random(41);
  std::vector<float> x = random.normals(20000);
  for (int i = 0; i <= 26000; ++i) x.push_back(-13 + 1e-3f * static_cast<float>(i));
  const std::vector<float> got = activated(Activation::gelu, x, x);
  double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = 0.5 * double(x[i]) * std::erfc(-double(x[i]) / std::sqrt(2.0));
    if (std::fabs(want) < 0x1p-126) continue;
    worst = std::max(worst, std::fabs(got[i] - want) / std::ldexp(1.0, std::ilogb(want) - 23));
  }
  report(worst < 6, "cuda gelu: " + std::to_string(worst) + " units in the last place");
  const std::vector<float> large = {20, -20, INFINITY, NAN, -INFINITY}, y = activated(Activation::gelu, large, large);
  report(y[0] == 20 && y[1] == 0 && std::isinf(y[2]) && std::isnan(y[3]) && std::isnan(y[4]),
         "cuda gelu of what is large or no number");
  const std::vector<float> few = {-1, 2, NAN}, z = activated(Activation::relu, few, few);
  report(z[0] == 0 && z[1] == 2 && std::isnan(z[2]), "cuda relu");
}

}  // namespace
}  // namespace check

void decode_tests() {
  using namespace check;
  test_gelu();
  Random random(21);
  for (uint32_t i = 0; i < 24; ++i) {
    const int64_t rows = std::vector<int64_t>{1, 3, 8, 9, 20, 32}[i % 6];
    gemm_case({rows, i % 2 ? rows : random.integer(1, static_cast<int>(rows)), random.integer(1, 70),
               random.integer(1, 400), 32 << (i % 3), i % 5 != 0, random.integer(0, 1) == 1, random.integer(0, 1) == 1},
              i);
  }
  gemm_case({8, 8, 32, 2304, 32, true, true, true}, 100);  // more pieces than a ring has
  gemm_case({32, 30, 19, 1400, 64, true, true, false}, 101);

  const Shape shapes[] = {{"llama", 96, 6, 2, 16, 200, true, 32, KvType::f32},
                          {"llama 64", 320, 4, 1, 64, 136, true, 64, KvType::f16},
                          {"gpt2", 100, 3, 3, 80, 150, false, 128, KvType::bf16},
                          {"odd", 84, 3, 1, 28, 101, true, 64, KvType::i8},
                          {"qwen3", 72, 5, 1, 40, 90, true, 32, KvType::f16, {}, true, false},
                          {"gelu", 64, 3, 1, 272, 130, false, 64, KvType::f32, Activation::gelu, true},
                          {"relu, qkv biases", 64, 2, 2, 20, 77, false, 64, KvType::f32, Activation::relu}};
  const StageCase cases[] = {
      {1, 1, false, false}, {3, 3, true, true}, {8, 6, true, true}, {9, 9, false, true}, {32, 27, true, true}};
  for (const Shape& s : shapes) {
    Random weights(31);
    Model model(weights, s, 45);
    for (const StageCase& c : cases) {
      if (&s != shapes && c.bound != 8 && c.bound != 9) continue;  // enough of the other shapes
      const std::string name =
          std::string("decode ") + s.name + " T" + std::to_string(c.count) + " of " + std::to_string(c.bound) + " ";
      test_attention_input(name + "attention_input", s, model, c, true, false);
      if (c.bound <= 8) test_attention_input(name + "write_kv", s, model, c, false, true);
      test_attention_output(name + "attention_output", s, model, c);
      test_mlp_input(name + "mlp_input", s, model, c);
      test_mlp_output(name + "mlp_output", s, model, c, c.bound % 2 == 0, c.count % 2 == 1);
      test_lm_head(name + "lm_head", s, model, c);
    }
    test_no_rows(s, model);
    test_full_cache(s, model);
  }
}
