// Slots for new entries, and the writing of keys and values to them.
#include "kv_cache.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

struct Allocate {
  KvCache cache;
  const int32_t* index;
  int64_t rows;
  const int32_t* sequence;
  const int32_t* positions;
  int64_t* slots;
  const int32_t* count;
  int32_t* full;
};

// One block: rows get their slots in order.
QS_KERNEL void __launch_bounds__(kAllocateThreads) kv_allocate_kernel(Allocate p) {
  const int64_t count = p.count ? load(p.count) : p.rows;
  allocate_slots(p.cache, p.index, count, p.sequence, p.positions, p.slots, p.full, shared_memory<int32_t>());
}

constexpr int kThreads = 256;
constexpr int kVectorsPerBlock = kThreads / kWarp;

struct Scatter {
  KvScatter scatter;
  const int32_t* count;
};

// A warp per row and head.
QS_KERNEL void __launch_bounds__(kThreads) kv_scatter_kernel(Scatter p) {
  const KvScatter& scatter = p.scatter;
  const KvCache& cache = scatter.cache;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kVectorsPerBlock + warp();
  const int64_t row = vector / cache.kv_heads, head = vector % cache.kv_heads;
  if (row >= (p.count ? load(p.count) : scatter.count)) return;  // whole warps, which share nothing
  const float* key = scatter.key + row * scatter.key_stride + head * cache.head_size;
  const float* value = scatter.value + row * scatter.value_stride + head * cache.head_size;
  const bool zeros = scatter.key == nullptr;
  scatter_vector(
      cache, load(scatter.slots + row), head, [&](int64_t k) { return zeros ? 0.0f : load(key + k); },
      [&](int64_t k) { return zeros ? 0.0f : load(value + k); });
}

}  // namespace

void kv_allocate(const KvCache& cache, const int32_t* index, int64_t rows, const int32_t* sequence,
                 const int32_t* positions, int64_t* slots, const int32_t* count, int32_t* full, Stream stream) {
  launch("kv_allocate", kv_allocate_kernel, Dim{1}, kAllocateThreads, kAllocateShared * sizeof(int32_t), stream,
         Allocate{cache, index, rows, sequence, positions, slots, count, full});
}

void kv_scatter(const KvScatter& params, const int32_t* count, Stream stream) {
  const int64_t vectors = params.count * params.cache.kv_heads;
  launch("kv_scatter", kv_scatter_kernel, blocks_in_x(vectors, kVectorsPerBlock), kThreads, 0, stream,
         Scatter{params, count});
}

}  // namespace quicksilver::QS_CUDA
