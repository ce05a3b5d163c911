// kv_allocate, kv_scatter and compacted_attention: against a double-precision reference, and the promises that what a
// query doesn't see, and who else is asking, can't change a bit.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace check {
namespace {

using namespace quicksilver;

float bfloat_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A cache that owns its arrays, poisoned.
struct OwnedCache {
  std::vector<char> key, value;
  std::vector<float> key_scale, value_scale;
  std::vector<int32_t> table, lengths, positions, until;
  int32_t used = 0;
  KvCache view;

  OwnedCache(KvType type, int64_t sequences, int64_t blocks, int64_t block_size, int64_t max_blocks, int64_t heads,
             int64_t size, bool expires) {
    const int64_t vectors = blocks * heads * block_size;
    const int element = type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2;
    key.assign(static_cast<size_t>(vectors * size * element), char(0xff));  // NaN in every type of float
    value = key;
    if (type == KvType::i8) key_scale = value_scale = poisoned(vectors);
    table.assign(static_cast<size_t>(sequences * max_blocks), -1);
    lengths.assign(static_cast<size_t>(sequences), 0);
    positions.assign(static_cast<size_t>(blocks * block_size), -7);
    until.assign(positions.size(), -7);
    view.key = key.data();
    view.value = value.data();
    view.key_scale = key_scale.data();
    view.value_scale = value_scale.data();
    view.type = type;
    view.blocks = blocks;
    view.block_size = block_size;
    view.kv_heads = heads;
    view.head_size = size;
    view.block_table = table.data();
    view.max_blocks = max_blocks;
    view.sequences = sequences;
    view.lengths = lengths.data();
    view.positions = positions.data();
    view.until = expires ? until.data() : nullptr;
    view.blocks_used = &used;
  }
  size_t vector(int64_t slot, int64_t head) const {
    const int64_t bs = view.block_size;
    return static_cast<size_t>((slot / bs * view.kv_heads + head) * bs + slot % bs);
  }
  double element(const std::vector<char>& array, int64_t slot, int64_t head, int64_t k) const {
    const size_t v = vector(slot, head), at = v * static_cast<size_t>(view.head_size) + static_cast<size_t>(k);
    if (view.type == KvType::i8) {
      return double((&array == &key ? key_scale : value_scale)[v]) * reinterpret_cast<const int8_t*>(array.data())[at];
    }
    if (view.type == KvType::f32) return reinterpret_cast<const float*>(array.data())[at];
    const uint16_t h = reinterpret_cast<const uint16_t*>(array.data())[at];
    return view.type == KvType::f16 ? half_to_float(h) : bfloat_to_float(h);
  }
  int64_t slot(int64_t s, int64_t e) const {
    return table[static_cast<size_t>(s * view.max_blocks + e / view.block_size)] * view.block_size +
           e % view.block_size;
  }
};

void attention_by_definition(const OwnedCache& cache, const Attention& p, std::vector<double>& out,
                             std::vector<double>& lse) {
  const int64_t size = cache.view.head_size;
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t row = p.index ? p.index[i] : i;
    const int32_t s = p.query_sequence[row], position = p.query_positions[row];
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv_head = h / (p.heads / cache.view.kv_heads);
      std::vector<int64_t> seen;
      std::vector<double> score;
      for (int64_t e = 0; e < cache.lengths[static_cast<size_t>(s)]; ++e) {
        const size_t slot = static_cast<size_t>(cache.slot(s, e));
        if (cache.positions[slot] > position) continue;
        if (cache.view.until && cache.until[slot] <= position) continue;
        seen.push_back(static_cast<int64_t>(slot));
        double dot = 0;
        for (int64_t k = 0; k < size; ++k) {
          dot += static_cast<double>(p.query[i * p.query_stride + h * size + k]) *
                 cache.element(cache.key, seen.back(), kv_head, k);
        }
        score.push_back(dot * p.scale);
      }
      double* o = out.data() + (i * p.heads + h) * size;
      std::fill(o, o + size, 0.0);
      double& l = lse[static_cast<size_t>(i * p.heads + h)] = -INFINITY;
      if (seen.empty()) continue;
      const double top = *std::max_element(score.begin(), score.end());
      double z = 0;
      for (double x : score) z += std::exp(x - top);
      l = top + std::log(z);
      for (size_t j = 0; j < seen.size(); ++j) {
        for (int64_t k = 0; k < size; ++k) {
          o[k] += std::exp(score[j] - top) / z * cache.element(cache.value, seen[j], kv_head, k);
        }
      }
    }
  }
}

void run_case(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const KvType type = static_cast<KvType>(random.integer(0, 3));
  const int64_t kv_heads = random.integer(1, 3), heads = kv_heads * random.integer(1, 3);
  const int sizes[] = {64, 16, 80, 6, 128, 20, 33};
  const bool much = seed % 20 == 19;  // more entries than are added up at once
  const int64_t size = sizes[random.integer(0, 6)], sequences = much ? 1 : random.integer(1, 3),
                block_size = random.integer(1, 20);
  const bool expires = random.integer(0, 2) == 0, jumbled = random.integer(0, 3) == 0;
  const std::string name = variant.name + " attention " + std::to_string(seed) + " D" + std::to_string(size);

  // Rows of several sequences, interleaved; some leave no entry.
  const int64_t rows = much ? 900 : random.integer(1, seed % 6 == 0 ? 150 : 40);
  std::vector<int32_t> sequence, position, next(static_cast<size_t>(sequences), 0), active;
  for (int32_t i = 0; i < rows; ++i) {
    const int32_t s = random.integer(0, static_cast<int>(sequences) - 1);
    sequence.push_back(s);
    position.push_back(jumbled ? random.integer(0, 50) : next[static_cast<size_t>(s)]++);
    if (random.integer(0, 4) != 0) active.push_back(i);
  }
  if (active.empty()) active.push_back(0);
  const int64_t count = static_cast<int64_t>(active.size()), max_blocks = rows / block_size + 1;
  OwnedCache cache(type, sequences, sequences * max_blocks, block_size, max_blocks, kv_heads, size, expires);

  std::vector<int64_t> slots(static_cast<size_t>(count), -3);
  report(variant.kernels->kv_allocate(cache.view, active.data(), count, sequence.data(), position.data(), slots.data()),
         name + ": allocate");
  report(std::accumulate(cache.lengths.begin(), cache.lengths.end(), int64_t(0)) == count, name + ": lengths");
  const std::vector<float> key = random.normals(count * kv_heads * size),
                           value = random.normals(count * kv_heads * size);
  KvScatter scatter{key.data(), value.data(), kv_heads * size, kv_heads * size, slots.data(), count, cache.view};
  variant.kernels->kv_scatter(scatter);
  double worst = 0;
  bool exact = true;
  const auto magnitude = [](float a, float b) { return std::fabs(a) < std::fabs(b); };
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t h = 0; h < kv_heads; ++h) {
      for (int64_t k = 0; k < size; ++k) {
        const float x = key[static_cast<size_t>((i * kv_heads + h) * size + k)];
        const double y = cache.element(cache.key, slots[static_cast<size_t>(i)], h, k);
        if (type == KvType::i8) {
          const float* v = key.data() + (i * kv_heads + h) * size;
          const float largest = rounded_magnitude(std::fabs(*std::max_element(v, v + size, magnitude)));
          const float scale = largest / 127.0f;
          const float code = std::nearbyint(x * (127.0f / largest));
          exact &= y == double(scale) * double(code);
          continue;
        }
        if (type == KvType::f16) exact &= y == half_to_float(float_to_half(x));
        if (type == KvType::f32) exact &= y == x;
        worst = std::max(worst, std::fabs(y - x) / std::max(1e-30, std::fabs(static_cast<double>(x))));
      }
    }
  }
  report(exact && worst <= 1.0 / 256, name + ": scatter");
  if (expires) {
    for (int64_t slot : slots) {
      if (random.integer(0, 3) == 0) {
        cache.until[static_cast<size_t>(slot)] = cache.positions[static_cast<size_t>(slot)] + random.integer(0, 9);
      }
    }
  }

  const int64_t stride = heads * size + 2;
  const std::vector<float> query = random.normals(count * stride);
  std::vector<float> out = poisoned(count * heads * size), lse = poisoned(count * heads);
  Attention p;
  p.query = query.data();
  p.query_stride = stride;
  p.heads = heads;
  p.count = count;
  p.index = active.data();
  p.query_positions = position.data();
  p.query_sequence = sequence.data();
  p.scale = 1.0f / std::sqrt(static_cast<float>(size));
  p.cache = cache.view;
  p.out = out.data();
  p.out_stride = heads * size;
  p.log_sum_exp = lse.data();
  std::vector<double> want(out.size()), want_lse(lse.size());
  attention_by_definition(cache, p, want, want_lse);
  set_threads(2);
  variant.kernels->compacted_attention(p);
  report(error(out, want) < 1e-6, name + ": error " + std::to_string(error(out, want) * 1e6) + "e-6");
  for (size_t i = 0; i < lse.size(); ++i) {
    report(std::isinf(want_lse[i]) ? lse[i] == -INFINITY : std::fabs(lse[i] - want_lse[i]) < 1e-5,
           name + ": log-sum-exp");
  }
  compare_with_others(variant, "attention " + std::to_string(seed), out, true);

  // Each query alone: whole on one thread, its entries divided among several.
  for (const int threads : {1, 2, 5}) {
    set_threads(threads);
    std::vector<float> alone = poisoned(count * heads * size), alone_lse = poisoned(count * heads);
    for (int64_t i = 0; i < count; ++i) {
      Attention one = p;
      one.count = 1;
      one.query += i * stride;
      one.index += i;
      one.out = alone.data() + i * heads * size;
      one.log_sum_exp = alone_lse.data() + i * heads;
      variant.kernels->compacted_attention(one);
    }
    report(same(out, alone) && same(lse, alone_lse), name + ": alone on " + std::to_string(threads));
  }

  // The same entries with lifetimes that never end: the general path must agree with that of prefixes.
  if (!expires) {
    std::fill(cache.until.begin(), cache.until.end(), INT32_MAX);
    p.cache.until = cache.until.data();
    set_threads(3);
    std::vector<float> general = poisoned(count * heads * size);
    p.out = general.data();
    variant.kernels->compacted_attention(p);
    report(same(out, general), name + ": with until");
    p.cache.until = nullptr;
  }

  // Later entries, NaN ones at that, are invisible to earlier queries.
  if (!jumbled) {
    std::vector<int32_t> later_position = position;
    std::vector<int32_t> late = active;
    for (int32_t row : late) later_position[static_cast<size_t>(row)] = 1000;
    OwnedCache more(type, sequences, 2 * sequences * max_blocks, block_size, 2 * max_blocks, kv_heads, size, expires);
    variant.kernels->kv_allocate(more.view, active.data(), count, sequence.data(), position.data(), slots.data());
    scatter.cache = more.view;
    variant.kernels->kv_scatter(scatter);
    if (expires) {
      for (int64_t i = 0; i < count; ++i) {
        const int32_t row = active[static_cast<size_t>(i)];
        int64_t e = 0;
        for (int64_t j = 0; j < i; ++j)
          e += sequence[static_cast<size_t>(active[static_cast<size_t>(j)])] == sequence[static_cast<size_t>(row)];
        more.until[static_cast<size_t>(slots[static_cast<size_t>(i)])] =
            cache.until[static_cast<size_t>(cache.slot(sequence[static_cast<size_t>(row)], e))];
      }
    }
    variant.kernels->kv_allocate(more.view, late.data(), count, sequence.data(), later_position.data(), slots.data());
    p.cache = more.view;
    std::vector<float> again = poisoned(count * heads * size);
    p.out = again.data();
    variant.kernels->compacted_attention(p);
    report(same(out, again), name + ": later entries change something");
  }
}

void test_allocation(const Variant& variant) {
  OwnedCache cache(KvType::f32, 2, 3, 2, 2, 1, 4, true);
  const int32_t sequence[] = {0, 1, 0, 0, 0, 1, 1}, positions[] = {0, 0, 1, 2, 3, 1, 2};
  int64_t slots[8];
  const auto allocate = [&](int64_t count) {
    return variant.kernels->kv_allocate(cache.view, nullptr, count, sequence, positions, slots);
  };
  report(allocate(4), variant.name + " allocate 4");
  const int64_t expected[] = {0, 2, 1, 4};
  report(std::equal(expected, expected + 4, slots), variant.name + " slots");
  report(cache.used == 3 && cache.lengths == std::vector<int32_t>{3, 1}, variant.name + " lengths");
  const OwnedCache before = cache;
  report(!variant.kernels->kv_allocate(cache.view, nullptr, 3, sequence + 4, positions + 4, slots),
         variant.name + " no block left");
  report(cache.used == 3 && cache.table == before.table && cache.lengths == before.lengths &&
             cache.positions == before.positions && cache.until == before.until,
         variant.name + " a refused allocation changes nothing");
  OwnedCache fresh(KvType::f32, 2, 8, 2, 1, 1, 4, false);
  report(!variant.kernels->kv_allocate(fresh.view, nullptr, 4, sequence, positions, slots) && fresh.used == 0 &&
             fresh.table == std::vector<int32_t>(2, -1) && fresh.lengths == std::vector<int32_t>(2, 0),
         variant.name + " a full table changes nothing");
}

// Sequences that come and go: blocks come back to the free list and are handed out again, a refused call leaves all as
// it was, a table that has a block already keeps it, and entries end where the window does.
void test_free_list(const Variant& variant, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " free list " + std::to_string(seed);
  const int64_t sequences = random.integer(1, 4), blocks = random.integer(2, 9), block_size = random.integer(1, 4),
                max_blocks = random.integer(1, 4);
  OwnedCache cache(KvType::f32, sequences, blocks, block_size, max_blocks, 1, 1, true);
  std::vector<int32_t> free_blocks(static_cast<size_t>(blocks));
  std::iota(free_blocks.begin(), free_blocks.end(), 0);
  std::shuffle(free_blocks.begin(), free_blocks.end(), random.engine);
  cache.view.free_blocks = free_blocks.data();
  cache.view.window = seed % 3 ? random.integer(1, 5) : 0;
  int refused = 0;
  for (int round = 0; round < 60; ++round) {
    const size_t s = static_cast<size_t>(random.integer(0, static_cast<int>(sequences) - 1));
    if (random.integer(0, 2) == 0) {  // this one goes, its blocks in any order, or but for one that stays in the table
      const bool keeps = random.integer(0, 1) == 1;
      for (int64_t c = max_blocks - 1; c >= (keeps ? 1 : 0); --c) {
        int32_t& block = cache.table[s * static_cast<size_t>(max_blocks) + static_cast<size_t>(c)];
        if (block >= 0) free_blocks[static_cast<size_t>(--cache.used)] = block;
        block = -1;
      }
      cache.lengths[s] = 0;
    }
    std::vector<int32_t> sequence, positions;
    const int64_t count = random.integer(1, 6);
    for (int64_t i = 0; i < count; ++i) {
      sequence.push_back(random.integer(0, static_cast<int>(sequences) - 1));
      positions.push_back(random.integer(0, 9) ? random.integer(0, 99) : INT32_MAX - random.integer(0, 5));
    }
    const OwnedCache before = cache;
    const std::vector<int32_t> free_before = free_blocks;
    std::vector<int64_t> slots(static_cast<size_t>(count), -9);
    if (!variant.kernels->kv_allocate(cache.view, nullptr, count, sequence.data(), positions.data(), slots.data())) {
      ++refused;
      report(cache.used == before.used && cache.table == before.table && cache.lengths == before.lengths &&
                 cache.positions == before.positions && cache.until == before.until && free_blocks == free_before,
             name + ": a refused allocation changes nothing");
      continue;
    }
    std::vector<int32_t> lengths = before.lengths, table = before.table;
    int32_t used = before.used;
    for (size_t i = 0; i < slots.size(); ++i) {
      int32_t& length = lengths[static_cast<size_t>(sequence[i])];
      int32_t& block = table[static_cast<size_t>(sequence[i] * max_blocks + length / block_size)];
      if (block < 0) block = free_blocks[static_cast<size_t>(used++)];
      report(slots[i] == block * block_size + length % block_size, name + ": slots");
      const int64_t until = cache.view.window ? int64_t{positions[i]} + cache.view.window : INT32_MAX;
      report(cache.positions[static_cast<size_t>(slots[i])] == positions[i] &&
                 cache.until[static_cast<size_t>(slots[i])] == std::min<int64_t>(until, INT32_MAX),
             name + ": positions and until");
      ++length;
    }
    report(lengths == cache.lengths && table == cache.table && used == cache.used, name + ": table");
    std::vector<int> owners(static_cast<size_t>(blocks), 0);
    for (int32_t block : table) {
      if (block >= 0) ++owners[static_cast<size_t>(block)];
    }
    for (int32_t i = used; i < blocks; ++i) ++owners[static_cast<size_t>(free_blocks[static_cast<size_t>(i)])];
    report(owners == std::vector<int>(static_cast<size_t>(blocks), 1), name + ": each block is somewhere, once");
  }
  report(refused > 0, name + ": some are refused");
}

// Finite numbers that an f16 cache can't hold are told of; others aren't.
void test_overflow(const Variant& variant) {
  const struct {
    float x;
    bool told;
  } cases[] = {{65519, false}, {-65504, false},   {65520, true},      {-65520, true},
               {3e38f, true},  {INFINITY, false}, {-INFINITY, false}, {NAN, false}};
  for (KvType type : {KvType::f16, KvType::bf16, KvType::f32, KvType::i8}) {
    for (const auto& c : cases) {
      for (int64_t at : {0, 15, 16, 18}) {
        for (bool of_key : {true, false}) {
          OwnedCache cache(type, 1, 1, 4, 1, 2, 19, false);
          std::vector<float> key(38, 1.0f), value = key;
          (of_key ? key : value)[static_cast<size_t>(19 + at)] = c.x;
          const int64_t slot = 2;
          int32_t overflow = 0;
          cache.view.overflow = &overflow;
          variant.kernels->kv_scatter({key.data(), value.data(), 38, 38, &slot, 1, cache.view});
          report(overflow == (type == KvType::f16 && c.told), variant.name + " overflow of " + std::to_string(c.x));
          cache.view.overflow = nullptr;
          variant.kernels->kv_scatter({key.data(), value.data(), 38, 38, &slot, 1, cache.view});
        }
      }
    }
  }
}

}  // namespace

void test_attention(const Variant& variant) {
  test_allocation(variant);
  for (uint32_t seed = 0; seed < 20; ++seed) test_free_list(variant, seed);
  test_overflow(variant);
  for (uint32_t seed = 0; seed < 60; ++seed) run_case(variant, seed);
}

}  // namespace check
