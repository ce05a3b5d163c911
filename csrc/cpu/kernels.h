// The list of CPU kernels that are compiled once per instruction set, and the table of function pointers made of it.
//
// Each name below is declared in csrc/include/quicksilver and defined in quicksilver::<instruction set> by csrc/cpu. A
// call from one kernel source to another is written QS_ISA::name(...): a bare name would also find the public function.
#pragma once

#include "quicksilver/attention.h"
#include "quicksilver/ceilings.h"
#include "quicksilver/decode_step.h"
#include "quicksilver/fusion.h"
#include "quicksilver/gguf.h"
#include "quicksilver/halting.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/layer.h"
#include "quicksilver/matryoshka.h"
#include "quicksilver/runtime.h"

// X(result, name, parameters, arguments)
#define QS_KERNELS(X)                                                                                          \
  X(void, quantize_rows, (const float* x, int64_t x_stride, const int32_t* index, const QuantizedRows& out),   \
    (x, x_stride, index, out))                                                                                 \
  X(void, matryoshka_pack, (const MatryoshkaPack& params), (params))                                           \
  X(void, gguf_dequantize, (const uint8_t* blocks, int64_t count, GgufType type, float* values),               \
    (blocks, count, type, values))                                                                             \
  X(void, matryoshka_gemm, (const MatryoshkaGemm& params), (params))                                           \
  X(void, matryoshka_gemm_many, (const MatryoshkaGemm* params, int count), (params, count))                    \
  X(int64_t, halting_update, (const HaltingUpdate& params), (params))                                          \
  X(void, softmax_entropy,                                                                                     \
    (const float* x, int64_t stride, const int32_t* index, int64_t count, int64_t d, float* out),              \
    (x, stride, index, count, d, out))                                                                         \
  X(bool, kv_allocate,                                                                                         \
    (KvCache & cache, const int32_t* index, int64_t count, const int32_t* sequence, const int32_t* positions,  \
     int64_t* slots),                                                                                          \
    (cache, index, count, sequence, positions, slots))                                                         \
  X(void, kv_scatter, (const KvScatter& params), (params))                                                     \
  X(void, compacted_attention, (const Attention& params), (params))                                            \
  X(int64_t, fusion_groups, (const FusionGroups& params), (params))                                            \
  X(void, fusion_reduce,                                                                                       \
    (const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count, int64_t d, \
     float* fused, int64_t groups),                                                                            \
    (hidden, stride, weight, group, count, d, fused, groups))                                                  \
  X(void, fusion_expand,                                                                                       \
    (const float* fused, const int32_t* group, int64_t count, int64_t d, float* hidden, int64_t stride),       \
    (fused, group, count, d, hidden, stride))                                                                  \
  X(void, kv_merge, (const KvMerge& params), (params))                                                         \
  X(bool, attention_input, (const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work),            \
    (layer, rows, cache, work))                                                                                \
  X(bool, write_kv, (const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work),                   \
    (layer, rows, cache, work))                                                                                \
  X(void, attention,                                                                                           \
    (const Layer& layer, const Rows& rows, const KvCache& cache, Workspace& work, float* log_sum_exp),         \
    (layer, rows, cache, work, log_sum_exp))                                                                   \
  X(void, attention_output, (const Layer& layer, const Rows& rows, Workspace& work), (layer, rows, work))      \
  X(void, mlp_input, (const Layer& layer, const Rows& rows, Workspace& work), (layer, rows, work))             \
  X(void, mlp_output, (const Layer& layer, const Rows& rows, Workspace& work), (layer, rows, work))            \
  X(int64_t, run_layers,                                                                                       \
    (const Layer* const* layers, KvCache* const* caches, int64_t count, const Rows& rows, Workspace& work),    \
    (layers, caches, count, rows, work))                                                                       \
  X(void, lm_head,                                                                                             \
    (const Norm& norm, const Linear& head, const Rows& rows, int64_t d, float* logits, int64_t logits_stride,  \
     Workspace& work),                                                                                         \
    (norm, head, rows, d, logits, logits_stride, work))                                                        \
  X(bool, decode_step, (const DecodeStep& step, Workspace& work), (step, work))                                \
  X(int64_t, argmax, (const float* x, int64_t n), (x, n))                                                      \
  X(double, read_ceiling, (const void* data, size_t bytes), (data, bytes))                                     \
  X(double, int8_ceiling, (), ())

namespace quicksilver {

struct Kernels {
#define QS_POINTER(result, name, parameters, arguments) result(*name) parameters;
  QS_KERNELS(QS_POINTER)
#undef QS_POINTER
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512vnni();

// Adds to the counters; called once per kernel call, by the calling thread.
void count(const Counters& delta);

// Bytes of a core's second-level cache; 1 MiB where the system doesn't say.
int64_t second_level_cache();

#ifdef QS_ISA
namespace QS_ISA {
#define QS_DECLARE(result, name, parameters, arguments) result name parameters;
QS_KERNELS(QS_DECLARE)
#undef QS_DECLARE
}  // namespace QS_ISA
#endif

}  // namespace quicksilver
