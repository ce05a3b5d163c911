// What quicksilver_profile runs its kernels on. All pointers in parameters are the backend's own; the number of rows
// that take part is read from `count`, the parameters' own count being its bound. A null count means the bound.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "quicksilver/fusion.h"
#include "quicksilver/halting.h"
#include "quicksilver/layer.h"

namespace profiler {

using namespace quicksilver;

// What stage 5 halts: the rows with override 1. `active` and `count` are compacted in place.
struct Judging {
  const int8_t* overrides = nullptr;
  uint8_t* halted = nullptr;
  int32_t* active = nullptr;
  int32_t* count = nullptr;
};

// Results of a stage that stay in the backend's work memory. inner: the MLP's, after the activation.
enum class Buffer { q, k, v, attention, inner };

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string description() = 0;

  virtual void* allocate(int64_t bytes) = 0;  // zeroed
  virtual void release(void* memory) = 0;
  virtual void copy_in(void* to, const void* from, int64_t bytes) = 0;
  virtual void copy_out(void* to, const void* from, int64_t bytes) = 0;
  // Seconds that `work` takes, from an idle backend to an idle backend.
  virtual double time(const std::function<void()>& work) = 0;
  // Writes over more memory than the last cache holds.
  virtual void flush_cache() = 0;

  virtual void quantize_rows(const float* x, int64_t stride, const int32_t* index, const QuantizedRows& out,
                             const int32_t* count) = 0;
  virtual void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count) = 0;
  virtual void kv_scatter(const KvScatter& params, const int32_t* count) = 0;
  virtual void halting_update(const HaltingUpdate& params, const int32_t* count, int32_t* next_count) = 0;
  virtual void fusion_groups(const FusionGroups& params, int32_t* groups) = 0;
  // groups: how many there are
  virtual void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group,
                             int64_t count, int64_t d, float* fused, int64_t groups) = 0;

  // Work memory for the stages; to be called before them.
  virtual void reserve(const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries) = 0;
  virtual void attention_input(const Layer& layer, const Rows& rows, const int32_t* count, KvCache& cache) = 0;
  virtual void attention(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache) = 0;
  virtual void attention_output(const Layer& layer, const Rows& rows, const int32_t* count) = 0;
  virtual void mlp_input(const Layer& layer, const Rows& rows, const int32_t* count) = 0;
  // judging: null where nobody is judged
  virtual void mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const Judging* judging) = 0;
  virtual void lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d,
                       float* logits, int64_t stride) = 0;
  virtual std::vector<float> result(Buffer buffer, const Layer& layer, int64_t rows) = 0;

  // The emulator's counts since the last call, a JSON array; "" where nothing counts.
  virtual std::string take_counts() { return ""; }
};

std::unique_ptr<Backend> cpu_backend(int64_t threads);
namespace cuda {
std::unique_ptr<Backend> make_backend();
}
namespace emulated {
std::unique_ptr<Backend> make_backend();
}

// Memory of a backend that goes with its owner.
class Memory {
 public:
  explicit Memory(Backend& backend) : backend_(backend) {}
  ~Memory() {
    for (void* each : held_) backend_.release(each);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T>
  T* space(int64_t n) {
    void* memory = backend_.allocate(n * static_cast<int64_t>(sizeof(T)));
    held_.push_back(memory);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    T* memory = space<T>(static_cast<int64_t>(values.size()));
    restore(memory, values);
    return memory;
  }
  template <class T>
  void restore(T* memory, const std::vector<T>& values) {
    backend_.copy_in(memory, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
  }
  template <class T>
  std::vector<T> download(const T* memory, int64_t n) {
    std::vector<T> values(static_cast<size_t>(n));
    backend_.copy_out(values.data(), memory, n * static_cast<int64_t>(sizeof(T)));
    return values;
  }

 private:
  Backend& backend_;
  std::vector<void*> held_;
};

}  // namespace profiler
