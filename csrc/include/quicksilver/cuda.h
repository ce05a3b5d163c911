// The CUDA kernels: the same parameters as the CPU's, every pointer in them a device pointer.
//
// Indices that only the device sees aren't trusted: a slot, a block of the table or a sequence that doesn't exist is
// neither read nor written (and is no room, where room was asked for).
//
// Nothing here synchronises with the host. A number of rows may live on the device: `count` points to it, null meaning
// the bound that the parameters give (their `count` or `rows`), which sizes the grid either way. Work goes to `stream`;
// a bad launch throws std::runtime_error naming the kernel.
//
// QS_CUDA names the namespace: `cuda`, or `emulated` for the same sources run on the host (csrc/emulator), where device
// pointers are host pointers and a launch returns when the kernel has ended.
#pragma once

#include <cstdint>

#include "quicksilver/attention.h"
#include "quicksilver/fusion.h"
#include "quicksilver/halting.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/layer.h"
#include "quicksilver/matryoshka.h"

#ifndef QS_CUDA
#define QS_CUDA cuda
#endif

namespace quicksilver::QS_CUDA {

using Stream = void*;  // a cudaStream_t

// Up to so many rows a GEMM is bound by the weights' bytes: the decode kernels. More rows take the prefill kernels.
// Both give a row the same bits.
constexpr int64_t kDecodeRows = 32;

// Makes a device the calling thread's current one, where launches and allocations go, until the guard's end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // throws std::runtime_error where there is no such device
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

// --- memory, for callers without a framework (the profiler, tests) ---------------------------------------------------
void* allocate(int64_t bytes);  // zeroed; throws std::bad_alloc
void release(void* memory);
void copy_in(void* device, const void* host, int64_t bytes, Stream stream);
void copy_out(void* host, const void* device, int64_t bytes, Stream stream);
void synchronize(Stream stream);

// --- mechanisms ------------------------------------------------------------------------------------------------------
void quantize_rows(const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out,
                   const int32_t* count, Stream stream);

// Bits equal to the CPU's. Planes and scales must be aligned to 16 bytes, quantized rows to 8.
void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count, Stream stream);

// next_count: [1]. Where `active` is null, rows that `halted` has already aren't judged; their drift is 0.
// `next_active` may be `active`, and `next_count` `count`. `scratch`: zero before its first use; kernels
// leave it zero.
int64_t halting_scratch_bytes(const HaltingUpdate& params);
void halting_update(const HaltingUpdate& params, const int32_t* count, int32_t* next_count, void* scratch,
                    Stream stream);
void softmax_entropy(const float* x, int64_t stride, const int32_t* index, int64_t rows, int64_t d, float* out,
                     const int32_t* count, Stream stream);

// Where there is no room for a row its slot is -1, and *full (may be null) becomes 1; the other rows are served.
void kv_allocate(const KvCache& cache, const int32_t* index, int64_t rows, const int32_t* sequence,
                 const int32_t* positions, int64_t* slots, const int32_t* count, int32_t* full, Stream stream);
void kv_scatter(const KvScatter& params, const int32_t* count, Stream stream);
void kv_merge(const KvMerge& params, Stream stream);

// Splits of a fixed number of entries, merged in order by the last block: a row's bits depend on nothing else.
// Zero before its first use; kernels leave its counters zero. Their place depends on the numbers of sequences and
// heads: scratch memory serves calls with the same ones.
int64_t attention_scratch_bytes(const Attention& params);
void compacted_attention(const Attention& params, const int32_t* count, void* scratch, Stream stream);

// groups: [1]. `scratch`: zero before its first use; kernels leave it zero.
int64_t fusion_scratch_bytes(const FusionGroups& params);
void fusion_groups(const FusionGroups& params, int32_t* groups, void* scratch, Stream stream);
// fused has `groups` rows: as many as there are groups or, where only the device knows that number, more. Rows that are
// no group's are left as they are.
void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                   int64_t d, float* fused, int64_t groups, Stream stream);
// hidden[t] = fused[group[t]]: every member gets its group's row back. Zeros where there is no such group.
void fusion_expand(const float* fused, int64_t groups, const int32_t* group, int64_t count, int64_t d, float* hidden,
                   int64_t stride, Stream stream);

// --- the five stages -------------------------------------------------------------------------------------------------
// Each one launch for at most kDecodeRows rows, a few for more.

// Work memory of a batch, carved out of one buffer (zero before its first use). Row i of a buffer is active row i.
struct DeviceWorkspace {
  float* previous = nullptr;     // [rows, d]: the rows as they came into the layer
  float* q = nullptr;            // [rows, heads * head_size], after the rotary embedding
  float* k = nullptr;            // [rows, kv_heads * head_size], after the rotary embedding
  float* v = nullptr;            // [rows, kv_heads * head_size]
  float* attention = nullptr;    // [rows, heads * head_size]
  float* inner = nullptr;        // [rows, ffn]: after the activation
  float* gate = nullptr;         // [rows, ffn]: prefill only
  int64_t* slots = nullptr;      // [rows]
  int32_t* full = nullptr;       // [1]: 1 where a row found no room in the cache
  float* drift = nullptr;        // [rows]
  float* drift_parts = nullptr;  // [rows, ceil(d / 16), 2]: squared norms of the step and of the state before it
  void* quantized = nullptr;     // quantized rows of the widest stage
  void* attention_scratch = nullptr;
  int32_t* counters = nullptr;  // [kCounters], zero between launches
  // What it was carved for. The stages throw std::invalid_argument, before any launch, where a call wants more.
  int64_t rows = 0, sequences = 0, max_entries = 0;
  int64_t d = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0;
};
constexpr int64_t kCounters = 4096;
// std::invalid_argument for more heads than the counters are for, about 4000.
// sequences: as many as the cache has that will be used. max_entries: the most entries that one of them may have.
int64_t workspace_bytes(const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries);
DeviceWorkspace carve_workspace(void* buffer, const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries);

// What stage 5 decides, on the device: rows.active and *count are compacted in place.
struct DeviceHalting {
  float drift_threshold = 0;
  bool relative = true;
  bool tests_entropy = false;  // of softmax over the hidden vector ("latent"), in bits
  float entropy_threshold = 0;
  int32_t sink_tokens = 0;
  const int8_t* overrides = nullptr;  // [rows] or null
  uint8_t* halted = nullptr;          // [rows]
  int32_t* active = nullptr;          // [count]: rows.active, writable
  int32_t* count = nullptr;           // [1]
};

void attention_input(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
                     const DeviceWorkspace& work, Stream stream);
// The K/V part of stage 1 alone, for rows that only leave an entry.
void write_kv(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
              const DeviceWorkspace& work, Stream stream);
// log_sum_exp: [rows, heads] or null
void attention(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache,
               const DeviceWorkspace& work, float* log_sum_exp, Stream stream);
void attention_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work,
                      Stream stream);
void mlp_input(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work, Stream stream);
// depth: [rows] or null: goes up by one for every active row. halting: null where nobody is judged.
void mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const DeviceWorkspace& work, int32_t* depth,
                const DeviceHalting* halting, Stream stream);
void lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d, float* logits,
             int64_t logits_stride, const DeviceWorkspace& work, Stream stream);

}  // namespace quicksilver::QS_CUDA
