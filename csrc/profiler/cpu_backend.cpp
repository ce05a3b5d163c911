// The CPU kernels, through the library's public API.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "backend.h"
#include "quicksilver/runtime.h"

namespace profiler {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int64_t threads) {
    if (threads > 0) set_threads(static_cast<int>(threads));
  }

  std::string description() override {
    return std::string(isa_name(current_isa())) + ", " + std::to_string(threads()) + " threads";
  }

  void* allocate(int64_t bytes) override {
    const int64_t unit = bytes >= kHugePage ? kHugePage : 64;
    const auto size = static_cast<size_t>((bytes + unit - 1) / unit * unit + (bytes == 0 ? unit : 0));
    void* memory = std::aligned_alloc(static_cast<size_t>(unit), size);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (unit == kHugePage) madvise(memory, size, MADV_HUGEPAGE);  // weights are read whole, page after page
#endif
    std::memset(memory, 0, size);
    return memory;
  }
  void release(void* memory) override { std::free(memory); }
  void copy_in(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void copy_out(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  double time(const std::function<void()>& work) override {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void flush_cache() override {
    if (cache_.empty()) {
#ifdef _SC_LEVEL3_CACHE_SIZE
      const long known = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
      const long known = 0;
#endif
      cache_.resize(static_cast<size_t>(std::max(2 * known, 64L << 20)));  // 64 MiB where the system doesn't say
    }
    std::memset(cache_.data(), ++flushes_, cache_.size());
  }

  void quantize_rows(const float* x, int64_t stride, const int32_t* index, const QuantizedRows& out,
                     const int32_t* count) override {
    QuantizedRows some = out;
    some.rows = *count;
    quicksilver::quantize_rows(x, stride, index, some);
  }
  void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count) override {
    MatryoshkaGemm some = params;
    some.x.rows = *count;
    quicksilver::matryoshka_gemm(some);
  }
  void kv_scatter(const KvScatter& params, const int32_t* count) override {
    KvScatter some = params;
    some.count = *count;
    quicksilver::kv_scatter(some);
  }
  void halting_update(const HaltingUpdate& params, const int32_t* count, int32_t* next_count) override {
    HaltingUpdate some = params;
    some.count = *count;
    *next_count = static_cast<int32_t>(quicksilver::halting_update(some));
  }
  void fusion_groups(const FusionGroups& params, int32_t* groups) override {
    *groups = static_cast<int32_t>(quicksilver::fusion_groups(params));
  }
  void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                     int64_t d, float* fused, int64_t groups) override {
    quicksilver::fusion_reduce(hidden, stride, weight, group, count, d, fused, groups);
  }

  void reserve(const Layer& layer, int64_t rows, int64_t, int64_t) override {
    work_.reserve(layer, rows);
    drift_.resize(static_cast<size_t>(rows));
  }
  void attention_input(const Layer& layer, const Rows& rows, const int32_t* count, KvCache& cache) override {
    if (!quicksilver::attention_input(layer, some(rows, count), cache, work_)) {
      throw std::runtime_error("the KV cache is full");
    }
  }
  void attention(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache) override {
    quicksilver::attention(layer, some(rows, count), cache, work_);
  }
  void attention_output(const Layer& layer, const Rows& rows, const int32_t* count) override {
    quicksilver::attention_output(layer, some(rows, count), work_);
  }
  void mlp_input(const Layer& layer, const Rows& rows, const int32_t* count) override {
    quicksilver::mlp_input(layer, some(rows, count), work_);
  }
  void mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const Judging* judging) override {
    quicksilver::mlp_output(layer, some(rows, count), work_);
    if (judging == nullptr) return;
    HaltingUpdate update;
    update.hidden = rows.hidden;
    update.previous = work_.previous;
    update.stride = update.previous_stride = update.d = layer.d;
    update.active = rows.active;
    update.count = *count;
    update.previous_compact = true;
    update.positions = rows.positions;
    update.overrides = judging->overrides;
    update.drift = drift_.data();
    update.halted = judging->halted;
    update.next_active = judging->active;
    *judging->count = static_cast<int32_t>(quicksilver::halting_update(update));
  }
  void lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d, float* logits,
               int64_t stride) override {
    quicksilver::lm_head(norm, head, some(rows, count), d, logits, stride, work_);
  }

  std::vector<float> result(Buffer buffer, const Layer& layer, int64_t rows) override {
    const int64_t query = rows * layer.heads * layer.head_size, key = rows * layer.kv_heads * layer.head_size;
    switch (buffer) {
      case Buffer::q:
        return {work_.q, work_.q + query};
      case Buffer::k:
        return {work_.k, work_.k + key};
      case Buffer::v:
        return {work_.v, work_.v + key};
      case Buffer::attention:
        return {work_.attention, work_.attention + query};
      case Buffer::inner:
        break;
    }
    // The CPU applies the activation as it quantizes.
    std::vector<float> inner(work_.up, work_.up + rows * layer.ffn);
    for (size_t i = 0; i < inner.size(); ++i) {
      const double up = inner[i];
      inner[i] =
          layer.activation == Activation::silu_gated
              ? static_cast<float>(up * work_.gate[i] / (1 + std::exp(-double{work_.gate[i]})))
              : static_cast<float>(up / 2 * (1 + std::tanh(0.7978845608028654 * (up + 0.044715 * up * up * up))));
    }
    return inner;
  }

 private:
  static Rows some(const Rows& rows, const int32_t* count) {
    Rows taking_part = rows;
    if (count != nullptr) taking_part.count = *count;
    return taking_part;
  }

  Workspace work_;
  std::vector<float> drift_;
  std::vector<char> cache_;
  int flushes_ = 0;
};

}  // namespace

std::unique_ptr<Backend> cpu_backend(int64_t threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace profiler
