// The one way to launch a kernel.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"

#ifndef QS_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace quicksilver::QS_CUDA {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Blocks in x alone: y and z end at 65,535.
inline Dim blocks_in_x(int64_t blocks) {
  if (blocks < 0 || blocks > INT32_MAX)
    throw std::invalid_argument("no grid has " + std::to_string(blocks) + " blocks");
  return {static_cast<unsigned>(blocks)};
}
inline Dim blocks_in_x(int64_t items, int64_t items_in_block) {
  return blocks_in_x((items + items_in_block - 1) / items_in_block);
}

#ifdef QS_EMULATED

// Bytes of shared memory that a block can have.
inline int64_t shared_memory_limit() { return 227 * 1024; }

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Dim grid, int threads, int64_t shared_bytes, Stream, A&&... args) {
  const auto run = [&] { kernel(static_cast<P>(args)...); };
  emulator::launch(name, {grid.x, grid.y, grid.z}, threads, shared_bytes, run);
}
template <class... P, class... A>
void launch_overlapping(const char* name, void (*kernel)(P...), Dim grid, int threads, int64_t shared_bytes,
                        Stream stream, A&&... args) {
  launch(name, kernel, grid, threads, shared_bytes, stream, std::forward<A>(args)...);
}

#else

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block can have.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

// Whether the code that this GPU runs of a kernel can wait for the launch before it: code for older GPUs, which a newer
// one may run too, has no such instruction.
template <class... P>
bool can_overlap(void (*kernel)(P...)) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> found;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = found.try_emplace({reinterpret_cast<const void*>(kernel), device});
  if (is_new) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    place->second = attributes.ptxVersion >= 90;
  }
  return place->second;
}

template <class... P, class... A>
void launch(bool overlapping, const char* name, void (*kernel)(P...), Dim grid, int threads, int64_t shared_bytes,
            Stream stream, A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int64_t kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > kAlwaysAllowed) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        std::string("shared memory of ") + name);
  }
  cudaLaunchAttribute overlaps = {};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlaps;
  config.numAttrs = overlapping && can_overlap(kernel) ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...), std::string("launch of ") + name);
}
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Dim grid, int threads, int64_t shared_bytes, Stream stream,
            A&&... args) {
  launch(false, name, kernel, grid, threads, shared_bytes, stream, std::forward<A>(args)...);
}
// A kernel that calls wait_for_launch_before() (ptx.cuh).
template <class... P, class... A>
void launch_overlapping(const char* name, void (*kernel)(P...), Dim grid, int threads, int64_t shared_bytes,
                        Stream stream, A&&... args) {
  launch(true, name, kernel, grid, threads, shared_bytes, stream, std::forward<A>(args)...);
}

#endif

}  // namespace quicksilver::QS_CUDA
