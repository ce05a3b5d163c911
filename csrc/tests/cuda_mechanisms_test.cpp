// The CUDA kernels of halting, entropy, the KV cache and fusion, emulated, against the CPU's.
#include <algorithm>
#include <cstring>

#include "cuda_check.h"
#include "halting.cuh"
#include "launch.cuh"

namespace {

using namespace quicksilver;
namespace gpu = quicksilver::QS_CUDA;
#ifdef QS_EMULATED
using gpu::float2;  // CUDA's own is in no namespace
#endif
using check::all_zero;
using check::kGarbage;
using check::poisoned;
using check::Random;
using check::report;
using check::same;

// Within a few units in the last place, or both NaN.
bool close(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::fabs(a - b) <= 1e-6f * std::fabs(b);
}

// --- halting ---------------------------------------------------------------------------------------------------------

struct HaltingCase {
  int64_t rows, d;
  bool whole;  // rows 0..rows-1 take part, and no list says so
};

void test_halting(const HaltingCase& shape, uint32_t seed) {
  Random random(seed);
  const int64_t rows = shape.rows, d = shape.d, stride = d + random.integer(0, 1) * 3;
  const std::string name = "halting of " + std::to_string(rows) + " rows of " + std::to_string(d);
  const bool compact = random.integer(0, 1) == 1, with_entropy = random.integer(0, 1) == 1;
  std::vector<float> hidden = random.normals(rows * stride), previous = random.normals(rows * stride);
  std::vector<int32_t> active, positions(static_cast<size_t>(rows));
  std::vector<int8_t> overrides(static_cast<size_t>(rows));
  for (int32_t i = 0; i < rows; ++i) {
    positions[static_cast<size_t>(i)] = random.integer(0, 9);
    overrides[static_cast<size_t>(i)] = static_cast<int8_t>(random.integer(0, 5) == 0 ? random.integer(-1, 1) : 0);
    if (shape.whole || random.integer(0, 3) != 0) active.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(active.size());
  std::vector<float> entropy = random.normals(count);
  for (int64_t i = 0; i < count; ++i) {
    float* h = hidden.data() + active[static_cast<size_t>(i)] * stride;
    float* before = previous.data() + (compact ? i : active[static_cast<size_t>(i)]) * stride;
    const int kind = random.integer(0, 9);
    for (int64_t k = 0; k < d; ++k) before[k] = h[k] * (kind < 4 ? 1.01f : 2.0f);
    if (kind == 4) before[random.integer(0, static_cast<int>(d) - 1)] = std::nanf("");
    if (kind == 5) std::copy(h, h + d, before);
    if (kind == 6) std::fill(h, h + d, 0.0f), std::fill(before, before + d, 0.0f);
    if (random.integer(0, 9) == 0) entropy[static_cast<size_t>(i)] = std::nanf("");
  }

  HaltingUpdate p;
  p.hidden = hidden.data();
  p.previous = previous.data();
  p.stride = p.previous_stride = stride;
  p.d = d;
  p.previous_compact = compact;
  p.positions = positions.data();
  p.overrides = seed % 3 ? overrides.data() : nullptr;
  p.entropy = with_entropy ? entropy.data() : nullptr;
  p.drift_threshold = 0.1f;
  p.entropy_threshold = 0.5f;
  p.relative = random.integer(0, 3) != 0;
  p.sink_tokens = random.integer(0, 3);

  std::vector<float> want_drift = poisoned(count);
  const uint8_t before_it = shape.whole ? 0 : 9;  // without a list, rows that are halted already take no part
  std::vector<uint8_t> want_halted(static_cast<size_t>(rows), before_it);
  std::vector<int32_t> want = active;
  p.active = shape.whole ? nullptr : active.data();
  p.count = count;
  p.drift = want_drift.data();
  p.halted = want_halted.data();
  p.next_active = want.data();
  want.resize(static_cast<size_t>(quicksilver::halting_update(p)));

  std::vector<char> scratch = check::zeroed(gpu::halting_scratch_bytes(p));
  const bool on_device = !shape.whole;
  check::schedules(name, [&] {
    std::vector<float> drift = poisoned(rows);
    std::vector<uint8_t> halted(static_cast<size_t>(rows), before_it);
    std::vector<int32_t> next = active;
    next.resize(static_cast<size_t>(rows), kGarbage);  // past the count that the device knows
    int32_t number = on_device ? static_cast<int32_t>(count) : -1;
    HaltingUpdate q = p;
    q.active = shape.whole ? nullptr : next.data();
    q.count = rows;
    q.drift = drift.data();
    q.halted = halted.data();
    q.next_active = next.data();  // in place
    gpu::halting_update(q, on_device ? &number : nullptr, &number, scratch.data(), nullptr);
    report(number == static_cast<int32_t>(want.size()), name + ": count");
    report(std::equal(want.begin(), want.end(), next.begin()), name + ": active rows");
    report(halted == want_halted, name + ": halted");
    for (int64_t i = 0; i < rows; ++i) {
      const float x = drift[static_cast<size_t>(i)];
      report(i < count ? close(x, want_drift[static_cast<size_t>(i)]) : std::isnan(x), name + ": drift");
    }
    report(all_zero(scratch), name + ": scratch");
  });
}

// A step's last stage makes parts of 16 columns in many blocks: the drift must be that of whole rows, to the bit.
struct PartsCase {
  const float *now, *before;
  int64_t d;
  float2* parts;
  float* drift;  // [2]: of the parts, of the rows
};
QS_KERNEL void parts_kernel(PartsCase p) {
  using namespace gpu;
  const int64_t parts = (p.d + kPartColumns - 1) / kPartColumns;
  for (int64_t base = 0; base < parts; base += 2) {
    const int64_t k = base * kPartColumns + lane();
    const Squares part =
        part_of_lanes(squares_of(k < p.d ? load(p.now + k) : 0.0f, k < p.d ? load(p.before + k) : 0.0f));
    if (lane() % kPartColumns == 0 && base + lane() / kPartColumns < parts) {
      store(p.parts + base + lane() / kPartColumns, make_float2(part.step, part.before));
    }
  }
  sync_warp();
  const float of_parts = drift_from(sum_parts(p.parts, parts), true);
  const float of_rows = row_distance(p.now, p.before, p.d, true);
  if (lane() == 31) store(p.drift, of_parts), store(p.drift + 1, of_rows);
}

void test_parts(int64_t d) {
  Random random(static_cast<uint32_t>(d));
  const std::vector<float> now = random.normals(d), before = random.normals(d);
  check::schedules("drift of parts", [&] {
    std::vector<float2> parts(static_cast<size_t>(d / 16 + 1));
    std::vector<float> drift = poisoned(2);
    gpu::launch("parts", parts_kernel, gpu::Dim{1}, 32, 0, nullptr,
                PartsCase{now.data(), before.data(), d, parts.data(), drift.data()});
    report(!std::isnan(drift[0]) && same(&drift[0], &drift[1], 1), "drift of parts, d " + std::to_string(d));
  });
}

void test_entropy(int64_t rows, int64_t d, uint32_t seed) {
  Random random(seed);
  const std::string name = "entropy of " + std::to_string(rows) + " rows of " + std::to_string(d);
  const int64_t count = random.integer(0, static_cast<int>(rows)), stride = d + random.integer(0, 2) * 2;
  const float scales[] = {0, 0.01f, 1, 10, 1000};
  std::vector<float> x;
  std::vector<int32_t> index(static_cast<size_t>(rows), kGarbage);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> row = random.normals(stride, scales[random.integer(0, 4)]);
    const int kind = random.integer(0, 9);
    if (kind < 3) row[static_cast<size_t>(random.integer(0, static_cast<int>(d) - 1))] = kind == 0 ? NAN : -INFINITY;
    x.insert(x.end(), row.begin(), row.end());
  }
  for (int64_t i = 0; i < count; ++i) index[static_cast<size_t>(i)] = random.integer(0, static_cast<int>(rows) - 1);
  std::vector<float> want = poisoned(rows);
  quicksilver::softmax_entropy(x.data(), stride, index.data(), count, d, want.data());
  const int32_t number = static_cast<int32_t>(count);
  check::schedules(name, [&] {
    std::vector<float> out = poisoned(rows);
    gpu::softmax_entropy(x.data(), stride, index.data(), rows, d, out.data(), &number, nullptr);
    for (size_t i = 0; i < out.size(); ++i) {
      report(std::isnan(want[i]) ? std::isnan(out[i]) : std::fabs(out[i] - want[i]) <= 4e-6f * (1 + want[i]),
             name + " " + std::to_string(out[i]) + " for " + std::to_string(want[i]));
    }
  });
}

// --- the cache -------------------------------------------------------------------------------------------------------

struct Cache {
  std::vector<char> key, value;
  std::vector<float> key_scale, value_scale;
  std::vector<int32_t> table, lengths, positions, until, free_blocks;  // the last: empty for none
  int32_t used = 0, overflow = 0;
  KvCache view;

  Cache(KvType type, int64_t blocks, int64_t block_size, int64_t heads, int64_t size, int64_t sequences,
        int64_t max_blocks) {
    const int64_t vectors = blocks * heads * block_size, width = type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2;
    key.assign(static_cast<size_t>(vectors * size * width), '\x5a');
    value = key;
    key_scale.assign(static_cast<size_t>(vectors), -7.0f);
    value_scale = key_scale;
    table.assign(static_cast<size_t>(sequences * max_blocks), -1);
    lengths.assign(static_cast<size_t>(sequences), 0);
    positions.assign(static_cast<size_t>(blocks * block_size), -1);
    until = positions;
    view.type = type;
    view.blocks = blocks;
    view.block_size = block_size;
    view.kv_heads = heads;
    view.head_size = size;
    view.max_blocks = max_blocks;
    view.sequences = sequences;
    point();
  }
  Cache(const Cache& other) { *this = other; }
  Cache& operator=(const Cache& other) {
    key = other.key, value = other.value, key_scale = other.key_scale, value_scale = other.value_scale;
    table = other.table, lengths = other.lengths, positions = other.positions, until = other.until;
    free_blocks = other.free_blocks, used = other.used, overflow = other.overflow, view = other.view;
    point();
    return *this;
  }
  void point() {
    view.key = key.data();
    view.value = value.data();
    view.key_scale = key_scale.data();
    view.value_scale = value_scale.data();
    view.block_table = table.data();
    view.lengths = lengths.data();
    view.positions = positions.data();
    view.until = until.data();
    view.blocks_used = &used;
    view.free_blocks = free_blocks.empty() ? nullptr : free_blocks.data();
    view.overflow = &overflow;
  }
  bool same_slots(const Cache& other) const {
    return table == other.table && lengths == other.lengths && positions == other.positions && until == other.until &&
           used == other.used;
  }
  bool same_entries(const Cache& other) const {
    return key == other.key && value == other.value && same(key_scale, other.key_scale) &&
           same(value_scale, other.value_scale) && overflow == other.overflow;
  }
};

// Row by row, each served where there is room for it.
bool allocate_each(KvCache& cache, const std::vector<int32_t>& index, const std::vector<int32_t>& sequence,
                   const std::vector<int32_t>& positions, std::vector<int64_t>& slots) {
  bool full = false;
  for (size_t i = 0; i < index.size(); ++i) {
    slots[i] = -1;
    full |= !quicksilver::kv_allocate(cache, &index[i], 1, sequence.data(), positions.data(), &slots[i]);
  }
  return full;
}

void test_allocate(int64_t rows, bool has_room, uint32_t seed) {
  Random random(seed);
  const std::string name = "slots of " + std::to_string(rows) + " rows " + std::to_string(seed);
  const int64_t block_size = random.integer(1, 7), sequences = random.integer(1, 9);
  const int64_t max_blocks = has_room ? 2 * rows + 8 : 1 + rows / (sequences * block_size);
  const int64_t blocks = has_room ? rows + sequences * 9 : 1 + rows / (2 * block_size);
  Cache start(KvType::f32, blocks, block_size, 1, 1, sequences, max_blocks);
  if (seed % 3 == 0) {
    for (int32_t b = 0; b < blocks; ++b) start.free_blocks.push_back(b);
    std::shuffle(start.free_blocks.begin(), start.free_blocks.end(), random.engine);
    start.point();
  }
  start.view.window = seed % 2 ? random.integer(1, 9) : 0;
  // Some entries are there already, and of some sequences a block more than they need.
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t want = random.integer(0, 2), extra = random.integer(0, 1);
    for (int64_t b = 0; b < want + extra && b < max_blocks && start.used < blocks; ++b) {
      const int32_t block = start.free_blocks.empty() ? start.used : start.free_blocks[static_cast<size_t>(start.used)];
      start.table[static_cast<size_t>(s * max_blocks + b)] = block;
      ++start.used;
      if (b < want) start.lengths[static_cast<size_t>(s)] += static_cast<int32_t>(block_size) - (b + 1 == want);
    }
  }
  const int64_t count = random.integer(0, 3) == 0 ? rows : random.integer(0, static_cast<int>(rows));
  std::vector<int32_t> sequence, positions, index;
  const bool shuffled = random.integer(0, 1) == 1;
  for (int32_t r = 0; r < rows; ++r) {
    sequence.push_back(shuffled ? random.integer(0, static_cast<int>(sequences) - 1)
                                : static_cast<int32_t>(r * sequences / rows));
    positions.push_back(random.integer(0, 9) ? random.integer(0, 1000) : INT32_MAX - random.integer(0, 9));
    if (r < count) index.push_back(r);
  }
  if (shuffled) std::shuffle(index.begin(), index.end(), random.engine);
  Cache want = start;
  std::vector<int64_t> want_slots(static_cast<size_t>(count));
  const bool want_full = allocate_each(want.view, index, sequence, positions, want_slots);
  report(!(has_room && want_full), name + ": the case has room");
  index.resize(static_cast<size_t>(rows), kGarbage);
  const int32_t number = static_cast<int32_t>(count);
  check::schedules(name, [&] {
    Cache got = start;
    std::vector<int64_t> slots(static_cast<size_t>(rows), -9);
    int32_t full = 0;
    gpu::kv_allocate(got.view, index.data(), rows, sequence.data(), positions.data(), slots.data(), &number,
                     seed % 2 ? &full : nullptr, nullptr);
    report(std::equal(want_slots.begin(), want_slots.end(), slots.begin()), name + ": slots");
    report(std::all_of(slots.begin() + count, slots.end(), [](int64_t s) { return s == -9; }), name + ": beyond");
    report(got.same_slots(want), name + ": table, lengths, positions");
    report(full == (seed % 2 ? want_full : 0), name + ": full");
  });
}

const KvType kTypes[] = {KvType::f32, KvType::f16, KvType::bf16, KvType::i8};

void test_scatter(KvType type, int64_t rows, int64_t size, uint32_t seed) {
  Random random(seed);
  const std::string name = "scatter of type " + std::to_string(static_cast<int>(type)) + ", " + std::to_string(rows) +
                           " rows of " + std::to_string(size);
  const int64_t heads = random.integer(1, 3), block_size = random.integer(1, 5), blocks = rows / block_size + 2;
  const int64_t key_stride = heads * size + random.integer(0, 3), value_stride = heads * size + random.integer(0, 3);
  std::vector<float> key = random.normals(rows * key_stride), value = random.normals(rows * value_stride, 1e-3f);
  std::vector<int64_t> slots(static_cast<size_t>(blocks * block_size));
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), random.engine);
  for (int64_t r = 0; r < rows; ++r) {
    const int kind = random.integer(0, 19);
    if (kind < 2) std::fill_n(key.begin() + r * key_stride, size, kind == 0 ? 0.0f : 1e-44f);
    if (kind == 2) value[static_cast<size_t>(r * value_stride)] = INFINITY;
    if (kind == 3 && type == KvType::i8) value[static_cast<size_t>(r * value_stride)] = NAN;
    if (kind == 4) slots[static_cast<size_t>(r)] = -1;
    if (kind == 5 && seed % 2) key[static_cast<size_t>(r * key_stride + size - 1)] = -65520;
    if (kind == 6) value[static_cast<size_t>(r * value_stride + size / 2)] = 65519;
  }
  KvScatter p;
  const bool zeros = random.integer(0, 7) == 0;
  p.key = zeros ? nullptr : key.data();
  p.value = zeros ? nullptr : value.data();
  p.key_stride = key_stride;
  p.value_stride = value_stride;
  p.slots = slots.data();
  const Cache start(type, blocks, block_size, heads, size, 1, 1);
  Cache want = start;
  p.count = random.integer(0, static_cast<int>(rows));
  p.cache = want.view;
  quicksilver::kv_scatter(p);
  const int32_t number = static_cast<int32_t>(p.count);
  check::schedules(name, [&] {
    Cache got = start;
    KvScatter q = p;
    q.count = rows;
    q.cache = got.view;
    gpu::kv_scatter(q, &number, nullptr);
    report(got.same_entries(want), name);
  });
}

void test_merge(KvType type, uint32_t seed) {
  Random random(seed);
  const std::string name = "merge of type " + std::to_string(static_cast<int>(type)) + " " + std::to_string(seed);
  const int64_t heads = random.integer(1, 3), block_size = random.integer(1, 5), blocks = 4;
  const int64_t half = random.integer(1, 70), size = 2 * half, slots = blocks * block_size;
  Cache start(type, blocks, block_size, heads, size, 1, 1);
  std::vector<float> key = random.normals(slots * heads * size), value = random.normals(slots * heads * size);
  std::vector<int64_t> all;
  for (int64_t i = 0; i < slots; ++i) all.push_back(i);
  KvScatter fill;
  fill.key = key.data();
  fill.value = value.data();
  fill.key_stride = fill.value_stride = heads * size;
  fill.slots = all.data();
  fill.count = slots;
  fill.cache = start.view;
  quicksilver::kv_scatter(fill);

  const std::vector<float> cosine = random.normals(4 * half), sine = random.normals(4 * half);
  std::vector<int64_t> destination, first, second;
  std::vector<float> a, b;
  std::vector<int32_t> turn;
  const int64_t count = random.integer(0, 40);
  for (int64_t i = 0; i < count; ++i) {
    const auto any = [&] { return int64_t{random.integer(0, static_cast<int>(slots) - 1)}; };
    first.push_back(i > 0 && random.integer(0, 1) ? destination.back() : any());
    second.push_back(any());
    const int kind = random.integer(0, 2);
    destination.push_back(kind == 0 ? first.back() : kind == 1 ? second.back() : any());
    a.push_back(std::fabs(random.normal()) + 0.1f);
    b.push_back(std::fabs(random.normal()) + 0.1f);
    turn.push_back(random.integer(0, 3));
  }
  const bool rotary = seed % 3 != 0;
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
  Cache want = start;
  p.cache = want.view;
  quicksilver::kv_merge(p);
  check::schedules(name, [&] {
    Cache got = start;
    KvMerge q = p;
    q.cache = got.view;
    gpu::kv_merge(q, nullptr);
    report(got.same_entries(want), name);
  });
}

// --- fusion ----------------------------------------------------------------------------------------------------------

void test_fusion(int64_t count, int64_t d, int32_t max_group, uint32_t seed) {
  Random random(seed);
  const std::string name = "fusion of " + std::to_string(count) + " rows of " + std::to_string(d);
  const int64_t stride = d + random.integer(0, 3);
  const int joins = random.integer(0, 1) == 0 ? 2 : 40, breaks = joins * 5;  // short runs, and long ones
  std::vector<float> hidden = random.normals(count * stride), weight;
  std::vector<int32_t> positions, sequence;
  std::vector<uint8_t> fusible;
  for (int64_t t = 0; t < count; ++t) {
    positions.push_back(t == 0 ? 0 : positions.back() + (random.integer(0, breaks) == 0 ? 2 : 1));
    sequence.push_back(t == 0 ? 0 : sequence.back() + (random.integer(0, breaks) == 0));
    fusible.push_back(random.integer(0, breaks) != 0);
    weight.push_back(std::fabs(random.normal()) + 0.1f);
    if (t > 0 && random.integer(0, joins) != 0) {
      for (int64_t k = 0; k < d; ++k) {
        hidden[static_cast<size_t>(t * stride + k)] = hidden[static_cast<size_t>((t - 1) * stride + k)] * 1.001f;
      }
    }
    if (random.integer(0, 50) == 0) hidden[static_cast<size_t>(t * stride)] = NAN;
  }
  std::vector<int32_t> want(static_cast<size_t>(count), kGarbage);
  FusionGroups p{hidden.data(),  stride, count,         d,         positions.data(), sequence.data(),
                 fusible.data(), 0.1f,   seed % 2 == 0, max_group, want.data()};
  const int64_t groups = quicksilver::fusion_groups(p);
  std::vector<float> want_fused = poisoned(count * d), want_hidden = poisoned(count * stride);
  quicksilver::fusion_reduce(hidden.data(), stride, weight.data(), want.data(), count, d, want_fused.data(), groups);
  quicksilver::fusion_expand(want_fused.data(), want.data(), count, d, want_hidden.data(), stride);

  std::vector<char> scratch = check::zeroed(gpu::fusion_scratch_bytes(p));
  check::schedules(name, [&] {
    std::vector<int32_t> group(static_cast<size_t>(count), kGarbage);
    std::vector<float> fused = poisoned(count * d), expanded = poisoned(count * stride);
    int32_t number = -1;
    FusionGroups q = p;
    q.group = group.data();
    gpu::fusion_groups(q, &number, scratch.data(), nullptr);
    report(number == groups && group == want, name + ": groups");
    report(all_zero(scratch), name + ": scratch");
    gpu::fusion_reduce(hidden.data(), stride, weight.data(), want.data(), count, d, fused.data(), groups, nullptr);
    report(same(fused, want_fused), name + ": means");
    gpu::fusion_expand(fused.data(), groups, want.data(), count, d, expanded.data(), stride, nullptr);
    report(same(expanded, want_hidden), name + ": expanded");
  });
}

}  // namespace

void mechanisms_cuda_tests() {
  uint32_t seed = 1;
  const struct {
    int64_t rows, d;
  } shapes[] = {{0, 64},  {1, 1},  {1, 1000}, {2, 5},    {31, 576},  {32, 64},
                {33, 64}, {33, 5}, {257, 1},  {257, 64}, {31, 1000}, {1500, 5}};
  for (const auto& [rows, d] : shapes) {
    for (const bool whole : {false, true}) test_halting({rows, d, whole}, seed++);
    if (rows > 0 && rows < 1000) test_entropy(rows, d, seed++);
    test_fusion(rows, d, 1 + static_cast<int32_t>(seed) % 4, seed), ++seed;
  }
  for (int32_t max_group : {0, 2, 3, 5, 7, 1000}) test_fusion(700, 3, max_group, seed++);
  for (int64_t d : {1, 15, 16, 17, 64, 512, 513, 576, 1000, 4096}) test_parts(d);
  for (int64_t rows : {1, 8, 31, 33, 255, 257, 1500}) {
    for (const bool has_room : {true, false}) {
      for (int i = 0; i < (rows < 100 ? 8 : 3); ++i) test_allocate(rows, has_room, seed++);
    }
  }
  for (KvType type : kTypes) {
    for (int64_t size : {1, 31, 64, 80}) test_scatter(type, 33, size, seed++);
    test_scatter(type, 1, 128, seed++);
    for (int i = 0; i < 6; ++i) test_merge(type, seed++);
  }
}
