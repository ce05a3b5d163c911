// Grouping of adjacent tokens, and weighted means of hidden rows and KV entries.
#include "halting.cuh"
#include "kv_cache.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Groups {
  FusionGroups groups;
  int32_t* count;
  int32_t* counter;
};

// By one warp: whether row t is close enough to row t - 1 to share a group with it, the group's size aside.
QS_DEVICE bool matches(const FusionGroups& p, int64_t t) {
  if (t == 0 || !load(p.fusible + t) || !load(p.fusible + t - 1)) return false;
  if (load(p.sequence + t) != load(p.sequence + t - 1)) return false;
  if (load(p.positions + t) != load(p.positions + t - 1) + 1) return false;
  const float* row = p.hidden + t * p.stride;
  return row_distance(row, row - p.stride, p.d, p.relative) < p.threshold;
}

// By one block: turns `group`, which holds whether each row matches the one before, into the groups' numbers. A run of
// matching rows is cut every max_group rows, so a row starts a group where its place in the run is a multiple of that.
QS_DEVICE void number_groups(const FusionGroups& p, int32_t* groups, int32_t* shared) {
  int32_t* const run_starts = shared;
  int32_t* const counts = shared + kWarps;
  const int32_t max_group = p.max_group > 1 ? p.max_group : 1;
  const unsigned up_to_lane = 0xffffffffu >> (kWarp - 1 - lane());
  int32_t run = 0, number = -1;  // where the run began that goes on into this chunk; the last group's number
  for (int64_t base = 0; base < p.count; base += kThreads) {
    const int32_t t = static_cast<int32_t>(base) + static_cast<int32_t>(threadIdx.x);
    const bool valid = t < p.count;
    const unsigned begins = ballot(valid && load(p.group + t) == 0);
    const int32_t of_warp = static_cast<int32_t>(base) + warp() * kWarp;
    const auto last_of = [&](unsigned votes) { return votes ? of_warp + 31 - __builtin_clz(votes) : -1; };
    if (lane() == 0) store_shared(run_starts + warp(), last_of(begins));
    sync_block();
    int32_t start = run;
    for (int w = 0; w < kWarps; ++w) {
      const int32_t last = load_shared(run_starts + w);
      if (w < warp()) start = last > start ? last : start;
      run = last > run ? last : run;
    }
    const int32_t own = last_of(begins & up_to_lane);
    start = own > start ? own : start;

    const unsigned heads = ballot(valid && (t - start) % max_group == 0);
    if (lane() == 0) store_shared(counts + warp(), __builtin_popcount(heads));
    sync_block();
    int32_t before = number;
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = load_shared(counts + w);
      if (w < warp()) before += count;
      number += count;
    }
    if (valid) store(p.group + t, before + __builtin_popcount(heads & up_to_lane));
  }
  if (threadIdx.x == 0) store(groups, number + 1);
}

// A warp per row compares it with the one before; whichever block is last numbers the groups.
QS_KERNEL void __launch_bounds__(kThreads) fusion_groups_kernel(Groups p) {
  int32_t* shared = shared_memory<int32_t>();
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp();
  if (t < p.groups.count) {
    const bool joins = matches(p.groups, t);
    if (lane() == 0) store(p.groups.group + t, static_cast<int32_t>(joins));
  }
  bool* is_last = reinterpret_cast<bool*>(shared + 2 * kWarps);
  if (last_block(p.counter, static_cast<int>(gridDim.x), is_last)) number_groups(p.groups, p.count, shared);
}

struct Reduce {
  const float* hidden;
  int64_t stride;
  const float* weight;
  const int32_t* group;
  int64_t count;
  int64_t d;
  float* fused;
  int64_t groups;
};

// A block per row; those whose row is not the first of its group have nothing to do.
QS_KERNEL void __launch_bounds__(kThreads) fusion_reduce_kernel(Reduce p) {
  const int64_t begin = blockIdx.x;
  const int32_t group = load(p.group + begin);
  if (group < 0 || group >= p.groups) return;
  if (begin > 0 && load(p.group + begin - 1) == group) return;
  float total = 0;
  int64_t end = begin;
  for (; end < p.count && load(p.group + end) == group; ++end) total = add_rn(total, load(p.weight + end));
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    float sum = 0;
    for (int64_t t = begin; t < end; ++t) {
      sum = add_rn(sum, mul_rn(load(p.weight + t), load(p.hidden + t * p.stride + k)));
    }
    store(p.fused + group * p.d + k, div_rn(sum, total));
  }
}

struct Expand {
  const float* fused;
  int64_t groups;
  const int32_t* group;
  int64_t d;
  float* hidden;
  int64_t stride;
};

QS_KERNEL void __launch_bounds__(kThreads) fusion_expand_kernel(Expand p) {
  const int64_t t = blockIdx.x, group = load(p.group + t);
  const bool exists = group >= 0 && group < p.groups;
  const float* from = p.fused + group * p.d;
  for (int64_t k = threadIdx.x; k < p.d; k += kThreads) {
    store(p.hidden + t * p.stride + k, exists ? load(from + k) : 0.0f);
  }
}

// A warp merges one head's keys or values of all items, in order: an item may read what an earlier one wrote.
template <KvType kType>
QS_DEVICE void merge_vectors(const KvMerge& p, void* array, float* scales, int64_t head, const float* cosine,
                             const float* sine) {
  const KvCache& cache = p.cache;
  const int64_t size = cache.head_size, half = size / 2;
  float* const merged = shared_memory<float>();
  for (int64_t item = 0; item < p.count; ++item) {
    const int64_t slots[] = {load(p.destination + item), load(p.first + item), load(p.second + item)};
    if (!has_slot(cache, slots[0]) || !has_slot(cache, slots[1]) || !has_slot(cache, slots[2])) continue;
    const int64_t to = kv_vector(cache, slots[0], head);
    const int64_t a = kv_vector(cache, slots[1], head);
    const int64_t b = kv_vector(cache, slots[2], head);
    const float first = load(p.weight_first + item), second = load(p.weight_second + item);
    const float total = add_rn(first, second);
    const int64_t turn = cosine ? load(p.distance + item) * half : 0;
    const float a_scale = kType == KvType::i8 ? load(scales + a) : 1.0f;
    const float b_scale = kType == KvType::i8 ? load(scales + b) : 1.0f;
    const auto element = [&](int64_t vector, float scale, int64_t k) {
      const float x = load_element<kType>(array, vector * size + k);
      return kType == KvType::i8 ? mul_rn(scale, x) : x;
    };
    for (int64_t k = lane(); k < size; k += kWarp) {
      float x = element(a, a_scale, k);
      if (cosine) {
        const int64_t angle = turn + (k < half ? k : k - half);
        const float y = element(a, a_scale, k < half ? k + half : k - half);
        const float along = mul_rn(x, load(cosine + angle)), across = mul_rn(y, load(sine + angle));
        x = k < half ? sub_rn(along, across) : add_rn(along, across);
      }
      const float y = element(b, b_scale, k);
      store_shared(merged + k, div_rn(add_rn(mul_rn(first, x), mul_rn(second, y)), total));
    }
    sync_warp();  // all is read before anything is written: the destination may be one of the two
    store_vector<kType>(array, scales, to, size, cache.overflow, [&](int64_t k) { return load_shared(merged + k); });
    sync_warp();
  }
}

// Blocks of one warp: one per head for the keys, and one per head for the values.
QS_KERNEL void __launch_bounds__(kWarp) kv_merge_kernel(KvMerge p) {
  const int64_t head = blockIdx.x;
  for_kv_type(p.cache.type, [&]<KvType kType>() {
    if (blockIdx.y == 0) {
      merge_vectors<kType>(p, p.cache.key, p.cache.key_scale, head, p.cosine, p.sine);
    } else {
      merge_vectors<kType>(p, p.cache.value, p.cache.value_scale, head, nullptr, nullptr);
    }
  });
}

}  // namespace

int64_t fusion_scratch_bytes(const FusionGroups&) { return sizeof(int32_t); }

void fusion_groups(const FusionGroups& params, int32_t* groups, void* scratch, Stream stream) {
  const Dim grid = blocks_in_x(params.count > 0 ? params.count : 1, kWarps);  // no rows make 0 groups
  launch("fusion_groups", fusion_groups_kernel, grid, kThreads, (2 * kWarps + 1) * sizeof(int32_t), stream,
         Groups{params, groups, static_cast<int32_t*>(scratch)});
}

void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                   int64_t d, float* fused, int64_t groups, Stream stream) {
  launch("fusion_reduce", fusion_reduce_kernel, blocks_in_x(count), kThreads, 0, stream,
         Reduce{hidden, stride, weight, group, count, d, fused, groups});
}

void fusion_expand(const float* fused, int64_t groups, const int32_t* group, int64_t count, int64_t d, float* hidden,
                   int64_t stride, Stream stream) {
  launch("fusion_expand", fusion_expand_kernel, blocks_in_x(count), kThreads, 0, stream,
         Expand{fused, groups, group, d, hidden, stride});
}

void kv_merge(const KvMerge& params, Stream stream) {
  const Dim grid{params.count > 0 ? blocks_in_x(params.cache.kv_heads).x : 0, 2};
  launch("kv_merge", kv_merge_kernel, grid, kWarp, params.cache.head_size * static_cast<int64_t>(sizeof(float)), stream,
         params);
}

}  // namespace quicksilver::QS_CUDA
