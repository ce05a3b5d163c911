#include "problem.h"

#include <algorithm>
#include <cmath>

#include "ranges.h"

namespace profiler {

uint64_t Random::next() {
  uint64_t x = state_ += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

float Random::value() {
  constexpr float kRoot3 = 1.7320508f;
  return (static_cast<float>(next() >> 40) * 0x1p-23f - 1) * kRoot3;
}

std::vector<float> Random::values(int64_t n, float scale, float mean) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = mean + scale * value();
  return x;
}

std::vector<int32_t> Random::choice(int64_t n, int64_t count) {
  std::vector<int32_t> chosen;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t wanted = count - static_cast<int64_t>(chosen.size());
    if (static_cast<int64_t>(next() % static_cast<uint64_t>(n - i)) < wanted) chosen.push_back(static_cast<int32_t>(i));
  }
  return chosen;
}

// --- the model -------------------------------------------------------------------------------------------------------

MatryoshkaWeight Problem::weight(int64_t n, int64_t k, bool low) {
  const auto group = arguments.shape.group;
  const int64_t plane = n * ((k + 7) / 8) * 4;
  // The planes of a weight start an odd number of pages apart, so that both at once don't meet in the same cache sets.
  const int64_t apart = ((plane + 4095) / 4096 | 1) * 4096;
  uint8_t* planes = memory.space<uint8_t>(low ? apart + plane : plane);
  std::vector<uint64_t> nibbles(static_cast<size_t>((plane + 7) / 8));
  for (uint64_t& word : nibbles) word = random_.next();
  backend.copy_in(planes, nibbles.data(), plane);
  if (low) {
    for (uint64_t& word : nibbles) word = random_.next();
    backend.copy_in(planes + apart, nibbles.data(), plane);
  }
  // Such that a row of variance 1 gives one of about variance 1; a code's deviation is 4.6. Offsets are -8 scales.
  const int exponent = std::max(-14, static_cast<int>(std::floor(std::log2(1 / (4.6 * std::sqrt(double(k)))))));
  std::vector<uint16_t> scales(static_cast<size_t>(n * ((k + group - 1) / group))), offsets;
  for (uint16_t& scale : scales) {
    scale = static_cast<uint16_t>((random_.next() & 0x83ff) | static_cast<unsigned>(exponent + 15) << 10);
    offsets.push_back(static_cast<uint16_t>((scale + (3u << 10)) ^ 0x8000u));
  }
  MatryoshkaWeight w;
  w.hi = planes;
  w.lo = low ? planes + apart : nullptr;
  w.scale = memory.upload(scales);
  w.offset = memory.upload(offsets);
  w.n = n;
  w.k = k;
  w.group = static_cast<int32_t>(group);
  return w;
}

Linear Problem::linear(int64_t n, int64_t k, bool low) {
  Linear made;
  made.weight = weight(n, k, low);
  if (!arguments.shape.llama) made.bias = memory.upload(random_.values(n, 0.1f));
  return made;
}

Norm Problem::norm() {
  Norm made;
  made.weight = memory.upload(random_.values(arguments.shape.d, 0.1f, 1));
  if (!arguments.shape.llama) {
    made.kind = NormKind::layer;
    made.bias = memory.upload(random_.values(arguments.shape.d, 0.1f));
  }
  return made;
}

Layer Problem::layer() {
  const Shape& s = arguments.shape;
  const bool low = arguments.has_low_plane();
  Layer made;
  made.d = s.d;
  made.heads = s.heads;
  made.kv_heads = s.kv_heads;
  made.head_size = s.head_size;
  made.ffn = s.ffn;
  made.activation = s.llama ? Activation::silu_gated : Activation::gelu_tanh;
  made.attention_norm = norm();
  made.q = linear(s.heads * s.head_size, s.d, low);
  made.k = linear(s.kv_heads * s.head_size, s.d, low);
  made.v = linear(s.kv_heads * s.head_size, s.d, low);
  made.o = linear(s.d, s.heads * s.head_size, low);
  made.mlp_norm = norm();
  if (s.llama) made.gate = linear(s.ffn, s.d, low);
  made.up = linear(s.ffn, s.d, low);
  made.down = linear(s.d, s.ffn, low);
  made.cosine = cosine_;
  made.sine = sine_;
  made.attention_scale = 1 / std::sqrt(static_cast<float>(s.head_size));
  return made;
}

// --- rows, caches ----------------------------------------------------------------------------------------------------

void Problem::make_rows() {
  const Arguments& a = arguments;
  const int64_t each = a.rows / a.sequences;
  for (int64_t i = 0; i < a.rows; ++i) {
    sequence.push_back(static_cast<int32_t>(i / each));
    positions.push_back(static_cast<int32_t>(a.context + i % each));
  }
  survivors = random_.choice(a.rows, a.active_rows());
  // In a step, and where halting is what is measured, rows halt on the way.
  const bool all = a.step() || a.kernel == Kernel::halting_update;
  taking_part = all ? random_.choice(a.rows, a.rows) : survivors;
  if (a.kernel == Kernel::mlp_output) {  // the same share again halts in stage 5
    survivors.clear();
    const double go_on = (1 - a.halting_ratio) * static_cast<double>(taking_part.size());
    for (const int32_t at : random_.choice(static_cast<int64_t>(taking_part.size()), std::llround(go_on))) {
      survivors.push_back(taking_part[static_cast<size_t>(at)]);
    }
  }
  hidden = random_.values(a.rows * a.shape.d);
  if (a.kernel == Kernel::fusion_groups) {  // members of a group are near each other
    for (int64_t g = 0; g < a.fused_rows(); ++g) {
      const int64_t first = g * a.rows / a.fused_rows(), end = (g + 1) * a.rows / a.fused_rows();
      for (int64_t at = (first + 1) * a.shape.d; at < end * a.shape.d; ++at) {
        hidden[static_cast<size_t>(at)] =
            hidden[static_cast<size_t>(first * a.shape.d + at % a.shape.d)] + 0.1f * random_.value();
      }
    }
  }
  std::vector<int8_t> overrides(static_cast<size_t>(a.rows), 1);
  for (const int32_t row : survivors) overrides[static_cast<size_t>(row)] = -1;
  overrides_ = memory.upload(overrides);
  never_ = memory.upload(std::vector<int8_t>(static_cast<size_t>(a.rows), -1));
  halted = memory.space<uint8_t>(a.rows);
  active = memory.space<int32_t>(a.rows);
  count = memory.space<int32_t>(1);
  rows.hidden = memory.space<float>(a.rows * a.shape.d);
  rows.rows = a.rows;
  rows.active = active;
  rows.count = a.rows;  // the bound
  rows.positions = memory.upload(positions);
  rows.sequence = memory.upload(sequence);
  bits.assign(static_cast<size_t>(a.rows), a.has_low_plane() ? 8 : 4);
  if (a.precision == "adaptive") {
    const double four = a.int4_share * static_cast<double>(a.rows);
    for (const int32_t row : random_.choice(a.rows, std::llround(four))) bits[static_cast<size_t>(row)] = 4;
    rows.bits = memory.upload(bits);
  }
}

void Problem::make_caches(int64_t how_many) {
  const Arguments& a = arguments;
  const int64_t each = a.rows / a.sequences, full = (a.context + kBlockSize - 1) / kBlockSize;
  const int64_t max_blocks = (a.context + each + kBlockSize - 1) / kBlockSize;
  const int64_t blocks = a.sequences * max_blocks, entries = blocks * kBlockSize;
  const int64_t elements = entries * a.shape.kv_heads * a.shape.head_size, vectors = entries * a.shape.kv_heads;

  // Blocks were handed out to the sequences in turn.
  std::vector<int32_t> state, present(static_cast<size_t>(entries), 0);
  for (int64_t s = 0; s < a.sequences; ++s) {
    for (int64_t b = 0; b < max_blocks; ++b) state.push_back(static_cast<int32_t>(b < full ? b * a.sequences + s : -1));
    for (int64_t e = 0; e < a.context; ++e) {
      present[static_cast<size_t>((e / kBlockSize * a.sequences + s) * kBlockSize + e % kBlockSize)] =
          static_cast<int32_t>(e);
    }
  }
  state.insert(state.end(), static_cast<size_t>(a.sequences), static_cast<int32_t>(a.context));
  state.push_back(static_cast<int32_t>(full * a.sequences));
  for (int64_t i = 0; i < how_many; ++i) initial_state_.insert(initial_state_.end(), state.begin(), state.end());
  cache_state_ = memory.space<int32_t>(static_cast<int64_t>(initial_state_.size()));

  const auto random_elements = [&]() -> void* {
    if (a.kv_type == KvType::f32) return memory.upload(random_.values(elements));
    if (a.kv_type == KvType::i8) {
      std::vector<int8_t> x(static_cast<size_t>(elements));
      for (int8_t& v : x) v = static_cast<int8_t>(static_cast<int>(random_.next() % 255) - 127);
      return memory.upload(x);
    }
    // A random sign and mantissa, between 1/2 and 1 in magnitude.
    const uint64_t exponent = a.kv_type == KvType::f16 ? 14 << 10 : 126 << 7;
    const uint64_t mask = a.kv_type == KvType::f16 ? 0x83ff : 0x807f;
    std::vector<uint16_t> x(static_cast<size_t>(elements));
    for (uint16_t& v : x) v = static_cast<uint16_t>((random_.next() & mask) | exponent);
    return memory.upload(x);
  };
  for (int64_t i = 0; i < how_many; ++i) {
    KvCache cache;
    cache.key = random_elements();
    cache.value = random_elements();
    if (a.kv_type == KvType::i8) {
      cache.key_scale = memory.upload(random_.values(vectors, 0.001f, 0.01f));
      cache.value_scale = memory.upload(random_.values(vectors, 0.001f, 0.01f));
    }
    cache.type = a.kv_type;
    cache.blocks = blocks;
    cache.block_size = kBlockSize;
    cache.kv_heads = a.shape.kv_heads;
    cache.head_size = a.shape.head_size;
    cache.block_table = cache_state_ + i * static_cast<int64_t>(state.size());
    cache.max_blocks = max_blocks;
    cache.sequences = a.sequences;
    cache.lengths = cache.block_table + blocks;
    cache.positions = memory.upload(present);
    cache.blocks_used = cache.lengths + a.sequences;
    caches.push_back(cache);
  }
  memory.restore(cache_state_, initial_state_);
}

// --- the kernels' parameters -----------------------------------------------------------------------------------------

void Problem::make_mechanism() {
  const Arguments& a = arguments;
  const Shape& s = a.shape;
  const auto quantize_into = [&](int64_t k) {
    const auto group = static_cast<int32_t>(s.group);
    void* buffer = memory.space<char>(quantized_rows_bytes(a.rows, k, group));
    quantized = carve_quantized_rows(buffer, a.rows, k, group);
  };
  switch (a.kernel) {
    case Kernel::quantize_rows:
      quantize_into(s.d);
      break;
    case Kernel::matryoshka_gemm: {
      const bool low = a.has_low_plane() || a.matrix == "head";
      const int64_t query = s.heads * s.head_size, key = s.kv_heads * s.head_size;
      const int64_t n = a.matrix == "q"                         ? query
                        : a.matrix == "k" || a.matrix == "v"    ? key
                        : a.matrix == "o" || a.matrix == "down" ? s.d
                        : a.matrix == "head"                    ? s.vocab
                                                                : s.ffn;
      const int64_t k = a.matrix == "o" ? query : a.matrix == "down" ? s.ffn : s.d;
      const Linear made = linear(n, k, low);
      quantize_into(k);
      float* x = memory.upload(random_.values(a.rows * k));
      backend.quantize_rows(x, k, active, quantized, count);
      gemm.x = quantized;
      gemm.w = made.weight;
      gemm.bias = made.bias;
      gemm.y = memory.space<float>(a.rows * n);
      gemm.y_stride = n;
      if (rows.bits != nullptr && low) {
        std::vector<int32_t> compact(static_cast<size_t>(a.rows), 8);
        for (size_t i = 0; i < taking_part.size(); ++i) compact[i] = bits[static_cast<size_t>(taking_part[i])];
        gemm.bits = memory.upload(compact);
      }
      break;
    }
    case Kernel::kv_scatter: {
      const int64_t width = s.kv_heads * s.head_size;
      std::vector<int64_t> slots(static_cast<size_t>(a.rows), -1);
      std::vector<int64_t> next(static_cast<size_t>(a.sequences), a.context);
      for (size_t i = 0; i < taking_part.size(); ++i) {
        const int32_t at = sequence[static_cast<size_t>(taking_part[i])];
        const int64_t entry = next[static_cast<size_t>(at)]++;
        slots[i] = (entry / kBlockSize * a.sequences + at) * kBlockSize + entry % kBlockSize;
      }
      scatter.key = memory.upload(random_.values(a.rows * width));
      scatter.value = memory.upload(random_.values(a.rows * width));
      scatter.key_stride = scatter.value_stride = width;
      scatter.slots = memory.upload(slots);
      scatter.count = a.rows;
      scatter.cache = caches[0];
      break;
    }
    case Kernel::halting_update: {
      std::vector<float> before = hidden;
      std::vector<float> share(static_cast<size_t>(a.rows), 0.2f * kDriftThreshold);
      for (const int32_t row : survivors) share[static_cast<size_t>(row)] = 3 * kDriftThreshold;
      for (size_t i = 0; i < before.size(); ++i) {
        before[i] += share[i / static_cast<size_t>(s.d)] * random_.value();
      }
      halting.hidden = rows.hidden;
      halting.previous = memory.upload(before);
      halting.stride = halting.previous_stride = halting.d = s.d;
      halting.active = active;
      halting.count = a.rows;
      halting.positions = rows.positions;
      halting.drift_threshold = kDriftThreshold;
      halting.drift = memory.space<float>(a.rows);
      halting.halted = halted;
      halting.next_active = active;
      break;
    }
    default:
      break;
  }
}

Problem::Problem(Backend& on, const Arguments& given) : arguments(given), backend(on), memory(on), random_(given.seed) {
  const Arguments& a = arguments;
  const Shape& s = a.shape;
  make_rows();
  if (a.stage() || a.step() || a.kernel == Kernel::kv_scatter) make_caches(a.step() ? s.layers : 1);
  if (a.stage() || a.step()) {
    if (s.llama) {
      std::vector<float> cosine, sine;
      for (int64_t p = 0; p < a.context + a.rows / a.sequences; ++p) {
        for (int64_t i = 0; i < s.head_size / 2; ++i) {
          const double angle = double(p) * std::pow(1e-4, double(2 * i) / double(s.head_size));
          cosine.push_back(static_cast<float>(std::cos(angle)));
          sine.push_back(static_cast<float>(std::sin(angle)));
        }
      }
      cosine_ = memory.upload(cosine);
      sine_ = memory.upload(sine);
    }
    for (int64_t i = 0; i < (a.step() ? s.layers : 1); ++i) layers.push_back(layer());
    const int64_t most = a.context + a.rows / a.sequences, blocks = (most + kBlockSize - 1) / kBlockSize;
    backend.reserve(layers[0], a.rows, a.sequences, blocks * kBlockSize);
  }
  if (a.step() || a.kernel == Kernel::lm_head) {
    if (layers.empty()) {  // the head quantizes in the layers' work memory
      Layer only;
      only.d = s.d;
      only.heads = s.heads;
      only.kv_heads = s.kv_heads;
      only.head_size = s.head_size;
      only.ffn = s.ffn;
      only.q.weight.group = static_cast<int32_t>(s.group);
      backend.reserve(only, a.rows, a.sequences, 1);
    }
    final_norm = norm();
    head.weight = weight(s.vocab, s.d, true);
    logits = memory.space<float>((a.kernel == Kernel::prefill ? 1 : a.rows) * s.vocab);
  }
  if (a.kernel == Kernel::fusion_groups || a.kernel == Kernel::fusion_reduce ||
      (a.kernel == Kernel::prefill && a.fusion_ratio > 0)) {
    std::vector<int32_t> last;
    for (int64_t g = 0; g < a.fused_rows(); ++g) {
      const int64_t end = (g + 1) * a.rows / a.fused_rows();
      while (static_cast<int64_t>(group_of.size()) < end) group_of.push_back(static_cast<int32_t>(g));
      last.push_back(static_cast<int32_t>(end - 1));
    }
    fusion.hidden = rows.hidden;
    fusion.stride = fusion.d = s.d;
    fusion.count = a.rows;
    fusion.positions = rows.positions;
    // In a prefill the groups aren't left to chance: a group counts as a sequence, and no distance is too long.
    fusion.sequence = a.step() ? memory.upload(group_of) : rows.sequence;
    fusion.threshold = a.step() ? std::numeric_limits<float>::max() : kFusionThreshold;
    fusion.fusible = memory.upload(std::vector<uint8_t>(static_cast<size_t>(a.rows), 1));
    fusion.group = memory.upload(group_of);
    groups = memory.space<int32_t>(1);
    weights = memory.upload(random_.values(a.rows, 0.1f, 1));
    fused = memory.space<float>(a.rows * s.d);
    fused_rows = rows;
    fused_rows.hidden = fused;
    fused_rows.active = nullptr;
    const auto of_last = [&](const std::vector<int32_t>& values) {
      std::vector<int32_t> picked(values);
      for (size_t g = 0; g < last.size(); ++g) picked[g] = values[static_cast<size_t>(last[g])];
      return memory.upload(picked);
    };
    fused_rows.positions = of_last(positions);
    if (rows.bits != nullptr) fused_rows.bits = of_last(bits);
  }
  restore();
  make_mechanism();
  // What the stage reads, made by the stages before it.
  for (const Kernel before : {Kernel::attention_input, Kernel::attention, Kernel::mlp_input}) {
    if (a.stage() && before < a.kernel) run_stage(before, 0);
  }
}

// --- runs ------------------------------------------------------------------------------------------------------------

void Problem::restore() {
  const Kernel kernel = arguments.kernel;
  memory.restore(rows.hidden, hidden);
  memory.restore(active, taking_part);
  memory.restore(count, std::vector<int32_t>{static_cast<int32_t>(taking_part.size())});
  memory.restore(halted, std::vector<uint8_t>(static_cast<size_t>(arguments.rows), 0));
  if (arguments.step() || kernel == Kernel::attention_input) memory.restore(cache_state_, initial_state_);
}

void Problem::run_stage(Kernel stage, size_t which) {
  const Layer& at = layers[which];
  KvCache& cache = caches[which];
  switch (stage) {
    case Kernel::attention_input:
      return backend.attention_input(at, rows, count, cache);
    case Kernel::attention:
      return backend.attention(at, rows, count, cache);
    case Kernel::attention_output:
      return backend.attention_output(at, rows, count);
    case Kernel::mlp_input:
      return backend.mlp_input(at, rows, count);
    default:
      break;
  }
  const bool halts = !arguments.step() || which + 1 == halting_layer();
  const Judging judging{halts ? overrides_ : never_, halted, active, count};
  backend.mlp_output(at, rows, count, arguments.halting_ratio > 0 ? &judging : nullptr);
}

size_t Problem::halting_layer() const { return std::max<size_t>(1, layers.size() / 2); }

void Problem::run_step() {
  const bool fuses = arguments.fusion_ratio > 0;
  const Rows all = rows;
  int32_t* const all_count = count;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Range layer_range("layer");
    if (fuses && l == halting_layer()) {
      const Range range("fusion");
      backend.fusion_groups(fusion, groups);
      backend.fusion_reduce(rows.hidden, arguments.shape.d, weights, fusion.group, arguments.rows, arguments.shape.d,
                            fused, arguments.fused_rows());
      rows = fused_rows;
      count = groups;
    }
    static constexpr struct {
      Kernel stage;
      const char* name;
    } stages[] = {{Kernel::attention_input, "attention_input"},
                  {Kernel::attention, "attention"},
                  {Kernel::attention_output, "attention_output"},
                  {Kernel::mlp_input, "mlp_input"},
                  {Kernel::mlp_output, "mlp_output"}};
    for (const auto& [stage, name] : stages) {
      const Range range(name);
      run_stage(stage, l);
    }
  }
  const Range range("lm_head");
  Rows ends;
  ends.hidden = rows.hidden;
  ends.rows = ends.count = arguments.rows;
  if (arguments.kernel == Kernel::prefill) {
    ends.hidden += ((rows.hidden == fused ? arguments.fused_rows() : arguments.rows) - 1) * arguments.shape.d;
    ends.rows = ends.count = 1;
  }
  backend.lm_head(final_norm, head, ends, nullptr, arguments.shape.d, logits, arguments.shape.vocab);
  rows = all;
  count = all_count;
}

void Problem::run() {
  if (arguments.step()) return run_step();
  const Range range(arguments.kernel_name.c_str());
  const int64_t d = arguments.shape.d;
  switch (arguments.kernel) {
    case Kernel::quantize_rows:
      return backend.quantize_rows(rows.hidden, d, active, quantized, count);
    case Kernel::matryoshka_gemm:
      return backend.matryoshka_gemm(gemm, count);
    case Kernel::kv_scatter:
      return backend.kv_scatter(scatter, count);
    case Kernel::halting_update:
      return backend.halting_update(halting, count, count);
    case Kernel::fusion_groups:
      return backend.fusion_groups(fusion, groups);
    case Kernel::fusion_reduce:
      return backend.fusion_reduce(rows.hidden, d, weights, fusion.group, arguments.rows, d, fused,
                                   arguments.fused_rows());
    case Kernel::lm_head:
      return backend.lm_head(final_norm, head, rows, count, d, logits, arguments.shape.vocab);
    default:
      return run_stage(arguments.kernel, 0);
  }
}

}  // namespace profiler
