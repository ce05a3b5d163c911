#include "check.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "plain.h"

namespace profiler {
namespace {

// Rounding, and now and then a value that quantizes to the neighbouring code.
constexpr double kProduct = 1e-3, kFloat = 1e-4;

class Check {
 public:
  explicit Check(Problem& problem)
      : p_(problem), a_(problem.arguments), s_(problem.arguments.shape), before_(problem.hidden) {}

  std::vector<Finding> run() {
    p_.restore();
    if (a_.step()) {
      step();
      return findings_;
    }
    p_.run();
    switch (a_.kernel) {
      case Kernel::quantize_rows:
        quantize_rows();
        break;
      case Kernel::matryoshka_gemm:
        gemm();
        break;
      case Kernel::kv_scatter:
        kv_scatter();
        break;
      case Kernel::halting_update:
        halting_update();
        break;
      case Kernel::fusion_groups:
        exact("groups", p_.memory.download(p_.fusion.group, a_.rows) == p_.group_of &&
                            p_.memory.download(p_.groups, 1)[0] == a_.fused_rows());
        break;
      case Kernel::fusion_reduce:
        fusion_reduce();
        break;
      case Kernel::lm_head:
        lm_head(p_.taking_part, p_.hidden);
        break;
      default:
        stage(a_.kernel);
        break;
    }
    return findings_;
  }

 private:
  void exact(const std::string& what, bool same) { findings_.push_back({what, same ? 0.0 : 1.0, 0, 1}); }
  void close(const std::string& what, const Error& error, double most) {
    findings_.push_back({what, error.values() > 0 ? error.value() : 0, most, error.values()});
  }

  // Up to three places among n: the ends and the middle.
  static std::vector<size_t> some(size_t n) {
    std::set<size_t> places;
    if (n > 0) places = {0, n / 2, n - 1};
    return {places.begin(), places.end()};
  }
  // Up to about 50 columns of n, the ends among them.
  static std::vector<int64_t> columns(int64_t n) {
    std::set<int64_t> chosen = {0, n - 1};
    for (int64_t i = 0; i < 48; ++i) chosen.insert(i * 7919 % n);
    return {chosen.begin(), chosen.end()};
  }
  bool eight(int64_t row) const { return p_.bits[static_cast<size_t>(row)] == 8; }
  Row row_of(const std::vector<float>& x, int64_t row, int64_t width) const {
    return {x.begin() + row * width, x.begin() + (row + 1) * width};
  }

  // The quantized rows as real numbers.
  std::vector<float> dequantized() {
    const QuantizedRows& q = p_.quantized;
    const auto codes = p_.memory.download(q.q, q.rows * q.k_padded);
    const auto scale = p_.memory.download(q.scale, q.rows * q.groups);
    std::vector<float> x;
    for (int64_t row = 0; row < q.rows; ++row) {
      for (int64_t k = 0; k < q.k; ++k) {
        const auto at = static_cast<size_t>(row * q.k_padded + k);
        x.push_back(scale[static_cast<size_t>(row * q.groups + k / q.group)] * static_cast<float>(codes[at]));
      }
    }
    return x;
  }

  void quantize_rows() {
    const std::vector<float> got = dequantized();
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      const Row want = quantized_row(row_of(p_.hidden, p_.taking_part[i], s_.d), s_.group);
      for (size_t k = 0; k < want.size(); ++k) error.add(double{got[i * want.size() + k]}, want[k]);
    }
    close("quantized rows", error, kFloat);
  }

  void gemm() {
    const std::vector<float> x = dequantized();
    const MatryoshkaGemm& gemm = p_.gemm;
    const PlainWeight weight(p_.memory, {gemm.w, gemm.bias});
    const auto y = p_.memory.download(gemm.y, a_.rows * gemm.y_stride);
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      const Row row = row_of(x, static_cast<int64_t>(i), gemm.w.k);
      const bool all_bits = gemm.bits == nullptr || eight(p_.taking_part[i]);
      for (const int64_t n : columns(gemm.w.n)) {
        error.add(double{y[i * static_cast<size_t>(gemm.y_stride) + static_cast<size_t>(n)]},
                  weight.dot(n, row, all_bits));
      }
    }
    close("y", error, kFloat);
  }

  double storage_error() const { return a_.kv_type == KvType::f32 ? 0 : a_.kv_type == KvType::f16 ? 1e-3 : 1e-2; }

  void kv_scatter() {
    const auto slots = p_.memory.download(p_.scatter.slots, a_.rows);
    PlainCache cache(p_.memory, p_.caches[0]);
    const int64_t width = s_.kv_heads * s_.head_size;
    Error error;
    for (const bool value : {false, true}) {
      const auto x = p_.memory.download(value ? p_.scatter.value : p_.scatter.key, a_.rows * width);
      for (const size_t i : some(p_.taking_part.size())) {
        compare_entry(cache, value, slots[i], row_of(x, static_cast<int64_t>(i), width), error);
      }
    }
    close("entries", error, storage_error());
  }
  void compare_entry(PlainCache& cache, bool value, int64_t slot, const Row& want, Error& error) {
    for (int64_t head = 0; head < s_.kv_heads; ++head) {
      const Row got = cache.vector(value, slot, head);
      for (size_t i = 0; i < got.size(); ++i) error.add(got[i], want[static_cast<size_t>(head * s_.head_size) + i]);
    }
  }

  void halting_update() {
    halted_rows();
    const auto previous = p_.memory.download(p_.halting.previous, a_.rows * s_.d);
    const auto drift = p_.memory.download(p_.halting.drift, a_.rows);
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      double step = 0, base = 0;
      for (int64_t k = p_.taking_part[i] * s_.d; k < (p_.taking_part[i] + 1) * s_.d; ++k) {
        const double before = double{previous[static_cast<size_t>(k)]};
        step += std::pow(double{p_.hidden[static_cast<size_t>(k)]} - before, 2);
        base += before * before;
      }
      error.add(double{drift[i]}, std::sqrt(step / base));
    }
    close("drift", error, kFloat);
  }
  // The rows that were to halt have halted, and the others go on.
  void halted_rows() {
    const int32_t count = p_.memory.download(p_.count, 1)[0];
    const auto halted = p_.memory.download(p_.halted, a_.rows);
    std::vector<uint8_t> want(static_cast<size_t>(a_.rows), 0);
    for (const int32_t row : p_.taking_part) want[static_cast<size_t>(row)] = 1;
    for (const int32_t row : p_.survivors) want[static_cast<size_t>(row)] = 0;
    const bool counted = count == static_cast<int32_t>(p_.survivors.size());
    exact("active rows", counted && p_.memory.download(p_.active, count) == p_.survivors);
    exact("halted rows", halted == want);
  }

  void fusion_reduce() {
    const auto got = p_.memory.download(p_.fused, a_.fused_rows() * s_.d);
    const auto weights = p_.memory.download(p_.weights, a_.rows);
    Error error;
    for (const size_t g : some(static_cast<size_t>(a_.fused_rows()))) {
      Row sum(static_cast<size_t>(s_.d));
      double total = 0;
      for (int64_t t = 0; t < a_.rows; ++t) {
        if (p_.group_of[static_cast<size_t>(t)] != static_cast<int32_t>(g)) continue;
        total += double{weights[static_cast<size_t>(t)]};
        for (int64_t k = 0; k < s_.d; ++k) {
          sum[static_cast<size_t>(k)] +=
              double{weights[static_cast<size_t>(t)]} * double{p_.hidden[static_cast<size_t>(t * s_.d + k)]};
        }
      }
      for (size_t k = 0; k < sum.size(); ++k) error.add(double{got[g * sum.size() + k]}, sum[k] / total);
    }
    close("fused rows", error, kFloat);
  }

  // logits of rows `who` of `hidden`, one after the other
  void lm_head(const std::vector<int32_t>& who, const std::vector<float>& hidden) {
    const PlainWeight weight(p_.memory, p_.head);
    const auto logits = p_.memory.download(p_.logits, static_cast<int64_t>(who.size()) * s_.vocab);
    const NormOf norm(p_.memory, p_.final_norm, s_.d);
    Error error;
    for (const size_t i : some(who.size())) {
      const Row x = quantized_row(norm(row_of(hidden, who[i], s_.d)), s_.group);
      for (const int64_t n : columns(s_.vocab)) {
        error.add(double{logits[i * static_cast<size_t>(s_.vocab) + static_cast<size_t>(n)]}, weight.dot(n, x, true));
      }
    }
    close("logits", error, kProduct);
  }

  struct NormOf {
    NormOf(Memory& memory, const Norm& of, int64_t d) : norm(of), weight(memory.download(of.weight, d)) {
      if (of.bias != nullptr) bias = memory.download(of.bias, d);
    }
    Row operator()(const Row& x) const { return normed(norm, weight, bias, x); }
    const Norm& norm;
    std::vector<float> weight, bias;
  };

  // --- stages, on the first layer ---
  void stage(Kernel which) {
    switch (which) {
      case Kernel::attention_input:
        return attention_input();
      case Kernel::attention:
        return attention();
      case Kernel::attention_output:
        return added("attention_output", p_.layers[0].o, Buffer::attention, s_.heads * s_.head_size);
      case Kernel::mlp_input:
        return mlp_input();
      default:
        added("mlp_output", p_.layers[0].down, Buffer::inner, s_.ffn);
        if (!a_.step() && a_.halting_ratio > 0) halted_rows();
    }
  }

  int64_t row_count() const { return static_cast<int64_t>(p_.taking_part.size()); }

  void attention_input() {
    const Layer& layer = p_.layers[0];
    const NormOf norm(p_.memory, layer.attention_norm, s_.d);
    PlainCache cache(p_.memory, p_.caches[0]);
    const std::vector<float> kept[] = {p_.backend.result(Buffer::k, layer, row_count()),
                                       p_.backend.result(Buffer::v, layer, row_count())};
    const int64_t half = s_.head_size / 2;
    std::vector<float> cosine, sine;
    if (layer.cosine != nullptr) {
      const int64_t n = (a_.context + a_.rows / a_.sequences) * half;
      cosine = p_.memory.download(layer.cosine, n);
      sine = p_.memory.download(layer.sine, n);
    }
    const struct {
      const char* name;
      const Linear& linear;
      Buffer buffer;
      int64_t heads;
    } products[] = {{"q", layer.q, Buffer::q, s_.heads},
                    {"k", layer.k, Buffer::k, s_.kv_heads},
                    {"v", layer.v, Buffer::v, s_.kv_heads}};
    for (const auto& [name, linear, buffer, heads] : products) {
      const PlainWeight weight(p_.memory, linear);
      const auto got = p_.backend.result(buffer, layer, row_count());
      const bool turns = layer.cosine != nullptr && buffer != Buffer::v;
      Error error;
      for (const size_t i : some(p_.taking_part.size())) {
        const int32_t row = p_.taking_part[i];
        const Row x = quantized_row(norm(row_of(p_.hidden, row, s_.d)), s_.group);
        for (const int64_t pair : columns(heads * half)) {
          const int64_t first = pair / half * s_.head_size + pair % half;
          double low = weight.dot(first, x, eight(row)), high = weight.dot(first + half, x, eight(row));
          if (turns) {
            const auto at = static_cast<size_t>(p_.positions[static_cast<size_t>(row)] * half + pair % half);
            const double c = double{cosine[at]}, s = double{sine[at]}, turned = low * c - high * s;
            high = high * c + low * s;
            low = turned;
          }
          const auto at = static_cast<int64_t>(i) * heads * s_.head_size + first;
          error.add(double{got[static_cast<size_t>(at)]}, low);
          error.add(double{got[static_cast<size_t>(at + half)]}, high);
        }
      }
      close(name, error, kProduct);
    }

    // A row's entry: its place among the rows of its sequence.
    Error error;
    bool lengths = true;
    std::vector<int64_t> next(static_cast<size_t>(a_.sequences), a_.context), entry;
    for (const int32_t row : p_.taking_part) {
      entry.push_back(next[static_cast<size_t>(p_.sequence[static_cast<size_t>(row)])]++);
    }
    for (int64_t s = 0; s < a_.sequences; ++s) lengths &= cache.length(s) == next[static_cast<size_t>(s)];
    exact("lengths", lengths);
    if (!lengths) return;
    const int64_t width = s_.kv_heads * s_.head_size;
    for (const size_t i : some(p_.taking_part.size())) {
      const int64_t slot = cache.slot(p_.sequence[static_cast<size_t>(p_.taking_part[i])], entry[i]);
      for (const bool value : {false, true}) {
        compare_entry(cache, value, slot, row_of(kept[value], static_cast<int64_t>(i), width), error);
      }
    }
    close("entries", error, storage_error());
  }

  void attention() {
    const Layer& layer = p_.layers[0];
    const auto q = p_.backend.result(Buffer::q, layer, row_count());
    const auto got = p_.backend.result(Buffer::attention, layer, row_count());
    PlainCache cache(p_.memory, p_.caches[0]);
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      const auto row = static_cast<size_t>(p_.taking_part[i]);
      const int64_t width = s_.heads * s_.head_size;
      const Row query = row_of(q, static_cast<int64_t>(i), width);
      for (const size_t head : some(static_cast<size_t>(s_.heads))) {
        const int64_t kv_head = static_cast<int64_t>(head) / (s_.heads / s_.kv_heads);
        const size_t at = head * static_cast<size_t>(s_.head_size);
        Row out(static_cast<size_t>(s_.head_size));
        std::vector<double> scores;
        std::vector<int64_t> slots;
        for (int64_t e = 0; e < cache.length(p_.sequence[row]); ++e) {
          const int64_t slot = cache.slot(p_.sequence[row], e);
          if (cache.position(slot) > p_.positions[row]) continue;
          const Row key = cache.vector(false, slot, kv_head);
          double score = 0;
          for (size_t k = 0; k < key.size(); ++k) score += key[k] * query[at + k];
          scores.push_back(score * double{layer.attention_scale});
          slots.push_back(slot);
        }
        if (scores.empty()) continue;
        const double top = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        for (double& score : scores) total += score = std::exp(score - top);
        for (size_t e = 0; e < slots.size(); ++e) {
          const Row value = cache.vector(true, slots[e], kv_head);
          for (size_t k = 0; k < out.size(); ++k) out[k] += scores[e] / total * value[k];
        }
        for (size_t k = 0; k < out.size(); ++k) {
          error.add(double{got[i * static_cast<size_t>(width) + at + k]}, out[k]);
        }
      }
    }
    // Tensor cores read an fp16 cache's queries and weights as fp16.
    close("attention", error, a_.kv_type == KvType::f32 ? kProduct : 1e-2);
  }

  void mlp_input() {
    const Layer& layer = p_.layers[0];
    const NormOf norm(p_.memory, layer.mlp_norm, s_.d);
    const bool gated = layer.activation == Activation::silu_gated;
    const PlainWeight up(p_.memory, layer.up), gate(p_.memory, gated ? layer.gate : layer.up);
    const auto got = p_.backend.result(Buffer::inner, layer, row_count());
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      const int32_t row = p_.taking_part[i];
      const Row x = quantized_row(norm(row_of(before_, row, s_.d)), s_.group);
      for (const int64_t n : columns(s_.ffn)) {
        const double want =
            activated(layer.activation, gated ? gate.dot(n, x, eight(row)) : 0, up.dot(n, x, eight(row)));
        error.add(double{got[i * static_cast<size_t>(s_.ffn) + static_cast<size_t>(n)]}, want);
      }
    }
    close("inner", error, kProduct);
  }

  // hidden = what it was + linear(buffer)
  void added(const char* what, const Linear& linear, Buffer buffer, int64_t width) {
    const auto x = p_.backend.result(buffer, p_.layers[0], row_count());
    const auto got = p_.memory.download(p_.rows.hidden, a_.rows * s_.d);
    const PlainWeight weight(p_.memory, linear);
    Error error;
    for (const size_t i : some(p_.taking_part.size())) {
      const int32_t row = p_.taking_part[i];
      const Row from = quantized_row(row_of(x, static_cast<int64_t>(i), width), s_.group);
      for (const int64_t n : columns(s_.d)) {
        const auto at = static_cast<size_t>(row * s_.d + n);
        error.add(double{got[at]}, double{before_[at]} + weight.dot(n, from, eight(row)));
      }
    }
    close(what, error, kProduct);
  }

  // A whole step: the first layer stage by stage, then the run's mechanisms and its logits.
  void step() {
    for (const Kernel which : {Kernel::attention_input, Kernel::attention, Kernel::attention_output, Kernel::mlp_input,
                               Kernel::mlp_output}) {
      before_ = p_.memory.download(p_.rows.hidden, a_.rows * s_.d);
      p_.run_stage(which, 0);
      stage(which);
    }
    p_.restore();
    p_.run();
    if (a_.halting_ratio > 0) halted_rows();
    const bool fuses = a_.fusion_ratio > 0;
    if (fuses) exact("groups", p_.memory.download(p_.fusion.group, a_.rows) == p_.group_of);
    const int64_t rows = fuses ? a_.fused_rows() : a_.rows;
    const auto hidden = p_.memory.download(fuses ? p_.fused : p_.rows.hidden, rows * s_.d);
    std::vector<int32_t> who;
    for (int64_t i = a_.kernel == Kernel::prefill ? rows - 1 : 0; i < rows; ++i) who.push_back(static_cast<int32_t>(i));
    lm_head(who, hidden);
    const PlainCache last(p_.memory, p_.caches.back());
    std::vector<int64_t> lengths(static_cast<size_t>(a_.sequences), a_.context);
    const bool halted = p_.layers.size() > 1;
    if (fuses && halted) {
      lengths[0] += a_.fused_rows();
    } else {
      for (const int32_t row : halted ? p_.survivors : p_.taking_part) {
        ++lengths[static_cast<size_t>(p_.sequence[static_cast<size_t>(row)])];
      }
    }
    bool same = true;
    for (int64_t s = 0; s < a_.sequences; ++s) same &= last.length(s) == lengths[static_cast<size_t>(s)];
    exact("lengths in the last layer", same);
  }

  Problem& p_;
  const Arguments& a_;
  const Shape& s_;
  std::vector<float> before_;  // the hidden state before the stage
  std::vector<Finding> findings_;
};

}  // namespace

std::vector<Finding> check(Problem& problem) { return Check(problem).run(); }

}  // namespace profiler
