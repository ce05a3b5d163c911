// A random layer and head, for tests that run whole stages.
#pragma once

#include <memory>

#include "check.h"
#include "quicksilver/layer.h"

namespace check {

using quicksilver::Activation;
using quicksilver::KvType;
using quicksilver::Layer;
using quicksilver::Linear;
using quicksilver::Norm;
using quicksilver::NormKind;

struct Shape {
  const char* name;
  int64_t d, heads, kv_heads, head_size, ffn;
  bool llama;
  int group;
  KvType type;
  Activation activation = Activation::gelu_tanh;  // unless llama
  bool head_norms = false;
  bool attention_biases = false;  // those of q, k and v; of a gpt2 all linears have one
};

struct Model {
  Shape shape;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<std::vector<float>> vectors;
  Layer layer;
  Linear head;
  static constexpr int64_t kPositions = 64;

  Model(Random& random, const Shape& s, int64_t vocabulary) : shape(s) {
    layer.d = s.d;
    layer.heads = s.heads;
    layer.kv_heads = s.kv_heads;
    layer.head_size = s.head_size;
    layer.ffn = s.ffn;
    layer.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_size));
    const auto vector = [&](int64_t n, float around) {
      vectors.push_back(random.normals(n, 0.1f));
      for (float& v : vectors.back()) v += around;
      return vectors.back().data();
    };
    const auto linear = [&](int64_t n, int64_t k, bool biased) {
      weights.push_back(std::make_unique<Weight>(random_weight(random, n, k, s.group)));
      return Linear{weights.back()->view(), biased ? vector(n, 0) : nullptr};
    };
    const int64_t query = s.heads * s.head_size, key = s.kv_heads * s.head_size;
    layer.q = linear(query, s.d, !s.llama || s.attention_biases);
    layer.k = linear(key, s.d, !s.llama || s.attention_biases);
    layer.v = linear(key, s.d, !s.llama || s.attention_biases);
    layer.o = linear(s.d, query, !s.llama);
    if (s.llama) layer.gate = linear(s.ffn, s.d, false);
    layer.up = linear(s.ffn, s.d, !s.llama);
    layer.down = linear(s.d, s.ffn, !s.llama);
    head = linear(vocabulary, s.d, false);
    layer.activation = s.llama ? Activation::silu_gated : s.activation;
    for (Norm* norm : {&layer.attention_norm, &layer.mlp_norm}) {
      norm->kind = s.llama ? NormKind::rms : NormKind::layer;
      norm->weight = vector(s.d, 1);
      norm->bias = s.llama ? nullptr : vector(s.d, 0);
    }
    if (s.head_norms) {
      layer.q_norm = {NormKind::rms, vector(s.head_size, 1), nullptr, 1e-2f};
      layer.k_norm = {NormKind::rms, vector(s.head_size, 1), nullptr, 1e-3f};
    }
    if (s.llama) {
      const std::vector<float> angles = random.normals(kPositions * (s.head_size / 2));
      for (const bool cosine : {true, false}) {
        vectors.push_back(angles);
        for (float& v : vectors.back()) v = cosine ? std::cos(v) : std::sin(v);
        (cosine ? layer.cosine : layer.sine) = vectors.back().data();
      }
    }
  }
};

}  // namespace check
