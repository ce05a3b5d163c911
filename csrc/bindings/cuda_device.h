// What the CUDA bindings share: the device that a call works on, made the current one, and PyTorch's stream there.
#pragma once

#include <cstdint>

#include "quicksilver/cuda.h"

#ifndef QS_EMULATED
#include <dlfcn.h>

#include <stdexcept>
#endif

namespace quicksilver {
namespace {

namespace kernels = QS_CUDA;

#ifdef QS_EMULATED
kernels::Stream current_stream(int32_t) { return nullptr; }
#else
// The stable ABI gives a stream's handle from 2.13 on; the C function for it is as old as the ABI, but lives in
// libtorch_cuda, which a torch without CUDA, beside which this must load as well, doesn't have.
kernels::Stream current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // the one that torch has loaded
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error("this torch has no CUDA stream for device " + std::to_string(device));
  }
  return stream;
}
#endif

// For as long as a call launches work: other devices' tensors and streams are of no use to a kernel.
class On {
 public:
  explicit On(int32_t device) : guard_(device), stream_(current_stream(device)) {}
  kernels::Stream stream() const { return stream_; }

 private:
  kernels::DeviceGuard guard_;
  kernels::Stream stream_;
};

}  // namespace
}  // namespace quicksilver
