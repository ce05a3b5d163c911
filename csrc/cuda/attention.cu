// The host's side of attention: scratch memory, and which kernel runs.
#include "attention.cuh"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

bool aligned(const void* p, int64_t stride_bytes, int64_t alignment) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(stride_bytes)) % static_cast<uintptr_t>(alignment) ==
         0;
}

// sm_75 would have to do it with FMAs and shuffles: slower than the plain kernel.
bool has_bfloat_mma() {
#ifdef QS_EMULATED
  return true;
#else
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "the current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  return major >= 8;
#endif
}

// They have kernels for some sizes, which copy 16 bytes of the cache at once and 8 of queries and results.
bool takes_tensor_cores(const Attention& params) {
  const KvCache& cache = params.cache;
  const bool sized = cache.head_size == 64 || cache.head_size == 80 || cache.head_size == 96 || cache.head_size == 128;
  return sized && cache.type != KvType::f32 && aligned(cache.key, 0, 16) && aligned(cache.value, 0, 16) &&
         aligned(params.query, params.query_stride * 4, 8) && aligned(params.out, params.out_stride * 4, 8) &&
         (cache.type != KvType::bf16 || has_bfloat_mma());
}

// Up to so many queries, the splits of a sequence go to blocks of their own. More queries are enough blocks by
// themselves, and their results would want much scratch. Where there are several queries for each sequence, prefill
// reads an entry once for many of them.
int64_t spread_queries(const KvCache& cache) {
  return cache.sequences * 4 > kDecodeRows ? cache.sequences * 4 : kDecodeRows;
}

int64_t rounded(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Sizes of the three parts. The counters don't depend on the number of queries, so that calls with other numbers find
// them in the same place.
struct ScratchSizes {
  int64_t splits, counters, softmax, values;
};
ScratchSizes scratch_sizes(const Attention& params) {
  const KvCache& cache = params.cache;
  const int64_t most = spread_queries(cache), queries = params.count < most ? params.count : most;
  ScratchSizes sizes;
  sizes.splits = (cache.max_blocks * cache.block_size + kSplit - 1) / kSplit;
  const int64_t parts = sizes.splits > 1 ? queries * params.heads * sizes.splits : 0;
  sizes.counters = rounded(most * params.heads * static_cast<int64_t>(sizeof(int32_t)));
  sizes.softmax = rounded(parts * static_cast<int64_t>(sizeof(float2)));
  sizes.values = parts * cache.head_size * static_cast<int64_t>(sizeof(float));
  return sizes;
}

}  // namespace

int32_t split_blocks(const AttentionScratch& scratch, int64_t others) {
  constexpr int64_t kEnough = 2048;  // blocks that fill any GPU a few times
  const int64_t wanted = others < kEnough ? kEnough / others : 1;
  return static_cast<int32_t>(scratch.splits < 1 ? 1 : scratch.splits < wanted ? scratch.splits : wanted);
}

int64_t attention_scratch_bytes(const Attention& params) {
  const ScratchSizes sizes = scratch_sizes(params);
  return sizes.counters + sizes.softmax + sizes.values;
}

void compacted_attention(const Attention& params, const int32_t* count, void* scratch, Stream stream) {
  if (params.count <= 0) return;
  const ScratchSizes sizes = scratch_sizes(params);
  char* memory = static_cast<char*>(scratch);
  const AttentionScratch parts = {reinterpret_cast<int32_t*>(memory),
                                  reinterpret_cast<float2*>(memory + sizes.counters),
                                  reinterpret_cast<float*>(memory + sizes.counters + sizes.softmax), sizes.splits};
  const bool spread = params.count <= spread_queries(params.cache);
  if (!takes_tensor_cores(params)) return plain_attention(params, count, parts, spread, stream);
  if (spread) return decode_attention(params, count, parts, stream);
  prefill_attention(params, count, stream);
}

}  // namespace quicksilver::QS_CUDA
