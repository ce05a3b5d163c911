// The five stages of a decoder layer, composed of the mechanisms' kernels. One call each.
//
// Rows live in `hidden` by their number in the batch; `active` lists the rows that take part, so a halted row is in no
// GEMM, no attention and no cache write. Work buffers are compact: their row i belongs to row active[i].
#pragma once

#include <cstdint>

#include "quicksilver/attention.h"
#include "quicksilver/kv_cache.h"
#include "quicksilver/matryoshka.h"

namespace quicksilver {

enum class NormKind : int32_t { rms = 0, layer = 1 };
// What comes of the MLP's inner product: silu(gate) * up, or a function of up alone. gelu is x * Phi(x) by erf.
enum class Activation : int32_t { silu_gated = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

struct Norm {
  NormKind kind = NormKind::rms;
  const float* weight = nullptr;
  const float* bias = nullptr;  // layer norm only
  float eps = 1e-5f;
};

struct Linear {
  MatryoshkaWeight weight;
  const float* bias = nullptr;
};

struct Layer {
  int64_t d = 0;  // hidden size
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_size = 0;
  int64_t ffn = 0;
  Activation activation = Activation::silu_gated;
  Norm attention_norm;
  Linear q, k, v, o;
  Norm q_norm, k_norm;  // rms, over each head on its own, before the rotary embedding; no weight: none
  Norm mlp_norm;
  Linear gate, up, down;          // gate: silu_gated only
  const float* cosine = nullptr;  // [max_positions, head_size / 2]; null: no rotary embedding
  const float* sine = nullptr;
  float attention_scale = 1;
};

struct Rows {
  float* hidden = nullptr;  // [rows, d]
  int64_t rows = 0;
  const int32_t* active = nullptr;  // [count], ascending
  int64_t count = 0;
  const int32_t* positions = nullptr;  // [rows]
  const int32_t* sequence = nullptr;   // [rows]
  const int32_t* bits = nullptr;       // [rows], 8 or 4; null: all that the weight has
  const int64_t* slots = nullptr;      // [count] cache slots, given out already; null: stage 1 takes the next ones
};

// Work memory of one step; grows as needed, so that steps of one size allocate once.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  // Sizes for `count` active rows of this layer. Keeps contents only where nothing grew.
  void reserve(const Layer& layer, int64_t count);

  float* previous = nullptr;   // [count, d]: the rows as they came into the layer (attention_input fills it)
  float* q = nullptr;          // [count, heads * head_size], after the rotary embedding
  float* k = nullptr;          // [count, kv_heads * head_size], after the rotary embedding
  float* v = nullptr;          // [count, kv_heads * head_size]
  float* attention = nullptr;  // [count, heads * head_size]
  float* gate = nullptr;       // [count, ffn]
  float* up = nullptr;         // [count, ffn]
  int32_t* bits = nullptr;     // [count]
  int64_t* slots = nullptr;    // [count]: where attention_input wrote keys and values
  void* quantized = nullptr;   // QuantizedRows of the widest stage

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// 1: norm -> quantize -> q, k, v -> rotary -> new cache entries. Returns false, with nothing written, where the cache
// is full.
bool attention_input(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work);
// The K/V part of stage 1 alone, for rows that only leave an entry (kv_policy propagate).
bool write_kv(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work);
// 2: work.attention from work.q and the cache. log_sum_exp: [count, heads] or null.
void attention(const Layer& layer, const Rows& rows, const KvCache& cache, Workspace& work,
               float* log_sum_exp = nullptr);
// 3: hidden += o(work.attention)
void attention_output(const Layer& layer, const Rows& rows, Workspace& work);
// 4: norm -> quantize -> gate and up (or up)
void mlp_input(const Layer& layer, const Rows& rows, Workspace& work);
// 5: hidden += down(activation(gate, up))
void mlp_output(const Layer& layer, const Rows& rows, Workspace& work);

// All five stages of each of `count` layers, where nothing has to be decided between them. Returns how many layers ran:
// fewer than `count` where the next one's cache is full.
int64_t run_layers(const Layer* const* layers, KvCache* const* caches, int64_t count, const Rows& rows,
                   Workspace& work);

// Final norm and head for the active rows: logits[i, n], always with all bits that the head's weight has.
void lm_head(const Norm& norm, const Linear& head, const Rows& rows, int64_t d, float* logits, int64_t logits_stride,
             Workspace& work);

// Index of the largest value, the first of equals; NaN counts as largest, as in torch.argmax.
int64_t argmax(const float* x, int64_t n);

}  // namespace quicksilver
