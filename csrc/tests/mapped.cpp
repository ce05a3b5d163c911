// On a GPU the tests hand it their own vectors and variables: whatever they allocate, and their stack, is page-locked
// memory that the GPU reaches at the same address, and every launch waits for its end. (Managed memory can't be a
// stack: the kernel's futexes refuse it.)
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

namespace {

constexpr size_t kHeap = size_t{2} << 30, kStack = size_t{64} << 20;
constexpr size_t kSmallest = 256;  // as cudaMalloc aligns

// Freed pieces wait by size, a power of two. What was allocated before the heap was there is the host's.
struct Heap {
  char* begin = nullptr;
  size_t used = 0;
  std::array<void*, 64> free = {};
  std::mutex mutex;

  bool owns(const void* p) const { return begin && p >= begin && p < begin + kHeap; }
  void* take(size_t bytes) {
    const size_t size = std::bit_ceil(bytes < kSmallest ? kSmallest : bytes);
    const std::lock_guard lock(mutex);
    void*& list = free[static_cast<size_t>(std::countr_zero(size))];
    if (list) return std::exchange(list, *static_cast<void**>(list));
    if (used + size > kHeap) throw std::bad_alloc();
    return begin + std::exchange(used, used + size);
  }
  void give(void* p, size_t bytes) {
    const size_t size = std::bit_ceil(bytes < kSmallest ? kSmallest : bytes);
    const std::lock_guard lock(mutex);
    void*& list = free[static_cast<size_t>(std::countr_zero(size))];
    *static_cast<void**>(p) = list;
    list = p;
  }
};
Heap heap;
std::atomic<bool> ready = false;

struct Start {
  int (*body)(int, char**);
  int argc;
  char** argv;
  int result;
};
void* run(void* start) {
  auto& s = *static_cast<Start*>(start);
  s.result = s.body(s.argc, s.argv);
  return nullptr;
}

// Pages that the GPU reaches at the same address.
cudaError_t mapped(size_t bytes, void** memory) {
  *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  const cudaError_t error = cudaHostRegister(*memory, bytes, cudaHostRegisterMapped);
  void* there = nullptr;
  if (error != cudaSuccess) return error;
  if (cudaHostGetDevicePointer(&there, *memory, 0) != cudaSuccess || there != *memory) return cudaErrorNotSupported;
  return cudaSuccess;
}

}  // namespace

// The size stands before the piece, whose alignment it keeps.
void* operator new(size_t bytes) {
  if (!ready) {
    if (void* p = std::malloc(bytes ? bytes : 1)) return p;
    throw std::bad_alloc();
  }
  char* const p = static_cast<char*>(heap.take(bytes + kSmallest));
  *reinterpret_cast<size_t*>(p) = bytes + kSmallest;
  return p + kSmallest;
}
void operator delete(void* p) noexcept {
  if (!heap.owns(p)) return std::free(p);
  char* const piece = static_cast<char*>(p) - kSmallest;
  heap.give(piece, *reinterpret_cast<size_t*>(piece));
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

// Runs `body` on a stack that the GPU can reach. 2 where there is no GPU for that.
int on_mapped_memory(int (*body)(int, char**), int argc, char** argv) {
  setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
  void *memory = nullptr, *stack = nullptr;
  cudaError_t error = cudaFree(nullptr);
  if (error == cudaSuccess) error = mapped(kHeap, &memory);
  if (error == cudaSuccess) error = mapped(kStack, &stack);
  if (error != cudaSuccess) {
    std::fprintf(stderr, "no GPU that reaches the host's memory: %s\n", cudaGetErrorString(error));
    return 2;
  }
  heap.begin = static_cast<char*>(memory);
  ready = true;
  Start start = {body, argc, argv, 1};
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  if (pthread_attr_setstack(&attributes, stack, kStack) != 0 ||
      pthread_create(&thread, &attributes, run, &start) != 0) {
    std::fprintf(stderr, "no thread with such a stack\n");
    return 2;
  }
  pthread_join(thread, nullptr);
  return start.result;
}
