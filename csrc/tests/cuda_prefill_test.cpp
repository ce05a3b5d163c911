// The CUDA kernels for many rows, emulated, against the CPU's: quantization and GEMMs to the bit, stages of whole
// layers within the rounding of their norms and activations.
#include <algorithm>
#include <memory>

#include "cuda_check.h"
#include "cuda_model.h"
#include "matryoshka_prefill.cuh"

namespace {

using namespace quicksilver;
namespace gpu = quicksilver::QS_CUDA;
using check::kGarbage;
using check::Model;
using check::OwnedRows;
using check::poisoned;
using check::Random;
using check::report;
using check::same;
using check::Shape;
using check::Weight;

QuantizedRows first_rows(QuantizedRows all, int64_t count) {
  all.rows = count;
  return all;
}

std::vector<int32_t> random_bits(Random& random, int64_t count) {
  std::vector<int32_t> bits(static_cast<size_t>(count));
  for (int32_t& b : bits) b = random.integer(0, 1) ? 8 : 4;
  return bits;
}

// --- quantization ----------------------------------------------------------------------------------------------------

struct QuantizeCase {
  int64_t rows, count, k;
  int group;
};

void test_quantize(const QuantizeCase& c, uint32_t seed) {
  Random random(seed);
  const std::string name =
      "quantize_rows T" + std::to_string(c.rows) + " K" + std::to_string(c.k) + " g" + std::to_string(c.group);
  const int64_t stride = c.k + random.integer(0, 5);
  std::vector<float> x = random.normals((c.rows + 3) * stride);
  for (size_t i = 0; i < x.size(); i += 97) x[i] *= 1e30f;
  for (size_t i = 5; i < x.size(); i += 211) x[i] = std::nanf("");
  for (size_t i = 9; i < x.size(); i += 401) x[i] = -INFINITY;
  for (int64_t k = 0; k < c.k; ++k) x[static_cast<size_t>(k)] = k % 3 == 0 ? 0.0f : 1e-39f;
  for (int64_t k = 0; k < c.k; ++k) x[static_cast<size_t>(stride + k)] = 0.0f;
  std::vector<int32_t> index(static_cast<size_t>(c.rows), kGarbage);
  for (int64_t i = 0; i < c.count; ++i) {
    index[static_cast<size_t>(i)] = i < 2 ? static_cast<int32_t>(i) : random.integer(0, static_cast<int>(c.rows) + 2);
  }
  const int32_t count = static_cast<int32_t>(c.count);
  const bool indexed = seed % 3 != 0;

  OwnedRows want(c.rows, c.k, c.group);
  quicksilver::quantize_rows(x.data(), stride, indexed ? index.data() : nullptr, first_rows(want.rows, count));
  check::schedules(name, [&] {
    OwnedRows got(c.rows, c.k, c.group);
    gpu::quantize_rows(x.data(), stride, indexed ? index.data() : nullptr, got.rows,
                       c.count == c.rows ? nullptr : &count, nullptr);
    // Garbage where nothing was to be written is compared too.
    const size_t bytes = static_cast<size_t>(c.rows * want.rows.k_padded);
    const int64_t groups = c.rows * want.rows.groups;
    report(std::memcmp(want.rows.q, got.rows.q, bytes) == 0, name + ": q");
    report(std::memcmp(want.rows.sum, got.rows.sum, static_cast<size_t>(groups) * 4) == 0, name + ": sum");
    report(same(want.rows.scale, got.rows.scale, groups), name + ": scale");
  });
}

// --- GEMM ------------------------------------------------------------------------------------------------------------

enum class Bits { eight, four, mixed, no_low_plane };

struct GemmCase {
  int64_t rows, count, n, k;
  int group;
  Bits bits;
  bool extras;  // bias, residual in place, out_index
};

void test_gemm(const GemmCase& c, uint32_t seed) {
  Random random(seed);
  const std::string name = "gemm T" + std::to_string(c.count) + " of " + std::to_string(c.rows) + " N" +
                           std::to_string(c.n) + " K" + std::to_string(c.k) + " g" + std::to_string(c.group) +
                           " bits " + std::to_string(static_cast<int>(c.bits));
  const Weight w = check::random_weight(random, c.n, c.k, c.group);
  std::vector<float> x = random.normals(c.count * c.k);
  for (size_t i = 5; i < x.size(); i += 911) x[i] = i % 2 ? std::nanf("") : -INFINITY;
  OwnedRows q(c.rows, c.k, c.group);
  quicksilver::quantize_rows(x.data(), c.k, nullptr, first_rows(q.rows, c.count));

  std::vector<int32_t> bits =
      c.bits == Bits::mixed ? random_bits(random, c.rows) : std::vector<int32_t>(static_cast<size_t>(c.rows), 4);
  std::vector<int32_t> out_index(static_cast<size_t>(c.rows), kGarbage);
  for (int32_t i = 0; i < c.count; ++i) out_index[static_cast<size_t>(i)] = 2 * i + 1;
  std::fill(bits.begin() + c.count, bits.end(), 8);  // rows that don't exist ask for no plane
  const std::vector<float> bias = random.normals(c.n);
  const int64_t y_stride = c.n + random.integer(0, 3), y_size = (2 * c.count + 1) * y_stride;

  MatryoshkaGemm p;
  p.x = q.rows;
  p.w = w.view(c.bits != Bits::no_low_plane);
  if (c.bits == Bits::mixed || c.bits == Bits::four) p.bits = bits.data();
  p.y_stride = y_stride;
  const std::vector<float> before = c.extras ? random.normals(y_size) : poisoned(y_size);
  std::vector<float> want = before, got;
  const auto run = [&](std::vector<float>& y, const auto& gemm) {
    y = before;
    p.y = y.data();
    if (c.extras) {
      p.bias = bias.data();
      p.residual = y.data();
      p.out_index = out_index.data();
    }
    gemm();
  };
  p.x = first_rows(q.rows, c.count);
  run(want, [&] { quicksilver::matryoshka_gemm(p); });
  p.x = q.rows;
  const int32_t count = static_cast<int32_t>(c.count);
  check::schedules(name, [&] {
    run(got, [&] { gpu::matryoshka_gemm(p, c.count == c.rows ? nullptr : &count, nullptr); });
    report(same(want, got), name);
  });
}

void test_gemms() {
  uint32_t seed = 100;
  for (const GemmCase& c : {
           GemmCase{33, 33, 16, 32, 32, Bits::eight, false},
           GemmCase{33, 33, 40, 64, 64, Bits::four, true},
           GemmCase{70, 70, 33, 72, 32, Bits::mixed, true},
           GemmCase{129, 129, 37, 200, 64, Bits::mixed, false},
           GemmCase{40, 40, 50, 136, 128, Bits::mixed, true},
           GemmCase{40, 40, 31, 320, 128, Bits::no_low_plane, true},
           GemmCase{70, 41, 100, 101, 64, Bits::mixed, true},
           GemmCase{33, 33, 16, 32, 32, Bits::eight, true},
           GemmCase{70, 70, 47, 205, 32, Bits::mixed, false},
           GemmCase{129, 100, 33, 131, 64, Bits::mixed, true},
           GemmCase{40, 40, 65, 300, 128, Bits::four, true},
           GemmCase{64, 0, 40, 64, 64, Bits::eight, false},
           // bounds that ask for the large tiles
           GemmCase{128 * 64, 40, 250, 70, 32, Bits::mixed, true},
           GemmCase{128 * 64, 70, 250, 200, 64, Bits::eight, true},
           GemmCase{256 * 64, 130, 100, 320, 128, Bits::mixed, false},
           GemmCase{256 * 64, 40, 97, 120, 32, Bits::mixed, true},
           GemmCase{256 * 64, 41, 128, 200, 64, Bits::four, false},
           GemmCase{128 * 64, 65, 130, 260, 128, Bits::mixed, true},
       }) {
    test_gemm(c, ++seed);
  }
}

// Several products of the same rows in one launch, with bits that are indexed by row of a batch.
void test_products(int64_t bound, uint32_t seed) {
  Random random(seed);
  constexpr int64_t kCount = 40, kK = 100;
  const std::string name = "products of at most " + std::to_string(bound) + " rows";
  const Weight weights[] = {check::random_weight(random, 140, kK, 64), check::random_weight(random, 20, kK, 64),
                            check::random_weight(random, 33, kK, 64)};
  const std::vector<float> x = random.normals(kCount * kK);
  OwnedRows q(bound, kK, 64);
  quicksilver::quantize_rows(x.data(), kK, nullptr, first_rows(q.rows, kCount));
  const std::vector<int32_t> bits = random_bits(random, 3 * kCount);
  std::vector<int32_t> index(static_cast<size_t>(bound), kGarbage), compact_bits;
  for (int32_t i = 0; i < kCount; ++i) {
    index[static_cast<size_t>(i)] = 3 * i + 1;
    compact_bits.push_back(bits[static_cast<size_t>(3 * i + 1)]);
  }

  std::vector<float> want[3], got[3];
  gpu::PrefillGemm gemm;
  gemm.bits_index = index.data();
  for (const Weight& w : weights) {
    want[gemm.count] = got[gemm.count] = poisoned(kCount * w.n);
    MatryoshkaGemm& p = gemm.products[gemm.count];
    p.x = first_rows(q.rows, kCount);
    p.w = w.view();
    p.bits = compact_bits.data();
    p.y = want[gemm.count].data();
    p.y_stride = w.n;
    quicksilver::matryoshka_gemm(p);
    p.x = q.rows;
    p.bits = bits.data();
    p.y = got[gemm.count].data();
    ++gemm.count;
  }
  const int32_t count = kCount;
  gpu::prefill_gemm(gemm, &count, nullptr);
  for (int i = 0; i < 3; ++i) report(same(want[i], got[i]), name + ": product " + std::to_string(i));
}

// --- stages ----------------------------------------------------------------------------------------------------------

struct Cache {
  std::vector<char> key, value;
  std::vector<float> key_scale, value_scale;
  std::vector<int32_t> table, lengths, positions;
  int32_t used = 0;
  KvCache view;
  explicit Cache(const Shape& s) {
    constexpr int64_t kSequences = 2, kMaxBlocks = 16, kBlock = 4, kBlocks = kSequences * kMaxBlocks;
    const int64_t width = s.type == KvType::f32 ? 4 : s.type == KvType::i8 ? 1 : 2;
    key.assign(static_cast<size_t>(kBlocks * s.kv_heads * kBlock * s.head_size * width), char(0x7f));
    value = key;
    key_scale = value_scale = poisoned(kBlocks * s.kv_heads * kBlock);
    table.assign(static_cast<size_t>(kBlocks), -1);
    lengths.assign(static_cast<size_t>(kSequences), 0);
    positions.assign(static_cast<size_t>(kBlocks * kBlock), 0);
    view.key = key.data();
    view.value = value.data();
    view.key_scale = key_scale.data();
    view.value_scale = value_scale.data();
    view.type = s.type;
    view.blocks = kBlocks;
    view.block_size = kBlock;
    view.kv_heads = s.kv_heads;
    view.head_size = s.head_size;
    view.block_table = table.data();
    view.max_blocks = kMaxBlocks;
    view.sequences = kSequences;
    view.lengths = lengths.data();
    view.positions = positions.data();
    view.blocks_used = &used;
  }
  bool operator==(const Cache& other) const {
    return key == other.key && value == other.value && same(key_scale, other.key_scale) &&
           same(value_scale, other.value_scale) && table == other.table && lengths == other.lengths &&
           positions == other.positions && used == other.used;
  }
};

struct DeviceMemory {
  std::vector<char> memory;
  gpu::DeviceWorkspace work;
  DeviceMemory(const Layer& layer, int64_t rows, const KvCache& cache) {
    const int64_t entries = cache.max_blocks * cache.block_size;
    memory = check::zeroed(gpu::workspace_bytes(layer, rows, cache.sequences, entries) + 128);
    void* start = memory.data();
    size_t space = memory.size();
    work = gpu::carve_workspace(std::align(128, 1, start, space), layer, rows, cache.sequences, entries);
  }
};

// Rows of two sequences, of which all but every seventh take part.
struct Batch {
  static constexpr int64_t kRows = 60;
  std::vector<float> hidden;
  std::vector<int32_t> active, positions, sequence, bits;
  Batch(Random& random, int64_t d) : hidden(random.normals(kRows * d)), bits(random_bits(random, kRows)) {
    for (int32_t i = 0; i < kRows; ++i) {
      positions.push_back(i / 2);
      sequence.push_back(i % 2);
      if (i % 7 != 3) active.push_back(i);
    }
  }
  int64_t count() const { return static_cast<int64_t>(active.size()); }
  Rows rows(std::vector<float>& h, const int32_t* list, int64_t n) const {
    return {h.data(), kRows, list, n, positions.data(), sequence.data(), bits.data()};
  }
};

struct Result {
  std::vector<float> hidden, previous, logits, drift;
  std::vector<int32_t> depth, active;
  std::vector<uint8_t> halted;
  Cache cache;
  explicit Result(const Shape& s) : depth(Batch::kRows, 5), halted(Batch::kRows, 0), cache(s) {}
};

struct Rule {
  float drift = 0, entropy = 0;
};

// The CPU's layer, and then the head and the decision to halt.
Result on_cpu(const Model& m, const Batch& batch, const Rule& rule) {
  Result r(m.shape);
  r.hidden = batch.hidden;
  const int64_t n = batch.count();
  const Rows rows = batch.rows(r.hidden, batch.active.data(), n);
  Workspace work;
  report(quicksilver::attention_input(m.layer, rows, r.cache.view, work), "room in the cache");
  quicksilver::attention(m.layer, rows, r.cache.view, work);
  quicksilver::attention_output(m.layer, rows, work);
  quicksilver::mlp_input(m.layer, rows, work);
  quicksilver::mlp_output(m.layer, rows, work);
  r.previous.assign(work.previous, work.previous + n * m.layer.d);
  r.logits = poisoned(n * 103);
  quicksilver::lm_head(m.layer.mlp_norm, m.head, rows, m.layer.d, r.logits.data(), 103, work);
  for (const int32_t row : batch.active) r.depth[static_cast<size_t>(row)] += 1;

  std::vector<float> entropy(static_cast<size_t>(n));
  quicksilver::softmax_entropy(r.hidden.data(), m.layer.d, batch.active.data(), n, m.layer.d, entropy.data());
  r.drift = poisoned(n);
  r.active = batch.active;
  HaltingUpdate update;
  update.hidden = r.hidden.data();
  update.previous = r.previous.data();
  update.stride = update.previous_stride = update.d = m.layer.d;
  update.active = r.active.data();
  update.count = n;
  update.previous_compact = true;
  update.entropy = rule.entropy > 0 ? entropy.data() : nullptr;
  update.positions = batch.positions.data();
  update.drift_threshold = rule.drift;
  update.entropy_threshold = rule.entropy;
  update.sink_tokens = 1;
  update.drift = r.drift.data();
  update.halted = r.halted.data();
  update.next_active = r.active.data();
  r.active.resize(static_cast<size_t>(quicksilver::halting_update(update)));
  return r;
}

// The same by emulated kernels, in launches of at most `step` rows; the bound is larger than the number of rows.
Result emulated(const Model& m, const Batch& batch, const Rule& rule, int64_t step, const std::string& name) {
  Result r(m.shape);
  r.hidden = batch.hidden;
  for (int64_t first = 0; first < batch.count(); first += step) {
    int32_t count = static_cast<int32_t>(std::min(step, batch.count() - first));
    const int64_t n = count, bound = step > gpu::kDecodeRows ? n + 5 : std::min<int64_t>(n + 2, gpu::kDecodeRows);
    std::vector<int32_t> active(batch.active.begin() + first, batch.active.begin() + first + n);
    active.resize(static_cast<size_t>(bound), kGarbage);
    const Rows rows = batch.rows(r.hidden, active.data(), bound);
    const DeviceMemory device(m.layer, bound, r.cache.view);
    const gpu::DeviceWorkspace& work = device.work;
    gpu::DeviceHalting halting;
    halting.drift_threshold = rule.drift;
    halting.tests_entropy = rule.entropy > 0;
    halting.entropy_threshold = rule.entropy;
    halting.sink_tokens = 1;
    halting.halted = r.halted.data();
    halting.active = active.data();
    halting.count = &count;

    gpu::attention_input(m.layer, rows, &count, r.cache.view, work, nullptr);
    gpu::attention(m.layer, rows, &count, r.cache.view, work, nullptr, nullptr);
    gpu::attention_output(m.layer, rows, &count, work, nullptr);
    gpu::mlp_input(m.layer, rows, &count, work, nullptr);
    gpu::mlp_output(m.layer, rows, &count, work, r.depth.data(), &halting, nullptr);
    r.previous.insert(r.previous.end(), work.previous, work.previous + n * m.layer.d);
    r.drift.insert(r.drift.end(), work.drift, work.drift + n);
    r.active.insert(r.active.end(), active.begin(), active.begin() + count);

    std::copy(batch.active.begin() + first, batch.active.begin() + first + n, active.begin());
    count = static_cast<int32_t>(n);
    std::vector<float> logits = poisoned(bound * 103);
    gpu::lm_head(m.layer.mlp_norm, m.head, rows, &count, m.layer.d, logits.data(), 103, work, nullptr);
    for (size_t i = static_cast<size_t>(n * 103); i < logits.size(); ++i) {
      report(std::isnan(logits[i]), name + ": logits of rows that don't exist");
    }
    r.logits.insert(r.logits.end(), logits.begin(), logits.begin() + n * 103);
    report(*work.full == 0, name + ": full");
    for (int64_t i = 0; i < gpu::kCounters; ++i) report(work.counters[i] == 0, name + ": counters left at zero");
  }
  return r;
}

double difference(const std::vector<float>& got, const std::vector<float>& want) {
  std::vector<float> a, b;
  for (size_t i = 0; i < want.size(); ++i) {
    report(std::isnan(got[i]) == std::isnan(want[i]), "NaN in one of two");
    if (std::isnan(want[i]) || std::isnan(got[i])) continue;
    a.push_back(got[i]);
    b.push_back(want[i]);
  }
  return check::error(a, std::vector<double>(b.begin(), b.end()));
}

void test_stages(const Shape& shape, uint32_t seed) {
  Random random(seed);
  const std::string name = std::string("layer ") + shape.name;
  Model model(random, shape, 101);
  const Batch batch(random, shape.d);

  // A drift that half of the rows stay below, far from that of any row.
  std::vector<float> drift = on_cpu(model, batch, {}).drift;
  std::sort(drift.begin(), drift.end());
  size_t middle = drift.size() / 3;
  for (size_t i = middle; i < drift.size() * 2 / 3; ++i) {
    if (drift[i + 1] - drift[i] > drift[middle + 1] - drift[middle]) middle = i;
  }
  const Rule rule{(drift[middle] + drift[middle + 1]) / 2, seed % 2 ? 100.0f : 0.0f};

  const Result want = on_cpu(model, batch, rule);
  const Result many = emulated(model, batch, rule, Batch::kRows, name);
  constexpr double tolerance = 1e-2;  // an activation that rounds to the other side
  const double of_hidden = difference(many.hidden, want.hidden), of_logits = difference(many.logits, want.logits);
  report(of_hidden < tolerance, name + ": hidden off by " + std::to_string(of_hidden));
  report(of_logits < tolerance, name + ": logits off by " + std::to_string(of_logits));
  report(difference(many.drift, want.drift) < tolerance, name + ": drift");
  report(same(many.previous, want.previous), name + ": previous");
  report(many.depth == want.depth, name + ": depth");
  report(many.halted == want.halted && many.active == want.active, name + ": halting");
  report(want.active.size() < batch.active.size() && !want.active.empty(), name + ": some halt");
  report(many.cache.table == want.cache.table && many.cache.lengths == want.cache.lengths &&
             many.cache.positions == want.cache.positions,
         name + ": entries");
  for (size_t i = 0; i < batch.hidden.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / shape.d;
    if (row % 7 == 3) report(many.hidden[i] == batch.hidden[i], name + ": rows that take no part");
  }

  for (const int64_t step : {int64_t(17), gpu::kDecodeRows - 2}) {
    const std::string steps = name + " in steps of " + std::to_string(step);
    const Result few = emulated(model, batch, rule, step, steps);
    report(same(few.hidden, many.hidden), steps + ": hidden");
    report(same(few.logits, many.logits), steps + ": logits");
    report(same(few.drift, many.drift), steps + ": drift");
    report(few.depth == many.depth && few.halted == many.halted && few.active == many.active, steps + ": halting");
    report(few.cache == many.cache, steps + ": cache");
  }

  check::schedules(name, [&] {
    const Result again = emulated(model, batch, rule, Batch::kRows, name);
    report(same(again.hidden, many.hidden) && again.cache == many.cache, name + ": the same under each schedule");
  });

  // The K/V part alone leaves the same entries.
  for (const int64_t count : {batch.count(), int64_t(20)}) {
    Cache whole(shape), part(shape);
    std::vector<float> hidden = batch.hidden;
    const Rows rows = batch.rows(hidden, batch.active.data(), count);
    const DeviceMemory device(model.layer, count, whole.view);
    gpu::attention_input(model.layer, rows, nullptr, whole.view, device.work, nullptr);
    gpu::write_kv(model.layer, rows, nullptr, part.view, device.work, nullptr);
    report(whole == part && hidden == batch.hidden, name + ": write_kv");
    // And so do slots that were given out already.
    Cache again(shape);
    Rows given = rows;
    const std::vector<int64_t> slots(device.work.slots, device.work.slots + count);
    given.slots = slots.data();
    gpu::write_kv(model.layer, given, nullptr, again.view, device.work, nullptr);
    report(again.key == whole.key && again.value == whole.value && again.used == 0, name + ": slots that are given");
  }
}

}  // namespace

void prefill_tests() {
  uint32_t seed = 1;
  for (const QuantizeCase& c :
       {QuantizeCase{5, 5, 64, 64}, QuantizeCase{7, 4, 200, 32}, QuantizeCase{3, 3, 1111, 128},
        QuantizeCase{6, 2, 4500, 64}, QuantizeCase{2, 2, 5, 32}, QuantizeCase{4, 3, 1024, 128}}) {
    test_quantize(c, seed++);
  }
  test_gemms();
  for (const int64_t bound : {int64_t(45), int64_t(256 * 64)}) test_products(bound, seed++);
  const Shape shapes[] = {{"llama", 72, 4, 2, 20, 100, true, 32, KvType::f32},
                          {"gpt2", 96, 3, 3, 32, 131, false, 64, KvType::i8},
                          {"wide heads", 128, 4, 1, 64, 160, true, 128, KvType::f16}};
  test_stages(shapes[0], seed++);
  test_stages(shapes[1], seed++);
  test_stages(shapes[2], seed++);
  test_stages({"qwen2", 72, 4, 2, 20, 100, true, 32, KvType::f32, {}, false, true}, seed++);
  test_stages({"qwen3", 80, 5, 1, 40, 90, true, 32, KvType::f16, {}, true, false}, seed++);
  test_stages({"gelu", 64, 3, 3, 24, 100, false, 64, KvType::f32, Activation::gelu}, seed++);
  test_stages({"relu", 64, 3, 3, 24, 100, false, 64, KvType::f32, Activation::relu}, seed++);
}
