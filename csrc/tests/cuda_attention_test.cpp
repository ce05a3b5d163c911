// compacted_attention's kernels: against the CPU kernel and a double-precision reference; and the promise that a row's
// bits depend on nothing but its query, its position and the entries of its sequence.
#include <algorithm>
#include <numeric>

#include "attention.cuh"
#include "cuda_check.h"

namespace {

using namespace quicksilver;
using check::error, check::float_to_half, check::half_to_float, check::poisoned, check::Random, check::report;
namespace gpu = quicksilver::QS_CUDA;
#ifdef QS_EMULATED
using gpu::float2;  // CUDA's own is in no namespace
#endif
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

float bfloat_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Shape {
  KvType type = KvType::f16;
  int64_t kv_heads = 1, heads_per_kv = 1, size = 64, block_size = 64;
  std::vector<int> lengths;  // of each sequence
  bool expires = false;
  std::string name() const {
    const char* types[] = {"f32", "f16", "bf16", "i8"};
    std::string all;
    for (int length : lengths) all += " " + std::to_string(length);
    return std::string("attention ") + types[static_cast<int>(type)] + " D" + std::to_string(size) + " heads " +
           std::to_string(kv_heads) + "x" + std::to_string(heads_per_kv) + " block " + std::to_string(block_size) +
           (expires ? " until" : "") + " lengths" + all;
  }
};

// A cache whose blocks are in random places, with NaN wherever there is no entry.
struct TestCache {
  Shape shape;
  std::vector<char> key, value;
  Floats key_scale, value_scale;
  Ints table, lengths, positions, until;
  KvCache view;

  TestCache(const Shape& s, Random& random) : shape(s), lengths(s.lengths.begin(), s.lengths.end()) {
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    view.max_blocks = longest / s.block_size + 2;
    view.sequences = static_cast<int64_t>(lengths.size());
    view.blocks = view.sequences * view.max_blocks;
    view.block_size = s.block_size;
    view.kv_heads = s.kv_heads;
    view.head_size = s.size;
    view.type = s.type;
    const int64_t slots = view.blocks * s.block_size, vectors = slots * s.kv_heads;
    key.assign(static_cast<size_t>(vectors * s.size * bytes()), char(0xff));
    value = key;
    if (s.type == KvType::i8) key_scale = value_scale = poisoned(vectors);
    positions.assign(static_cast<size_t>(slots), 0);
    until.assign(static_cast<size_t>(slots), INT32_MAX);
    table.assign(static_cast<size_t>(view.blocks), -1);
    Ints free(static_cast<size_t>(view.blocks));
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), random.engine);
    for (int64_t q = 0; q < view.sequences; ++q) {
      int32_t position = 0;
      for (int64_t e = 0; e < lengths[static_cast<size_t>(q)]; ++e) {
        if (e % s.block_size == 0) {
          table[static_cast<size_t>(q * view.max_blocks + e / s.block_size)] = free.back();
          free.pop_back();
        }
        const size_t slot = static_cast<size_t>(this->slot(q, e));
        position += random.integer(0, 9) == 0 ? random.integer(2, 5) : 1;
        positions[slot] = position;
        if (s.expires && random.integer(0, 3) == 0) until[slot] = position + random.integer(0, 300);
        for (int64_t head = 0; head < s.kv_heads; ++head) {
          for (int64_t k = 0; k < s.size; ++k) {
            set(key, vector_at(static_cast<int64_t>(slot), head) * s.size + k,
                random.normal() + (head == 0 ? 0.3f : 0));
            set(value, vector_at(static_cast<int64_t>(slot), head) * s.size + k, random.normal());
          }
          if (s.type == KvType::i8) {
            const size_t v = static_cast<size_t>(vector_at(static_cast<int64_t>(slot), head));
            key_scale[v] = std::fabs(random.normal()) / 40;
            value_scale[v] = std::exp(random.normal() * 2);
          }
        }
      }
    }
    view.key = key.data();
    view.value = value.data();
    view.key_scale = key_scale.data();
    view.value_scale = value_scale.data();
    view.block_table = table.data();
    view.lengths = lengths.data();
    view.positions = positions.data();
    view.until = s.expires ? until.data() : nullptr;
  }
  int64_t bytes() const { return shape.type == KvType::f32 ? 4 : shape.type == KvType::i8 ? 1 : 2; }
  int64_t slot(int64_t s, int64_t e) const {
    return table[static_cast<size_t>(s * view.max_blocks + e / view.block_size)] * view.block_size +
           e % view.block_size;
  }
  int64_t vector_at(int64_t slot, int64_t head) const {
    return (slot / view.block_size * view.kv_heads + head) * view.block_size + slot % view.block_size;
  }
  void set(std::vector<char>& array, int64_t at, float x) {
    char* to = array.data() + at * bytes();
    if (shape.type == KvType::f32) std::memcpy(to, &x, 4);
    if (shape.type == KvType::f16 || shape.type == KvType::bf16) {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t h = shape.type == KvType::f16 ? float_to_half(x) : static_cast<uint16_t>(bits >> 16);
      std::memcpy(to, &h, 2);
    }
    if (shape.type == KvType::i8) *to = static_cast<char>(std::lrint(std::clamp(x * 50, -127.0f, 127.0f)));
  }
  double get(const std::vector<char>& array, const Floats& scale, int64_t vector, int64_t k) const {
    const char* from = array.data() + (vector * shape.size + k) * bytes();
    if (shape.type == KvType::i8) {
      return static_cast<double>(static_cast<signed char>(*from)) * scale[static_cast<size_t>(vector)];
    }
    float x;
    std::memcpy(&x, from, 4 < bytes() ? 4 : static_cast<size_t>(bytes()));
    if (shape.type == KvType::f32) return x;
    uint16_t h;
    std::memcpy(&h, from, 2);
    return shape.type == KvType::f16 ? half_to_float(h) : bfloat_to_float(h);
  }
};

// Queries for a cache, in random order, each somewhere near the end of its sequence or anywhere in it.
struct Queries {
  const TestCache& cache;
  int64_t heads, count;
  Ints index, sequence, position;
  Floats query;
  int64_t stride;

  Queries(const TestCache& c, Random& random, int64_t n)
      : cache(c), heads(c.shape.kv_heads * c.shape.heads_per_kv), count(n), stride(heads * c.shape.size + 2) {
    const int64_t rows = count + 5;
    sequence.resize(static_cast<size_t>(rows), 0);
    position.resize(static_cast<size_t>(rows), 0);
    index.resize(static_cast<size_t>(rows));
    std::iota(index.begin(), index.end(), 0);
    std::shuffle(index.begin(), index.end(), random.engine);
    for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
      sequence[i] = random.integer(0, static_cast<int>(c.view.sequences) - 1);
      const int64_t length = c.lengths[static_cast<size_t>(sequence[i])];
      position[i] = length == 0 ? 7 : c.positions[static_cast<size_t>(c.slot(sequence[i], length - 1))];
      if (random.integer(0, 1)) position[i] = random.integer(0, position[i]);
    }
    query = random.normals(count * stride, 1.5f);
  }
  Attention params() const {
    Attention p;
    p.query = query.data();
    p.query_stride = stride;
    p.heads = heads;
    p.count = count;
    p.index = index.data();
    p.query_positions = position.data();
    p.query_sequence = sequence.data();
    p.scale = 1.0f / std::sqrt(static_cast<float>(cache.shape.size));
    p.cache = cache.view;
    return p;
  }
  bool sees(int64_t i, int64_t slot) const {
    const int32_t at = position[static_cast<size_t>(index[static_cast<size_t>(i)])];
    return cache.positions[static_cast<size_t>(slot)] <= at &&
           (!cache.view.until || at < cache.until[static_cast<size_t>(slot)]);
  }
};

struct Result {
  Floats out, lse;
};
bool same(const Result& a, const Result& b) { return check::same(a.out, b.out) && check::same(a.lse, b.lse); }

enum class Way { chosen, decode, prefill, plain, plain_alone };

// Runs the kernels on as many of the queries as `count` says, in a batch with room for all.
Result run(const Attention& params, Way way, const std::string& name, int32_t count = -1) {
  const int64_t size = params.cache.head_size, n = count < 0 ? params.count : count;
  Result result = {poisoned(params.count * params.heads * size), poisoned(params.count * params.heads)};
  Attention p = params;
  p.out = result.out.data();
  p.out_stride = p.heads * size;
  p.log_sum_exp = result.lse.data();
  const int32_t* device_count = count < 0 ? nullptr : &count;
  std::vector<char> scratch = check::zeroed(gpu::attention_scratch_bytes(p));
  if (way == Way::chosen) gpu::compacted_attention(p, device_count, scratch.data(), nullptr);
  if (way == Way::prefill) gpu::prefill_attention(p, device_count, nullptr);
  if (way == Way::plain_alone) gpu::plain_attention(p, device_count, {}, false, nullptr);
  if (way == Way::decode || way == Way::plain) {
    // Splits over as many blocks as there are.
    const int64_t splits = (p.cache.max_blocks * p.cache.block_size + gpu::kSplit - 1) / gpu::kSplit;
    Ints counters(static_cast<size_t>(p.count * p.heads), 0);
    std::vector<float2> softmax(static_cast<size_t>(p.count * p.heads * splits), float2{NAN, NAN});
    Floats values = poisoned(p.count * p.heads * splits * size);
    const gpu::AttentionScratch parts = {counters.data(), softmax.data(), values.data(), splits};
    if (way == Way::decode) gpu::decode_attention(p, device_count, parts, nullptr);
    if (way == Way::plain) gpu::plain_attention(p, device_count, parts, true, nullptr);
    report(std::all_of(counters.begin(), counters.end(), [](int32_t c) { return c == 0; }), name + ": counters");
  }
  const bool rest_untouched =
      std::all_of(result.out.begin() + n * p.heads * size, result.out.end(), [](float x) { return std::isnan(x); }) &&
      std::all_of(result.lse.begin() + n * p.heads, result.lse.end(), [](float x) { return std::isnan(x); });
  report(rest_untouched, name + ": writes beyond the count");
  return result;
}

void by_definition(const Queries& q, std::vector<double>& out, std::vector<double>& lse) {
  const TestCache& cache = q.cache;
  const int64_t size = cache.shape.size;
  const float scale = q.params().scale;
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t s = q.sequence[static_cast<size_t>(q.index[static_cast<size_t>(i)])];
    for (int64_t h = 0; h < q.heads; ++h) {
      std::vector<int64_t> seen;
      std::vector<double> score;
      for (int64_t e = 0; e < cache.lengths[static_cast<size_t>(s)]; ++e) {
        const int64_t slot = cache.slot(s, e);
        if (!q.sees(i, slot)) continue;
        seen.push_back(cache.vector_at(slot, h / cache.shape.heads_per_kv));
        double dot = 0;
        for (int64_t k = 0; k < size; ++k) {
          dot += static_cast<double>(q.query[static_cast<size_t>(i * q.stride + h * size + k)]) *
                 cache.get(cache.key, cache.key_scale, seen.back(), k);
        }
        score.push_back(dot * scale);
      }
      double* o = out.data() + (i * q.heads + h) * size;
      std::fill(o, o + size, 0.0);
      double& l = lse[static_cast<size_t>(i * q.heads + h)] = -INFINITY;
      if (seen.empty()) continue;
      const double top = *std::max_element(score.begin(), score.end());
      double z = 0;
      for (double x : score) z += std::exp(x - top);
      l = top + std::log(z);
      for (size_t j = 0; j < seen.size(); ++j) {
        const double p = std::exp(score[j] - top) / z;
        for (int64_t k = 0; k < size; ++k) o[k] += p * cache.get(cache.value, cache.value_scale, seen[j], k);
      }
    }
  }
}

bool takes_tensor_cores(const Shape& s) {
  return s.type != KvType::f32 && (s.size == 64 || s.size == 80 || s.size == 96 || s.size == 128);
}

void check_accuracy(const Queries& q, const Result& got, const std::string& name) {
  std::vector<double> want(got.out.size()), want_lse(got.lse.size());
  by_definition(q, want, want_lse);
  const double limit = takes_tensor_cores(q.cache.shape) && q.cache.shape.type == KvType::bf16 ? 1.5e-5 : 2e-6;
  const double wrong = error(got.out, want);
  report(wrong < limit, name + ": error " + std::to_string(wrong * 1e6) + "e-6");
  for (size_t i = 0; i < got.lse.size(); ++i) {
    const bool close = std::isinf(want_lse[i])
                           ? got.lse[i] == -INFINITY
                           : std::fabs(got.lse[i] - want_lse[i]) < limit * 4 * (1 + std::fabs(want_lse[i]));
    report(close, name + ": log-sum-exp " + std::to_string(got.lse[i]) + ", not " + std::to_string(want_lse[i]));
  }

  Attention p = q.params();
  Floats cpu = poisoned(static_cast<int64_t>(got.out.size()));
  p.out = cpu.data();
  p.out_stride = p.heads * q.cache.shape.size;
  quicksilver::compacted_attention(p);
  const double apart = error(got.out, std::vector<double>(cpu.begin(), cpu.end()));
  report(apart < limit, name + ": apart from the CPU's by " + std::to_string(apart * 1e6) + "e-6");
}

// A number of the cache or a query becomes NaN: the rows that see it get NaN, the others keep their bits.
void check_poison(TestCache& cache, const Queries& q, Random& random, Way way, const Result& before,
                  const std::string& name) {
  const int64_t size = cache.shape.size;
  int64_t s = 0;
  while (cache.lengths[static_cast<size_t>(s)] == 0) ++s;
  const int64_t e = random.integer(0, cache.lengths[static_cast<size_t>(s)] - 1), slot = cache.slot(s, e);
  const int64_t head = random.integer(0, static_cast<int>(cache.shape.kv_heads) - 1);
  const bool in_key = random.integer(0, 1);
  const int64_t vector = cache.vector_at(slot, head), column = random.integer(0, static_cast<int>(size) - 1);
  const TestCache saved = cache;
  if (cache.shape.type == KvType::i8) {
    (in_key ? cache.key_scale : cache.value_scale)[static_cast<size_t>(vector)] = NAN;
  } else {
    cache.set(in_key ? cache.key : cache.value, vector * size + column, NAN);
  }
  Queries poisoned_queries = q;
  const int64_t bad = random.integer(0, static_cast<int>(q.count) - 1),
                bad_head = random.integer(0, static_cast<int>(q.heads) - 1);
  poisoned_queries.query[static_cast<size_t>(bad * q.stride + bad_head * size + size / 2)] = NAN;
  Attention p = poisoned_queries.params();
  p.cache = cache.view;
  const Result after = run(p, way, name);
  const bool whole_row = in_key || cache.shape.type == KvType::i8;
  for (int64_t i = 0; i < q.count; ++i) {
    const bool sees = q.sequence[static_cast<size_t>(q.index[static_cast<size_t>(i)])] == s && q.sees(i, slot);
    for (int64_t h = 0; h < q.heads; ++h) {
      const int64_t at = (i * q.heads + h) * size;
      const bool hit = sees && h / cache.shape.heads_per_kv == head;
      const bool bad_query = i == bad && h == bad_head && before.lse[static_cast<size_t>(i * q.heads + h)] != -INFINITY;
      for (int64_t k = 0; k < size; ++k) {
        const float x = after.out[static_cast<size_t>(at + k)], y = before.out[static_cast<size_t>(at + k)];
        const bool is_nan = bad_query || (hit && (whole_row || k == column));
        report(is_nan ? std::isnan(x) : check::same(&x, &y, 1), name + ": NaN in one place");
      }
    }
  }
  std::memcpy(cache.key.data(), saved.key.data(), saved.key.size());
  std::memcpy(cache.value.data(), saved.value.data(), saved.value.size());
  cache.key_scale.assign(saved.key_scale.begin(), saved.key_scale.end());
  cache.value_scale.assign(saved.value_scale.begin(), saved.value_scale.end());
}

// Two ways each for tensor cores and plain FMAs: they must agree to the bit.
void run_case(const Shape& shape, uint32_t seed, int64_t count) {
  Random random(seed);
  TestCache cache(shape, random);
  const Queries q(cache, random, count);
  const Attention p = q.params();
  const std::string name = shape.name() + " queries " + std::to_string(count);
  const bool tensor = takes_tensor_cores(shape);
  const Way spread = tensor ? Way::decode : Way::plain, whole = tensor ? Way::prefill : Way::plain_alone;

  const Result first = run(p, spread, name);
  check_accuracy(q, first, name);
  report(same(first, run(p, whole, name)), name + ": the two kernels differ");
  report(same(first, run(p, Way::chosen, name)), name + ": the chosen kernel differs");

  const int32_t fewer = static_cast<int32_t>((count + 1) / 2);
  for (Way way : {spread, whole}) {
    const Result part = run(p, way, name + " count below the bound", fewer);
    const int64_t values = fewer * q.heads * shape.size;
    report(check::same(first.out.data(), part.out.data(), values) &&
               check::same(first.lse.data(), part.lse.data(), fewer * q.heads),
           name + ": a smaller batch changes something");
    check_poison(cache, q, random, way, first, name);
  }

  // One query alone, without the index.
  const int64_t i = random.integer(0, static_cast<int>(count) - 1);
  Attention one = p;
  one.count = 1;
  one.query += i * q.stride;
  one.index = nullptr;
  one.query_positions += q.index[static_cast<size_t>(i)];
  one.query_sequence += q.index[static_cast<size_t>(i)];
  const Result alone = run(one, whole, name);
  report(check::same(first.out.data() + i * q.heads * shape.size, alone.out.data(), q.heads * shape.size),
         name + ": alone");
}

// Large and tiny queries, keys and values: the parts of 16 bits must not overflow.
void check_range() {
  for (KvType type : {KvType::f16, KvType::bf16, KvType::i8}) {
    for (float scale : {1e-30f, 1e-4f, 3e4f, 1e8f}) {
      Random random(7);
      TestCache cache({type, 1, 2, 64, 64, {70}}, random);
      Queries q(cache, random, 3);
      for (float& x : q.query) x *= scale;
      if (type == KvType::i8) {
        for (float& x : cache.value_scale) x *= scale;
      }
      Attention p = q.params();
      p.scale /= scale;
      const std::string name = cache.shape.name() + " scaled by " + std::to_string(scale);
      const Result got = run(p, Way::decode, name);
      report(same(got, run(p, Way::prefill, name)), name + ": the two kernels differ");
      for (float& x : q.query) x /= scale;
      std::vector<double> want(got.out.size()), lse(got.lse.size());
      by_definition(q, want, lse);
      const double wrong = error(got.out, want);
      report(wrong < 2e-5, name + ": error " + std::to_string(wrong * 1e6) + "e-6");
    }
  }
}

// Entries in a block that doesn't exist aren't seen, and nobody is in a sequence that doesn't; a length beyond the
// table ends with it.
void check_indices(const Shape& shape) {
  Random random(8);
  TestCache cache(shape, random);
  const Queries q(cache, random, 9);
  const Attention p = q.params();
  const bool tensor = takes_tensor_cores(shape);
  int32_t& block = cache.table[static_cast<size_t>(cache.view.max_blocks)];  // the first of sequence 1
  for (int64_t e = 0; e < shape.block_size; ++e) {
    cache.positions[static_cast<size_t>(block * shape.block_size + e)] = INT32_MAX;
  }
  for (Way way : {tensor ? Way::decode : Way::plain, tensor ? Way::prefill : Way::plain_alone}) {
    const std::string name = shape.name() + " at indices of nothing";
    const Result want = run(p, way, name);
    const int32_t there = block;
    for (const int64_t bad : {int64_t{-1}, cache.view.blocks, int64_t{INT32_MAX}, int64_t{INT32_MIN}}) {
      block = static_cast<int32_t>(bad);
      report(same(want, run(p, way, name)), name + ": block " + std::to_string(bad));
    }
    block = there;

    Queries strangers = q;
    for (const int64_t bad : {int64_t{-1}, cache.view.sequences, int64_t{INT32_MAX}, int64_t{INT32_MIN}}) {
      strangers.sequence[static_cast<size_t>(q.index[0])] = static_cast<int32_t>(bad);
      const Result got = run(strangers.params(), way, name);
      Result none = want;
      std::fill_n(none.out.begin(), q.heads * shape.size, 0.0f);
      std::fill_n(none.lse.begin(), q.heads, -INFINITY);
      report(same(none, got), name + ": sequence " + std::to_string(bad));
    }

    // Sequence 1's table full of blocks that exist, all but the first unseen.
    const Ints table = cache.table, lengths = cache.lengths;
    for (int64_t b = cache.lengths[1] / shape.block_size + 1; b < cache.view.max_blocks; ++b) {
      cache.table[static_cast<size_t>(cache.view.max_blocks + b)] = static_cast<int32_t>(cache.view.blocks);
    }
    cache.lengths[1] = static_cast<int32_t>(cache.view.max_blocks * shape.block_size);
    const Result whole = run(p, way, name);
    for (const int32_t more : {1, 1000, INT32_MAX / 2}) {
      cache.lengths[1] = static_cast<int32_t>(cache.view.max_blocks * shape.block_size) + more;
      report(same(whole, run(p, way, name)), name + ": a length past the table");
    }
    std::copy(table.begin(), table.end(), cache.table.begin());
    std::copy(lengths.begin(), lengths.end(), cache.lengths.begin());
  }
}

}  // namespace

void attention_tests() {
  set_threads(1);
  const std::vector<int> all_lengths = {0, 1, 63, 64, 65, 511, 513, 1100};
  check::schedules("attention", [] {
    run_case({KvType::f16, 2, 2, 64, 64, {130, 0, 1, 300}}, 1, 9);
    run_case({KvType::i8, 1, 3, 80, 7, {65, 257}}, 2, 7);
    run_case({KvType::f32, 1, 2, 33, 5, {70, 300}}, 3, 5);
  });
  uint32_t seed = 10;
  for (KvType type : {KvType::f16, KvType::bf16, KvType::i8}) {
    run_case({type, 1, 4, 64, 64, all_lengths}, ++seed, 30);
    run_case({type, 2, 1, 80, 16, {65, 511}}, ++seed, 5);
    run_case({type, 1, 2, 96, 64, {64, 0, 513}, true}, ++seed, 6);
    run_case({type, 1, 8, 128, 1, {63, 300}, true}, ++seed, 20);
    run_case({type, 2, 3, 64, 100, {1, 320}}, ++seed, 24);
  }
  run_case({KvType::f16, 1, 20, 64, 64, {100}}, ++seed, 4);  // more heads than an MMA has rows
  run_case({KvType::f32, 2, 2, 64, 64, {0, 1, 63, 64, 65, 511, 513}}, ++seed, 12);
  run_case({KvType::f32, 1, 1, 256, 3, {65, 260}, true}, ++seed, 4);
  run_case({KvType::f16, 1, 2, 20, 64, {300}}, ++seed, 5);
  run_case({KvType::bf16, 1, 2, 16, 9, {300}}, ++seed, 5);
  run_case({KvType::i8, 1, 2, 33, 64, {300}}, ++seed, 5);
  run_case({KvType::f16, 1, 2, 64, 64, {150, 90}}, ++seed, 150);  // so many that prefill is chosen
  check_range();
  check_indices({KvType::f16, 2, 2, 64, 64, {70, 150, 3}});
  check_indices({KvType::i8, 1, 3, 80, 16, {40, 300, 0}});
  check_indices({KvType::f32, 1, 2, 20, 64, {70, 290, 3}});
}
