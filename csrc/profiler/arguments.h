// The command line of quicksilver_profile.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "quicksilver/kv_cache.h"

namespace profiler {

struct Shape {
  std::string name;
  int64_t layers = 0, d = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0, vocab = 0;
  bool llama = true;  // RMS norm, rotary embedding, gated MLP; else GPT-2's layer norm, biases and GELU
  int64_t group = 64;
};

enum class Kernel {
  quantize_rows,
  matryoshka_gemm,
  kv_scatter,
  halting_update,
  fusion_groups,
  fusion_reduce,
  attention_input,  // the five stages, in their order
  attention,
  attention_output,
  mlp_input,
  mlp_output,
  lm_head,
  decode,  // all layers and the head, a new token for each of `rows` sequences
  prefill  // all layers for a prompt of `rows` tokens, and the head for its last one
};

struct Arguments {
  Kernel kernel = Kernel::decode;
  std::string kernel_name;
  std::string backend = "cpu";
  Shape shape;
  std::string matrix = "up";
  int64_t rows = 1;
  int64_t sequences = 1;  // that the rows belong to, evenly
  int64_t context = 0;
  double halting_ratio = 0;
  double fusion_ratio = 0;
  double int4_share = 0;
  std::string precision = "int8";
  std::string kv_type_name = "f32";
  quicksilver::KvType kv_type = quicksilver::KvType::f32;
  int64_t threads = 0;  // 0: as many as the pool takes by itself
  int64_t warmup = 3;
  int64_t repeat = 20;
  bool cold_cache = false;
  bool check = true;
  int64_t seed = 1;
  std::string json;  // a file, "-" for stdout, or "" for a table
  bool help = false;

  bool step() const { return kernel == Kernel::decode || kernel == Kernel::prefill; }
  bool stage() const { return kernel >= Kernel::attention_input && kernel <= Kernel::mlp_output; }
  // Rows that take part: those that haven't halted.
  int64_t active_rows() const;
  // Rows that go on after fusion.
  int64_t fused_rows() const;
  bool has_low_plane() const { return precision != "int4"; }
};

// What a user got wrong, in one line.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Arguments parse(const std::vector<std::string>& words);
std::string usage();

}  // namespace profiler
