// The stages of a layer against a layer in double precision, and row invariance: a token alone, step by step, and in a
// batch of others leaves the same bits in the hidden state and in the cache.
#include <algorithm>
#include <memory>

#include "check.h"

// The activations alone, as this source's own compiler flags make them.
#define QS_ISA plain
#define QS_ISA_LEVEL 0
#include "norm.h"

namespace check {
namespace {

using namespace quicksilver;

struct Shape {
  const char* name;
  int64_t d, heads, kv_heads, head_size, ffn;
  bool llama;
  int group;
  Activation activation = Activation::gelu_tanh;  // unless llama
  bool head_norms = false;
  bool attention_biases = false;  // those of q, k and v; of a gpt2 all linears have one
};

struct Model {
  Shape shape;
  Weight q, k, v, o, gate, up, down, head;
  std::vector<float> norm1, norm2, bias1, bias2, qb, kb, vb, ob, ub, db, qn, kn, cosine, sine;
  Layer layer;

  Model(Random& random, const Shape& s)
      : shape(s),
        q(random_weight(random, s.heads * s.head_size, s.d, s.group)),
        k(random_weight(random, s.kv_heads * s.head_size, s.d, s.group)),
        v(random_weight(random, s.kv_heads * s.head_size, s.d, s.group)),
        o(random_weight(random, s.d, s.heads * s.head_size, s.group)),
        gate(random_weight(random, s.ffn, s.d, s.group)),
        up(random_weight(random, s.ffn, s.d, s.group)),
        down(random_weight(random, s.d, s.ffn, s.group)),
        head(random_weight(random, 101, s.d, s.group)) {
    const auto near_one = [&](int64_t n) {
      std::vector<float> x = random.normals(n, 0.1f);
      for (float& value : x) value += 1;
      return x;
    };
    norm1 = near_one(s.d);
    norm2 = near_one(s.d);
    layer.d = s.d;
    layer.heads = s.heads;
    layer.kv_heads = s.kv_heads;
    layer.head_size = s.head_size;
    layer.ffn = s.ffn;
    layer.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_size));
    layer.attention_norm.weight = norm1.data();
    layer.mlp_norm.weight = norm2.data();
    layer.q.weight = q.view();
    layer.k.weight = k.view();
    layer.v.weight = v.view();
    layer.o.weight = o.view();
    layer.up.weight = up.view();
    layer.down.weight = down.view();
    if (s.llama) {
      layer.gate.weight = gate.view();
      for (int64_t i = 0; i < 64 * (s.head_size / 2); ++i) {
        const double angle =
            double(i / (s.head_size / 2)) * std::pow(0.01, double(i % (s.head_size / 2)) / double(s.head_size / 2));
        cosine.push_back(static_cast<float>(std::cos(angle)));
        sine.push_back(static_cast<float>(std::sin(angle)));
      }
      layer.cosine = cosine.data();
      layer.sine = sine.data();
    } else {
      bias1 = random.normals(s.d, 0.1f);
      bias2 = random.normals(s.d, 0.1f);
      qb = random.normals(q.n, 0.1f);
      kb = random.normals(k.n, 0.1f);
      vb = random.normals(v.n, 0.1f);
      ob = random.normals(o.n, 0.1f);
      ub = random.normals(up.n, 0.1f);
      db = random.normals(down.n, 0.1f);
      layer.attention_norm.kind = layer.mlp_norm.kind = NormKind::layer;
      layer.attention_norm.bias = bias1.data();
      layer.mlp_norm.bias = bias2.data();
      layer.q.bias = qb.data();
      layer.k.bias = kb.data();
      layer.v.bias = vb.data();
      layer.o.bias = ob.data();
      layer.up.bias = ub.data();
      layer.down.bias = db.data();
      layer.activation = s.activation;
    }
    if (s.attention_biases) {
      qb = random.normals(q.n, 0.5f);
      kb = random.normals(k.n, 0.5f);
      vb = random.normals(v.n, 0.5f);
      layer.q.bias = qb.data();
      layer.k.bias = kb.data();
      layer.v.bias = vb.data();
    }
    if (s.head_norms) {
      qn = near_one(s.head_size);
      kn = near_one(s.head_size);
      layer.q_norm = {NormKind::rms, qn.data(), nullptr, 1e-2f};
      layer.k_norm = {NormKind::rms, kn.data(), nullptr, 1e-3f};
    }
  }
};

struct Cache {
  std::vector<float> key, value;
  std::vector<int32_t> table, lengths, positions;
  int32_t used = 0;
  KvCache view;
  Cache(const Shape& s, int64_t sequences) {
    const int64_t max_blocks = 16, block = 4, blocks = sequences * max_blocks;
    key = poisoned(blocks * s.kv_heads * block * s.head_size);
    value = key;
    table.assign(static_cast<size_t>(blocks), -1);
    lengths.assign(static_cast<size_t>(sequences), 0);
    positions.assign(static_cast<size_t>(blocks * block), 0);
    view.key = key.data();
    view.value = value.data();
    view.blocks = blocks;
    view.block_size = block;
    view.kv_heads = s.kv_heads;
    view.head_size = s.head_size;
    view.block_table = table.data();
    view.max_blocks = max_blocks;
    view.sequences = sequences;
    view.lengths = lengths.data();
    view.positions = positions.data();
    view.blocks_used = &used;
  }
};

bool run_layer(const Variant& variant, const Model& model, const Rows& rows, KvCache& cache, Workspace& work) {
  if (!variant.kernels->attention_input(model.layer, rows, cache, work)) return false;
  variant.kernels->attention(model.layer, rows, cache, work, nullptr);
  variant.kernels->attention_output(model.layer, rows, work);
  variant.kernels->mlp_input(model.layer, rows, work);
  variant.kernels->mlp_output(model.layer, rows, work);
  return true;
}

using Row = std::vector<double>;

Row norm(const Norm& n, const Row& x) {
  double mean = 0, squares = 0;
  if (n.kind == NormKind::layer) {
    for (double v : x) mean += v / double(x.size());
  }
  for (double v : x) squares += (v - mean) * (v - mean) / double(x.size());
  Row y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    y[i] = (x[i] - mean) / std::sqrt(squares + double(n.eps)) * n.weight[i] + (n.bias ? n.bias[i] : 0);
  }
  return y;
}

// x as its INT8 form says it.
Row quantized(const Row& x, int64_t group) {
  Row out(x.size());
  for (size_t start = 0; start < x.size(); start += static_cast<size_t>(group)) {
    const size_t end = std::min(x.size(), start + static_cast<size_t>(group));
    float largest = 0;
    for (size_t i = start; i < end; ++i) largest = std::max(largest, std::fabs(static_cast<float>(x[i])));
    const double scale = double(rounded_magnitude(largest)) / 127;
    for (size_t i = start; i < end && scale > 0; ++i) out[i] = scale * std::nearbyint(x[i] / scale);
  }
  return out;
}

Row linear(const Weight& w, const float* bias, const Row& input, bool eight) {
  const Row x = quantized(input, w.group);
  const int64_t groups = (w.k + w.group - 1) / w.group;
  Row y(static_cast<size_t>(w.n));
  for (int64_t n = 0; n < w.n; ++n) {
    double acc = bias ? bias[n] : 0;
    for (int64_t k = 0; k < w.k; ++k) {
      const int u = w.codes[static_cast<size_t>(n * w.k + k)];
      const auto group = static_cast<size_t>(n * groups + k / w.group);
      const double steps = (u >> 4) + (eight ? ((u & 15) - 8) / 8.0 : 0.0);
      acc += x[static_cast<size_t>(k)] * (steps * double(w.scale_of[group]) + double(w.offset_of[group]));
    }
    y[static_cast<size_t>(n)] = acc;
  }
  return y;
}

void normalize_heads(const Norm& n, Row& x, int64_t size) {
  for (auto head = x.begin(); n.weight && head < x.end(); head += size) {
    const Row normed = norm(n, Row(head, head + size));
    std::copy(normed.begin(), normed.end(), head);
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::relu:
      return x < 0 ? 0 : x;
    default:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
}

void turn(const Model& m, Row& x, int64_t position) {
  if (!m.layer.cosine) return;
  const int64_t size = m.shape.head_size, half = size / 2;
  for (int64_t h = 0; h < static_cast<int64_t>(x.size()) / size; ++h) {
    for (int64_t i = 0; i < half; ++i) {
      double &a = x[static_cast<size_t>(h * size + i)], &b = x[static_cast<size_t>(h * size + half + i)];
      const double c = m.cosine[static_cast<size_t>(position * half + i)],
                   s = m.sine[static_cast<size_t>(position * half + i)];
      const double low = a * c - b * s;
      b = b * c + a * s;
      a = low;
    }
  }
}

// One sequence of `count` tokens, all of them active.
std::vector<double> layer_by_definition(const Model& m, const std::vector<float>& hidden, int64_t count,
                                        const int32_t* bits) {
  const Shape& s = m.shape;
  std::vector<double> out;
  std::vector<Row> keys, values;
  for (int64_t t = 0; t < count; ++t) {
    const bool eight = !bits || bits[t] == 8;
    Row x(hidden.begin() + t * s.d, hidden.begin() + (t + 1) * s.d);
    const Row normed = norm(m.layer.attention_norm, x);
    Row query = linear(m.q, m.layer.q.bias, normed, eight);
    keys.push_back(linear(m.k, m.layer.k.bias, normed, eight));
    values.push_back(linear(m.v, m.layer.v.bias, normed, eight));
    normalize_heads(m.layer.q_norm, query, s.head_size);
    normalize_heads(m.layer.k_norm, keys.back(), s.head_size);
    turn(m, query, t);
    turn(m, keys.back(), t);
    Row attended(static_cast<size_t>(s.heads * s.head_size), 0.0);
    for (int64_t h = 0; h < s.heads; ++h) {
      const size_t kv = static_cast<size_t>(h / (s.heads / s.kv_heads) * s.head_size),
                   at = static_cast<size_t>(h * s.head_size);
      Row p;
      double z = 0;
      for (const Row& key : keys) {
        double dot = 0;
        for (size_t i = 0; i < static_cast<size_t>(s.head_size); ++i) dot += query[at + i] * key[kv + i];
        p.push_back(std::exp(dot * double(m.layer.attention_scale)));
        z += p.back();
      }
      for (size_t j = 0; j < p.size(); ++j) {
        for (size_t i = 0; i < static_cast<size_t>(s.head_size); ++i) attended[at + i] += p[j] / z * values[j][kv + i];
      }
    }
    const Row o = linear(m.o, m.layer.o.bias, attended, eight);
    for (size_t i = 0; i < x.size(); ++i) x[i] += o[i];
    const Row normed2 = norm(m.layer.mlp_norm, x);
    Row up = linear(m.up, m.layer.up.bias, normed2, eight);
    if (s.llama) {
      const Row gate = linear(m.gate, nullptr, normed2, eight);
      for (size_t i = 0; i < up.size(); ++i) up[i] *= gate[i] / (1 + std::exp(-gate[i]));
    } else {
      for (double& v : up) v = activated(s.activation, v);
    }
    const Row down = linear(m.down, m.layer.down.bias, up, eight);
    for (size_t i = 0; i < x.size(); ++i) out.push_back(x[i] + down[i]);
  }
  return out;
}

// A decode step against its parts, without mechanisms: two layers, two sequences.
void test_step(const Variant& variant, const Model& model, Random& random, const std::string& name) {
  const int64_t d = model.layer.d, vocab = model.head.n, count = 2;
  const std::vector<uint16_t> embedding = [&] {
    std::vector<uint16_t> table;
    for (float x : random.normals(5 * d)) table.push_back(float_to_half(x));
    return table;
  }();
  const std::vector<float> places = random.normals(4 * d);
  const int64_t ids[] = {4, 1};
  const int32_t positions[] = {0, 0}, sequence[] = {1, 0};
  std::vector<float> want;
  for (int64_t id : ids) {
    for (int64_t k = 0; k < d; ++k) {
      want.push_back(half_to_float(embedding[static_cast<size_t>(id * d + k)]) + places[static_cast<size_t>(k)]);
    }
  }
  Rows rows;
  rows.hidden = want.data();
  rows.rows = rows.count = count;
  rows.positions = positions;
  rows.sequence = sequence;
  Workspace work;
  Cache first(model.shape, 2), second(model.shape, 2), again(model.shape, 2), more(model.shape, 2);
  run_layer(variant, model, rows, first.view, work);
  run_layer(variant, model, rows, second.view, work);
  Linear head;
  head.weight = model.head.view();
  std::vector<float> want_logits = poisoned(count * vocab);
  variant.kernels->lm_head(model.layer.mlp_norm, head, rows, d, want_logits.data(), vocab, work);

  const Layer* const layers[] = {&model.layer, &model.layer};
  KvCache* const caches[] = {&again.view, &more.view};
  std::vector<float> hidden = poisoned(count * d), logits = poisoned(count * vocab);
  int32_t active[2], depth[2];
  DecodeStep step;
  step.layers = layers;
  step.caches = caches;
  step.layer_count = 2;
  step.embedding = embedding.data();
  step.position_embedding = places.data();
  step.final_norm = model.layer.mlp_norm;
  step.head = head;
  step.count = count;
  step.ids = ids;
  step.positions = positions;
  step.sequence = sequence;
  step.hidden = hidden.data();
  step.active = active;
  step.depth = depth;
  step.logits = logits.data();
  report(variant.kernels->decode_step(step, work) && depth[0] == 2 && depth[1] == 2, name + ": step");
  report(same(hidden, want) && same(logits, want_logits), name + ": step's rows");

  // With decisions that change nothing: what they measure is noted where it belongs, and costs no bits.
  Cache third(model.shape, 2), fourth(model.shape, 2);
  KvCache* const others[] = {&third.view, &fourth.view};
  const StepHalting halting{0.0f, true, true, 100.0f, 0, 1};
  const StepAmq amq{0, 0.0f, 1.0f};
  std::vector<float> drift(2 * count, 5.0f), entropy = drift, want_drift = poisoned(2 * count);
  std::vector<float> want_entropy = want_drift, first_hidden;
  int32_t bits[2];
  step.caches = others;
  step.halting = &halting;
  step.amq = &amq;
  step.bits = bits;
  step.drift = drift.data();
  step.entropy = entropy.data();
  report(variant.kernels->decode_step(step, work) && same(logits, want_logits) && depth[1] == 2,
         name + ": noting step");
  std::vector<float> before;
  for (int64_t id : ids) {
    for (int64_t k = 0; k < d; ++k) {
      before.push_back(half_to_float(embedding[static_cast<size_t>(id * d + k)]) + places[static_cast<size_t>(k)]);
    }
  }
  variant.kernels->softmax_entropy(before.data(), d, nullptr, count, d, want_entropy.data());
  Cache alone(model.shape, 2);
  std::vector<float> after = before;
  rows.hidden = after.data();
  run_layer(variant, model, rows, alone.view, work);
  variant.kernels->softmax_entropy(after.data(), d, nullptr, count, d, want_entropy.data() + count);
  for (int64_t i = 0; i < count; ++i) {
    double step_squares = 0, before_squares = 0;
    for (int64_t k = i * d; k < (i + 1) * d; ++k) {
      const double x = after[static_cast<size_t>(k)], y = before[static_cast<size_t>(k)];
      step_squares += (x - y) * (x - y);
      before_squares += y * y;
    }
    const double want_of_row = std::sqrt(step_squares / before_squares);
    report(std::fabs(drift[static_cast<size_t>(i)] - want_of_row) < 1e-5 * want_of_row, name + ": noted drift");
    report(std::isnan(drift[static_cast<size_t>(count + i)]), name + ": drift where nobody is judged");
  }
  report(same(entropy, want_entropy), name + ": noted entropy");
  // A row that halts is noted once; what comes after it goes to its own row.
  const StepHalting sink{1e9f, true, false, 0, 1, 1};
  const int32_t later[] = {0, 1};
  step.halting = &sink;
  step.amq = nullptr;
  step.positions = later;
  const Layer* const three[] = {&model.layer, &model.layer, &model.layer};
  Cache fifth(model.shape, 2), sixth(model.shape, 2), seventh(model.shape, 2);
  KvCache* const three_caches[] = {&fifth.view, &sixth.view, &seventh.view};
  step.layers = three;
  step.caches = three_caches;
  step.layer_count = 3;
  drift.assign(3 * count, 5.0f);
  entropy.assign(3 * count, 5.0f);
  step.drift = drift.data();
  step.entropy = entropy.data();
  report(variant.kernels->decode_step(step, work) && depth[0] == 3 && depth[1] == 1, name + ": one row halts");
  report(!std::isnan(drift[0]) && !std::isnan(drift[1]) && !std::isnan(drift[2]) && std::isnan(drift[3]) &&
             std::isnan(drift[4]) && std::isnan(drift[5]),
         name + ": drift of the rows that were judged");
  step.layers = layers;
  step.caches = caches;
  step.layer_count = 2;
  step.positions = positions;
  step.halting = nullptr;
  step.drift = step.entropy = nullptr;
  more.view.max_blocks = 0;
  report(!variant.kernels->decode_step(step, work), name + ": step into a full cache");
}

void test_shape(const Variant& variant, const Shape& shape) {
  Random random(11);
  const std::string name = variant.name + " layer " + shape.name;
  Model model(random, shape);
  const int64_t count = 21;
  const std::vector<float> start = random.normals(count * shape.d);
  std::vector<int32_t> positions(count), sequence(count, 0), active(count), bits(count);
  for (int32_t i = 0; i < count; ++i) {
    positions[static_cast<size_t>(i)] = active[static_cast<size_t>(i)] = i;
    bits[static_cast<size_t>(i)] = random.integer(0, 1) ? 8 : 4;
  }
  Rows rows;
  rows.rows = rows.count = count;
  rows.active = active.data();
  rows.positions = positions.data();
  rows.sequence = sequence.data();

  {
    for (const int32_t* used_bits : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(bits.data())}) {
      std::vector<float> hidden = start;
      rows.hidden = hidden.data();
      rows.bits = used_bits;
      Cache cache(shape, 1);
      Workspace work;
      set_threads(2);
      report(run_layer(variant, model, rows, cache.view, work), name + ": runs");
      const std::vector<double> want = layer_by_definition(model, start, count, used_bits);
      const double e = error(hidden, want);
      report(e < 2e-3, name + ": error " + std::to_string(e));
      report(same(work.previous, start.data(), count * shape.d), name + ": previous");
      compare_with_others(variant, name.substr(variant.name.size()) + (used_bits ? "mixed" : ""), hidden, true);

      // Token by token.
      std::vector<float> stepped = start;
      Cache step_cache(shape, 1);
      Workspace step_work;
      Rows step = rows;
      step.hidden = stepped.data();
      step.count = 1;
      for (int64_t t = 0; t < count; ++t) {
        step.active = active.data() + t;
        run_layer(variant, model, step, step_cache.view, step_work);
      }
      report(same(hidden, stepped), name + ": step by step");
      report(same(cache.key, step_cache.key) && same(cache.value, step_cache.value), name + ": cache step by step");
    }
  }

  // Among others: rows of a second sequence in between, and rows that don't take part.
  std::vector<float> mixed(static_cast<size_t>(3 * count * shape.d), 3.0f);
  std::vector<int32_t> mixed_positions, mixed_sequence, mixed_active, mixed_bits;
  for (int32_t i = 0; i < 3 * count; ++i) {
    const int32_t t = i / 3;
    mixed_positions.push_back(t);
    mixed_sequence.push_back(i % 3 == 1 ? 1 : 0);
    mixed_bits.push_back(bits[static_cast<size_t>(t)]);
    if (i % 3 != 2) mixed_active.push_back(i);
    if (i % 3 == 1)
      std::copy(start.begin() + t * shape.d, start.begin() + (t + 1) * shape.d, mixed.begin() + i * shape.d);
  }
  Rows among{mixed.data(),          3 * count,        mixed_active.data(), 2 * count, mixed_positions.data(),
             mixed_sequence.data(), mixed_bits.data()};
  Cache among_cache(shape, 2);
  Workspace work;
  set_threads(3);
  run_layer(variant, model, among, among_cache.view, work);
  std::vector<float> alone = start;
  rows.hidden = alone.data();
  rows.bits = bits.data();
  Cache alone_cache(shape, 1);
  run_layer(variant, model, rows, alone_cache.view, work);
  bool equal = true, untouched = true;
  for (int64_t t = 0; t < count; ++t) {
    equal &= same(mixed.data() + (3 * t + 1) * shape.d, alone.data() + t * shape.d, shape.d);
    for (int64_t k = 0; k < shape.d; ++k) untouched &= mixed[static_cast<size_t>((3 * t + 2) * shape.d + k)] == 3.0f;
  }
  report(equal, name + ": among others");
  report(untouched, name + ": rows that take no part");

  // The K/V part alone leaves the same entries.
  std::vector<float> kept = start;
  rows.hidden = kept.data();
  Cache written(shape, 1);
  report(variant.kernels->write_kv(model.layer, rows, written.view, work), name + ": write_kv");
  report(same(written.key, alone_cache.key) && same(written.value, alone_cache.value) && kept == start,
         name + ": write_kv entries");

  // Layers in one call: as one after the other, and as many as there is room for.
  std::vector<float> once = start, twice = start;
  rows.hidden = twice.data();
  Cache first(shape, 1), second(shape, 1), again(shape, 1), more(shape, 1);
  run_layer(variant, model, rows, first.view, work);
  run_layer(variant, model, rows, second.view, work);
  rows.hidden = once.data();
  const Layer* const layers[] = {&model.layer, &model.layer};
  KvCache* const caches[] = {&again.view, &more.view};
  report(variant.kernels->run_layers(layers, caches, 2, rows, work) == 2, name + ": run_layers");
  report(same(once, twice) && same(more.key, second.key) && same(more.value, second.value),
         name + ": run_layers' rows");
  again.view.lengths[0] = 0;
  again.view.blocks_used[0] = 0;
  more.view.max_blocks = 0;
  report(variant.kernels->run_layers(layers, caches, 2, rows, work) == 1, name + ": run_layers into a full cache");
  rows.hidden = kept.data();

  test_step(variant, model, random, name);

  // A key or value beyond the range of an f16 cache.
  for (Linear* linear : {&model.layer.k, &model.layer.v}) {
    std::vector<float> large(static_cast<size_t>(linear->weight.n), 0.0f);
    const float* const bias = linear->bias;
    linear->bias = large.data();
    for (bool beyond : {false, true}) {
      large[large.size() / 2] = beyond ? 3e5f : 1e4f;
      Cache half(shape, 1);
      half.view.type = KvType::f16;
      int32_t overflow = 0;
      half.view.overflow = &overflow;
      variant.kernels->write_kv(model.layer, rows, half.view, work);
      // A norm over the head brings it back.
      const bool told = beyond && !(linear == &model.layer.k && shape.head_norms);
      report(overflow == told, name + ": overflow of f16");
    }
    linear->bias = bias;
  }

  // Head, with the final norm.
  for (int64_t n : {int64_t(1), count}) {
    Rows some = rows;
    some.count = n;
    std::vector<float> logits = poisoned(n * 110);
    Linear head;
    head.weight = model.head.view();
    variant.kernels->lm_head(model.layer.mlp_norm, head, some, shape.d, logits.data(), 110, work);
    double worst = 0;
    for (int64_t t = 0; t < n; ++t) {
      const Row want =
          linear(model.head, nullptr,
                 norm(model.layer.mlp_norm, Row(start.begin() + t * shape.d, start.begin() + (t + 1) * shape.d)), true);
      worst =
          std::max(worst, error(std::vector<float>(logits.begin() + t * 110, logits.begin() + t * 110 + 101), want));
      report(std::isnan(logits[static_cast<size_t>(t * 110 + 101)]), name + ": head writes past its columns");
    }
    report(worst < 1e-4, name + ": head");
  }
  rows.count = 0;
  report(run_layer(variant, model, rows, written.view, work), name + ": no rows");
}

}  // namespace

// The activations alone against double precision, in units of the last place.
void test_activations() {
  Random random(5);
  std::vector<float> x = random.normals(20000);
  for (int i = 0; i <= 26000; ++i) x.push_back(-13 + 1e-3f * static_cast<float>(i));
  for (float v : random.normals(2000, 1e-4f)) x.push_back(v);
  for (float v : {0.0f, -0.0f, 20.0f, 1e30f, INFINITY, -20.0f, -1e30f}) x.push_back(v);
  while (x.size() % 16) x.push_back(0);
  double worst = 0;
  for (size_t i = 0; i < x.size(); i += 16) {
    float got[16];
    plain::store(got, plain::ErfGeluSource{x.data()}(static_cast<int64_t>(i), 16));
    for (size_t j = 0; j < 16; ++j) {
      const double v = x[i + j], want = activated(Activation::gelu, v);
      if (std::isinf(want)) {
        report(got[j] == x[i + j], "gelu of infinity");
      } else if (std::fabs(want) < 0x1p-126) {
        report(std::fabs(got[j]) < 0x1p-126, "gelu far down");
      } else {
        worst = std::max(worst, std::fabs(got[j] - want) / std::ldexp(1.0, std::ilogb(want) - 23));
      }
    }
  }
  report(worst < 6, "gelu: " + std::to_string(worst) + " units in the last place");
  const float odd[16] = {NAN, -INFINITY};
  float got[16];
  plain::store(got, plain::ErfGeluSource{odd}(0, 2));
  report(std::isnan(got[0]) && std::isnan(got[1]) && got[2] == 0, "gelu of NaN and -Inf");
  const float some[16] = {NAN, -INFINITY, INFINITY, -1, 0, 2};
  plain::store(got, plain::ReluSource{some}(0, 6));
  report(std::isnan(got[0]) && got[1] == 0 && std::isinf(got[2]) && got[3] == 0 && got[4] == 0 && got[5] == 2, "relu");
}

void test_layer(const Variant& variant) {
  test_activations();
  test_shape(variant, {"llama", 64, 6, 2, 16, 96, true, 32});
  test_shape(variant, {"llama odd", 84, 3, 1, 28, 101, true, 64});
  test_shape(variant, {"gpt2", 96, 4, 4, 24, 200, false, 128});
  test_shape(variant, {"gelu", 64, 2, 2, 32, 100, false, 64, Activation::gelu});
  test_shape(variant, {"relu", 64, 2, 2, 32, 100, false, 64, Activation::relu});
  test_shape(variant, {"qwen2", 72, 4, 2, 20, 90, true, 32, {}, false, true});
  test_shape(variant, {"qwen3", 80, 5, 1, 40, 96, true, 64, {}, true, false});
  test_shape(variant, {"wide heads", 48, 2, 1, 272, 64, true, 32, {}, true, true});
}

}  // namespace check
