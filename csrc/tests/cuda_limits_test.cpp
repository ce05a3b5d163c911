// What CUDA kernels do at their limits: indices of nothing, work memory that is too small, grids of more than 65,535
// blocks, devices other than the first.
#include <algorithm>
#include <numeric>

#include "cuda_check.h"
#include "cuda_model.h"

namespace {

using namespace quicksilver;
using check::poisoned, check::Random, check::report, check::same;
namespace gpu = quicksilver::QS_CUDA;

// --- devices ---------------------------------------------------------------------------------------------------------

#ifdef QS_EMULATED  // whose devices are as many as one asks for
void test_devices() {
  const auto current = [] { return emulator::current_device(); };
  {
    const gpu::DeviceGuard outer(3);
    report(current() == 3, "a device guard makes its device the current one");
    check::error_of([&] {
      const gpu::DeviceGuard inner(1);
      report(current() == 1, "a device guard within another");
      throw std::runtime_error("on purpose");
    });
    report(current() == 3, "a device guard puts the one before back after an exception");
  }
  report(current() == 0, "a device guard puts the one before back");
}
#endif

// --- indices ---------------------------------------------------------------------------------------------------------

constexpr int64_t kBlocks = 3, kBlock = 4, kHeads = 2, kSize = 8, kSlots = kBlocks * kBlock;
// Slots that don't exist; two of them wrap around where 32 bits are all that is looked at.
constexpr int64_t kBadSlots[] = {-1, -7, kSlots, kSlots + 1, int64_t{1} << 32, INT64_MAX, INT64_MIN};

struct Cache {
  std::vector<float> key = poisoned(kSlots * kHeads * kSize), value = key;
  std::vector<int32_t> table = std::vector<int32_t>(2 * 2, -1), lengths = {0, 0}, positions = table, until;
  int32_t used = 0;
  Cache() {
    positions.assign(kSlots, check::kGarbage);
    until = positions;
  }
  KvCache view() {
    KvCache cache;
    cache.key = key.data();
    cache.value = value.data();
    cache.blocks = kBlocks;
    cache.block_size = kBlock;
    cache.kv_heads = kHeads;
    cache.head_size = kSize;
    cache.block_table = table.data();
    cache.max_blocks = 2;
    cache.sequences = 2;
    cache.lengths = lengths.data();
    cache.positions = positions.data();
    cache.until = until.data();
    cache.blocks_used = &used;
    return cache;
  }
};
bool same_values(const Cache& a, const Cache& b) { return same(a.key, b.key) && same(a.value, b.value); }

void test_scatter() {
  std::vector<int64_t> slots = {5};
  slots.insert(slots.end(), std::begin(kBadSlots), std::end(kBadSlots));
  slots.push_back(kSlots - 1);
  Random random(1);
  const int64_t count = static_cast<int64_t>(slots.size()), row = kHeads * kSize;
  const std::vector<float> key = random.normals(count * row), value = random.normals(count * row);
  Cache want, cache;
  std::vector<int64_t> good = slots;
  for (int64_t& slot : good) slot = slot < kSlots && slot >= 0 ? slot : -1;
  KvScatter p{key.data(), value.data(), row, row, good.data(), count, want.view()};
  kv_scatter(p);
  p.slots = slots.data();
  check::schedules("scatter to slots that don't exist", [&] {
    cache = Cache();
    p.cache = cache.view();
    gpu::kv_scatter(p, nullptr, nullptr);
    report(same_values(cache, want), "scatter to slots that don't exist");
  });
}

void test_merge() {
  Random random(2);
  Cache before;
  before.key = random.normals(kSlots * kHeads * kSize);
  before.value = random.normals(kSlots * kHeads * kSize);
  std::vector<int64_t> places[3];  // destination, first, second; of each, each wrong in turn
  for (int wrong = 0; wrong < 3; ++wrong) {
    for (int64_t bad : kBadSlots) {
      for (int i = 0; i < 3; ++i) places[i].push_back(i == wrong ? bad : random.integer(0, kSlots - 1));
    }
  }
  const size_t all = places[0].size();
  for (int i = 0; i < 3; ++i) places[i].push_back(2 + i);  // a good one, the last
  const std::vector<float> weights(all + 1, 0.5f);
  const std::vector<int32_t> distance(all + 1, 0);
  Cache want = before;
  KvMerge p{places[0].data() + all,
            places[1].data() + all,
            places[2].data() + all,
            weights.data(),
            weights.data(),
            distance.data(),
            1,
            nullptr,
            nullptr,
            want.view()};
  kv_merge(p);
  check::schedules("merge of slots that don't exist", [&] {
    Cache cache = before;
    gpu::kv_merge({places[0].data(), places[1].data(), places[2].data(), weights.data(), weights.data(),
                   distance.data(), static_cast<int64_t>(all + 1), nullptr, nullptr, cache.view()},
                  nullptr);
    report(same_values(cache, want), "merge of slots that don't exist");
  });
}

void test_allocate() {
  const std::string name = "slots for sequences and blocks that don't exist";
  // Sequence 0 has a good block and then one that isn't there; of the others only 1 exists.
  const std::vector<int32_t> sequence = {0, -1, 1, 2, 0, INT32_MAX, 1, INT32_MIN}, positions(8, 7);
  check::schedules(name, [&] {
    Cache cache;
    cache.table = {0, kBlocks, -1, -1};
    cache.lengths = {kBlock - 1, 0};
    cache.used = 1;
    std::vector<int64_t> slots(8, check::kGarbage);
    int32_t full = 0;
    gpu::kv_allocate(cache.view(), nullptr, 8, sequence.data(), positions.data(), slots.data(), nullptr, &full,
                     nullptr);
    report(slots == std::vector<int64_t>{kBlock - 1, -1, kBlock, -1, -1, -1, kBlock + 1, -1}, name);
    report(full == 1 && cache.used == 2 && cache.lengths == std::vector<int32_t>{kBlock, 2}, name + ": what is left");
    report(cache.table == std::vector<int32_t>{0, kBlocks, 1, -1}, name + ": table");
    const auto given = std::count(cache.positions.begin(), cache.positions.end(), 7);
    report(given == 3, name + ": positions");
  });
  for (const int32_t length : {-1, INT32_MIN, 2 * static_cast<int32_t>(kBlock), INT32_MAX - 3}) {
    Cache cache;
    cache.lengths = {length, 0};
    std::vector<int64_t> slots(1, check::kGarbage);
    int32_t full = 0;
    gpu::kv_allocate(cache.view(), nullptr, 1, sequence.data(), positions.data(), slots.data(), nullptr, &full,
                     nullptr);
    report(slots[0] == -1 && full == 1 && cache.used == 0, name + ": length " + std::to_string(length));
  }
}

void test_groups() {
  const std::vector<float> hidden = Random(3).normals(6 * 5), weight(6, 1.0f);
  const std::vector<int32_t> group = {0, 1, 2, -1, 3, INT32_MAX};
  check::schedules("groups that don't exist", [&] {
    std::vector<float> fused = poisoned(3 * 5), expanded = poisoned(6 * 5);
    gpu::fusion_reduce(hidden.data(), 5, weight.data(), group.data(), 6, 5, fused.data(), 3, nullptr);
    report(same(fused.data(), hidden.data(), 3 * 5), "means of groups that don't exist");
    gpu::fusion_expand(fused.data(), 3, group.data(), 6, 5, expanded.data(), 5, nullptr);
    std::vector<float> want = fused;
    want.resize(6 * 5, 0.0f);
    report(same(expanded, want), "rows of groups that don't exist");
  });
}

// --- grids -----------------------------------------------------------------------------------------------------------

// Rows, heads, columns beyond 65,535, of which the device says that few or none take part: blocks that return at once.
void test_grids() {
  constexpr int64_t kMany = 65536 + 7;
  const auto runs = [](const std::string& what, const std::function<void()>& body) {
    const std::string error = check::error_of(body);
    report(error.empty(), what + ": " + error);
  };
  const int32_t nobody = 0;
  std::vector<int32_t> zeros(static_cast<size_t>(kMany), 0);
  {
    Attention p;
    p.cache.head_size = 64;
    p.cache.type = KvType::f16;
    p.cache.max_blocks = 1;
    p.count = p.cache.sequences = kMany;  // a query for each sequence: decode
    p.heads = p.cache.kv_heads = 1;
    std::vector<char> scratch = check::zeroed(gpu::attention_scratch_bytes(p));
    runs("attention of many sequences", [&] { gpu::compacted_attention(p, &nobody, scratch.data(), nullptr); });
    p.heads = p.cache.kv_heads = kMany;
    p.count = 40;  // queries of one sequence: prefill
    p.cache.sequences = 1;
    runs("attention of many heads", [&] { gpu::compacted_attention(p, &nobody, nullptr, nullptr); });
  }
  MatryoshkaGemm gemm;
  gemm.w.n = kMany * 32;
  gemm.w.k = 32;
  gemm.w.group = 32;
  check::OwnedRows x(33, 32, 32);
  gemm.x = x.rows;
  gemm.y_stride = gemm.w.n;
  runs("a product of 2 million columns", [&] { gpu::matryoshka_gemm(gemm, &nobody, nullptr); });
  // And one that has something to say: the last of many queries, each with the one entry of the one sequence.
  std::vector<float> out = poisoned(kMany), ones(static_cast<size_t>(kMany), 1.0f);
  float key = 1, value = 5;
  int32_t table = 0, length = 1, position = 0;
  Attention p;
  p.query = ones.data();
  p.query_stride = p.out_stride = p.heads = 1;
  p.count = kMany;
  p.query_positions = p.query_sequence = zeros.data();
  p.out = out.data();
  p.cache.key = &key;
  p.cache.value = &value;
  p.cache.blocks = p.cache.block_size = p.cache.kv_heads = p.cache.head_size = 1;
  p.cache.max_blocks = p.cache.sequences = 1;
  p.cache.block_table = &table;
  p.cache.lengths = &length;
  p.cache.positions = &position;
  std::vector<char> scratch = check::zeroed(gpu::attention_scratch_bytes(p));
  runs("attention of many rows", [&] { gpu::compacted_attention(p, nullptr, scratch.data(), nullptr); });
  report(std::all_of(out.begin(), out.end(), [](float v) { return v == 5; }), "attention of many rows: values");
  report(!check::error_of([&] {
            p.count = int64_t{1} << 32;
            gpu::compacted_attention(p, &nobody, scratch.data(), nullptr);
          }).empty(),
         "more blocks than a grid can have are refused");
}

// --- work memory -----------------------------------------------------------------------------------------------------

void test_work_memory() {
  Random random(5);
  check::Model model(random, {"small", 32, 2, 1, 16, 40, true, 32, KvType::f32}, 16);
  const Layer& layer = model.layer;
  std::vector<char> memory = check::zeroed(gpu::workspace_bytes(layer, 4, 2, 8) + 128);
  void* start = memory.data();
  size_t space = memory.size();
  start = std::align(128, 1, start, space);
  const gpu::DeviceWorkspace work = gpu::carve_workspace(start, layer, 4, 2, 8);

  Cache cache;
  KvCache view = cache.view();
  Rows rows;
  std::vector<float> hidden = random.normals(5 * layer.d), logits(5 * 16);
  const std::vector<float> before = hidden;
  rows.hidden = hidden.data();
  rows.rows = 5;
  const auto stages = [&](const Layer& of, const KvCache& kv) {
    return std::vector<std::pair<const char*, std::function<void()>>>{
        {"attention_input", [&] { gpu::attention_input(of, rows, nullptr, kv, work, nullptr); }},
        {"write_kv", [&] { gpu::write_kv(of, rows, nullptr, kv, work, nullptr); }},
        {"attention", [&] { gpu::attention(of, rows, nullptr, kv, work, nullptr, nullptr); }},
        {"attention_output", [&] { gpu::attention_output(of, rows, nullptr, work, nullptr); }},
        {"mlp_input", [&] { gpu::mlp_input(of, rows, nullptr, work, nullptr); }},
        {"mlp_output", [&] { gpu::mlp_output(of, rows, nullptr, work, nullptr, nullptr, nullptr); }},
        {"lm_head",
         [&] {
           gpu::lm_head(model.layer.mlp_norm, model.head, rows, nullptr, of.d, logits.data(), 16, work, nullptr);
         }},
    };
  };
  const auto refused = [&](const Layer& of, const KvCache& kv, const std::string& wanted, const std::string& which) {
    int some = 0;
    for (const auto& [stage, run] : stages(of, kv)) {
      if ((' ' + which + ' ').find(' ' + std::string(stage) + ' ') == std::string::npos) continue;
      ++some;
      const std::string error = check::error_of(run);
      report(error.find(wanted) != std::string::npos, std::string("work memory of ") + stage + ": '" + error + "'");
    }
    report(some > 0 && same(hidden, before), "work memory: " + wanted);
  };
  const std::string all = "attention_input write_kv attention attention_output mlp_input mlp_output lm_head";
  rows.count = 5;
  refused(layer, view, "is for 4 active rows, and the call has 5", all);
  rows.count = 4;
  Layer wide = layer;
  wide.d = 33;
  refused(wide, view, "is for 32 values of a hidden state, and the call has 33", "attention_input write_kv mlp_input");
  refused(wide, view, "is for 32 values of a hidden state, and the call has 33", "mlp_output lm_head");
  wide = layer;
  wide.ffn = 41;
  refused(wide, view, "is for 40 values inside the MLP, and the call has 41", "mlp_input mlp_output");
  wide = layer;
  wide.heads = 3;
  refused(wide, view, "is for 32 values of a row's queries, and the call has 48",
          "attention_input write_kv attention attention_output");
  KvCache large = view;
  large.sequences = 3;
  refused(layer, large, "is for a cache of 2 sequences, and the call's has 3", "attention");
  large = view;
  large.max_blocks = 3;
  refused(layer, large, "is for 8 entries of a sequence, and the call has 12", "attention");
  wide.heads = 4096;
  report(check::error_of([&] { gpu::workspace_bytes(wide, 1, 1, 1); }).find("this one has 4097") != std::string::npos,
         "work memory for more heads than there are counters");
}

}  // namespace

void limits_tests() {
#ifdef QS_EMULATED
  test_devices();
#endif
  test_scatter();
  test_merge();
  test_allocate();
  test_groups();
  test_grids();
  test_work_memory();
}
