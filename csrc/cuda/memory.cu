// Which device is the current one; device memory for callers without a framework.
#include <new>

#include "launch.cuh"

#ifdef QS_EMULATED
#include <cstdlib>
#else
#include <cuda_runtime_api.h>
#endif

namespace quicksilver::QS_CUDA {

#ifdef QS_EMULATED

DeviceGuard::DeviceGuard(int device) : device_(device), before_(emulator::current_device()) {
  emulator::current_device() = device;
}
DeviceGuard::~DeviceGuard() { emulator::current_device() = before_; }

void* allocate(int64_t bytes) {
  constexpr size_t kAlignment = 256;  // cudaMalloc's
  const size_t size = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, size == 0 ? kAlignment : size);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0, size);
  return memory;
}
void release(void* memory) { std::free(memory); }
void copy_in(void* device, const void* host, int64_t bytes, Stream) {
  if (bytes > 0) std::memcpy(device, host, static_cast<size_t>(bytes));
}
void copy_out(void* host, const void* device, int64_t bytes, Stream) {
  if (bytes > 0) std::memcpy(host, device, static_cast<size_t>(bytes));
}
void synchronize(Stream) {}

#else

DeviceGuard::DeviceGuard(int device) : device_(device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (device_ != before_) check_cuda(cudaSetDevice(device_), "device " + std::to_string(device_));
}
DeviceGuard::~DeviceGuard() {
  if (device_ != before_) cudaSetDevice(before_);
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  const size_t size = bytes > 0 ? static_cast<size_t>(bytes) : 1;
  const cudaError_t error = cudaMalloc(&memory, size);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  check_cuda(error, "cudaMalloc");
  check_cuda(cudaMemset(memory, 0, size), "cudaMemset");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaMemset");  // other streams may not wait for the default one
  return memory;
}
void release(void* memory) { check_cuda(cudaFree(memory), "cudaFree"); }
void copy_in(void* device, const void* host, int64_t bytes, Stream stream) {
  check_cuda(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                             static_cast<cudaStream_t>(stream)),
             "cudaMemcpyAsync to the device");
}
void copy_out(void* host, const void* device, int64_t bytes, Stream stream) {
  check_cuda(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost,
                             static_cast<cudaStream_t>(stream)),
             "cudaMemcpyAsync from the device");
}
void synchronize(Stream stream) {
  check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
}

#endif

}  // namespace quicksilver::QS_CUDA
