// The CUDA kernels: compiled with QS_CUDA=cuda for GPUs, and with QS_CUDA=emulated for the host's emulator.
#ifdef QS_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <chrono>
#include <map>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "backend.h"
#include "quicksilver/cuda.h"

namespace profiler::QS_CUDA {
namespace {

namespace device = quicksilver::QS_CUDA;
using device::Stream;

#ifdef QS_EMULATED
std::string machine() { return "emulator"; }
int64_t cache_bytes() { return int64_t{32} << 20; }
double timed(const std::function<void()>& work, Stream) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
#else
void must(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
int attribute(cudaDeviceAttr which) {
  int number = 0, value = 0;
  must(cudaGetDevice(&number), "cudaGetDevice");
  must(cudaDeviceGetAttribute(&value, which, number), "cudaDeviceGetAttribute");
  return value;
}
std::string machine() {
  int number = 0;
  cudaDeviceProp properties;
  must(cudaGetDevice(&number), "cudaGetDevice");
  must(cudaGetDeviceProperties(&properties, number), "cudaGetDeviceProperties");
  return properties.name;
}
int64_t cache_bytes() { return attribute(cudaDevAttrL2CacheSize); }
// Events, so that the host's part of a launch counts only where the GPU waits for it.
double timed(const std::function<void()>& work, Stream stream) {
  static cudaEvent_t start = nullptr, end = nullptr;
  if (start == nullptr) {
    must(cudaEventCreate(&start), "cudaEventCreate");
    must(cudaEventCreate(&end), "cudaEventCreate");
  }
  const auto on = static_cast<cudaStream_t>(stream);
  must(cudaStreamSynchronize(on), "cudaStreamSynchronize");
  must(cudaEventRecord(start, on), "cudaEventRecord");
  work();
  must(cudaEventRecord(end, on), "cudaEventRecord");
  must(cudaEventSynchronize(end), "a kernel");
  float milliseconds = 0;
  must(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
  return double{milliseconds} / 1e3;
}
#endif

class DeviceBackend final : public Backend {
 public:
#ifdef QS_EMULATED
  DeviceBackend() { quicksilver::emulator::settings().counts = true; }
#endif
  ~DeviceBackend() override {
    for (const auto& [what, memory] : kept_) device::release(memory.first);
  }
  std::string description() override { return machine(); }

  void* allocate(int64_t bytes) override { return device::allocate(std::max<int64_t>(bytes, 1)); }
  void release(void* memory) override { device::release(memory); }
  void copy_in(void* to, const void* from, int64_t bytes) override { device::copy_in(to, from, bytes, stream_); }
  void copy_out(void* to, const void* from, int64_t bytes) override {
    device::copy_out(to, from, bytes, stream_);
    device::synchronize(stream_);
  }
  double time(const std::function<void()>& work) override { return timed(work, stream_); }
  void flush_cache() override {
    const int64_t bytes = 2 * cache_bytes();
    flush_.resize(static_cast<size_t>(bytes), 0);
    copy_in(kept("flush", bytes), flush_.data(), bytes);
    device::synchronize(stream_);
  }

  void quantize_rows(const float* x, int64_t stride, const int32_t* index, const QuantizedRows& out,
                     const int32_t* count) override {
    device::quantize_rows(x, stride, index, out, count, stream_);
  }
  void matryoshka_gemm(const MatryoshkaGemm& params, const int32_t* count) override {
    device::matryoshka_gemm(params, count, stream_);
  }
  void kv_scatter(const KvScatter& params, const int32_t* count) override {
    device::kv_scatter(params, count, stream_);
  }
  void halting_update(const HaltingUpdate& params, const int32_t* count, int32_t* next_count) override {
    device::halting_update(params, count, next_count, kept("halting", device::halting_scratch_bytes(params)), stream_);
  }
  void fusion_groups(const FusionGroups& params, int32_t* groups) override {
    device::fusion_groups(params, groups, kept("fusion", device::fusion_scratch_bytes(params)), stream_);
  }
  void fusion_reduce(const float* hidden, int64_t stride, const float* weight, const int32_t* group, int64_t count,
                     int64_t d, float* fused, int64_t groups) override {
    device::fusion_reduce(hidden, stride, weight, group, count, d, fused, groups, stream_);
  }

  void reserve(const Layer& layer, int64_t rows, int64_t sequences, int64_t max_entries) override {
    const int64_t bytes = device::workspace_bytes(layer, rows, sequences, max_entries);
    work_ = device::carve_workspace(kept("work", bytes), layer, rows, sequences, max_entries);
  }
  void attention_input(const Layer& layer, const Rows& rows, const int32_t* count, KvCache& cache) override {
    device::attention_input(layer, rows, count, cache, work_, stream_);
  }
  void attention(const Layer& layer, const Rows& rows, const int32_t* count, const KvCache& cache) override {
    device::attention(layer, rows, count, cache, work_, nullptr, stream_);
  }
  void attention_output(const Layer& layer, const Rows& rows, const int32_t* count) override {
    device::attention_output(layer, rows, count, work_, stream_);
  }
  void mlp_input(const Layer& layer, const Rows& rows, const int32_t* count) override {
    device::mlp_input(layer, rows, count, work_, stream_);
  }
  void mlp_output(const Layer& layer, const Rows& rows, const int32_t* count, const Judging* judging) override {
    device::DeviceHalting halting;
    if (judging != nullptr) {
      halting.overrides = judging->overrides;
      halting.halted = judging->halted;
      halting.active = judging->active;
      halting.count = judging->count;
    }
    device::mlp_output(layer, rows, count, work_, nullptr, judging ? &halting : nullptr, stream_);
  }
  void lm_head(const Norm& norm, const Linear& head, const Rows& rows, const int32_t* count, int64_t d, float* logits,
               int64_t stride) override {
    device::lm_head(norm, head, rows, count, d, logits, stride, work_, stream_);
  }

  std::vector<float> result(Buffer buffer, const Layer& layer, int64_t rows) override {
    const float* const sources[] = {work_.q, work_.k, work_.v, work_.attention, work_.inner};
    const int64_t query = layer.heads * layer.head_size, key = layer.kv_heads * layer.head_size;
    const int64_t widths[] = {query, key, key, query, layer.ffn};
    const auto which = static_cast<size_t>(buffer);
    std::vector<float> values(static_cast<size_t>(rows * widths[which]));
    copy_out(values.data(), sources[which], rows * widths[which] * 4);
    return values;
  }

#ifdef QS_EMULATED
  std::string take_counts() override {
    std::ostringstream json;
    const char* before = "[";
    for (const quicksilver::emulator::KernelCounts& c : quicksilver::emulator::take_counts()) {
      json << before << "{\"name\": \"" << c.name << '"';
      for (const auto& [name, number] : quicksilver::emulator::kCountNames)
        json << ", \"" << name << "\": " << c.*number;
      json << '}';
      before = ", ";
    }
    json << (before[0] == '[' ? "[]" : "]");
    return json.str();
  }
#endif

 private:
  // Zeroed memory for one purpose, made anew where it must grow.
  void* kept(const std::string& what, int64_t bytes) {
    auto& [memory, size] = kept_[what];
    if (memory == nullptr || size < bytes) {
      if (memory != nullptr) {
        device::synchronize(stream_);
        device::release(memory);
      }
      memory = allocate(bytes);
      size = bytes;
    }
    return memory;
  }

  Stream stream_ = nullptr;
  device::DeviceWorkspace work_;
  std::vector<char> flush_;
  std::map<std::string, std::pair<void*, int64_t>> kept_;
};

}  // namespace

std::unique_ptr<Backend> make_backend() { return std::make_unique<DeviceBackend>(); }

}  // namespace profiler::QS_CUDA
