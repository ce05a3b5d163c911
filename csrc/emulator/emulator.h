// Runs CUDA kernels on the host, more strictly than hardware does.
//
// Each thread of a block is a fiber that runs until it has to wait. A broken rule (a barrier or a collective that some
// thread misses, a race on shared memory, an access outside of it, a copy that is read before it was waited for) ends
// the launch with std::runtime_error, which names the kernel, the block, the threads and their places in the source.
// Memory other than shared memory is the sanitizers' business.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

namespace quicksilver::emulator {

struct Settings {
  // Which of the threads that can run does so next: the first, the last, or any.
  enum class Schedule { forward, backward, random } schedule = Schedule::forward;
  uint32_t seed = 0;  // of the random schedule
  int workers = 2;    // OS threads that run blocks
  bool counts = false;
};
Settings& settings();

// Of the calling thread. All devices are the same host: the number says where a GPU's kernels would have run.
int& current_device();

// What launches of a kernel did. A request is one instruction of one warp; a sector is 32 bytes.
struct KernelCounts {
  std::string name;
  int64_t launches = 0, blocks = 0, threads = 0;
  int64_t global_load_requests = 0, global_load_sectors = 0, global_load_bytes = 0;
  int64_t global_store_requests = 0, global_store_sectors = 0, global_store_bytes = 0;
  int64_t shared_requests = 0, shared_conflicts = 0;  // conflicts: wavefronts beyond those that the bytes need
  int64_t active_lanes = 0, instructions = 0;         // of loads and stores, global and shared
  int64_t mma_u8s8 = 0, mma_f16 = 0, mma_bf16 = 0;
  int64_t cp_async_bytes = 0, cp_async_sectors = 0;
  int64_t shared_bytes = 0;  // of a block: the most of any launch
  int device = 0;            // of the last launch: the number that was current
};
struct CountName {
  const char* name;
  int64_t KernelCounts::* number;
};
inline constexpr CountName kCountNames[] = {
    {"launches", &KernelCounts::launches},
    {"blocks", &KernelCounts::blocks},
    {"threads", &KernelCounts::threads},
    {"global_load_requests", &KernelCounts::global_load_requests},
    {"global_load_sectors", &KernelCounts::global_load_sectors},
    {"global_load_bytes", &KernelCounts::global_load_bytes},
    {"global_store_requests", &KernelCounts::global_store_requests},
    {"global_store_sectors", &KernelCounts::global_store_sectors},
    {"global_store_bytes", &KernelCounts::global_store_bytes},
    {"shared_requests", &KernelCounts::shared_requests},
    {"shared_conflicts", &KernelCounts::shared_conflicts},
    {"active_lanes", &KernelCounts::active_lanes},
    {"instructions", &KernelCounts::instructions},
    {"mma_u8s8", &KernelCounts::mma_u8s8},
    {"mma_f16", &KernelCounts::mma_f16},
    {"mma_bf16", &KernelCounts::mma_bf16},
    {"cp_async_bytes", &KernelCounts::cp_async_bytes},
    {"cp_async_sectors", &KernelCounts::cp_async_sectors},
    {"shared_bytes", &KernelCounts::shared_bytes},
};
// In order of first launch; starts again from nothing. Counted only where settings().counts was set.
std::vector<KernelCounts> take_counts();

// --- what the device functions are made of ---------------------------------------------------------------------------
using Site = std::source_location;
constexpr int kLanes = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Position {
  Index thread, block, block_dim, grid_dim;
};
const Position& position();  // of the running thread

void launch(const char* name, Index grid, int threads, int64_t shared_bytes, void (*body)(const void*),
            const void* context);
template <class F>
void launch(const char* name, Index grid, int threads, int64_t shared_bytes, const F& body) {
  launch(name, grid, threads, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

void sync_block(const Site& site);
void sync_warp(const Site& site);

// All lanes of a warp hand in `in` and get `out`; the last one to arrive computes for all. Inputs and outputs are the
// lanes' own variables.
using Compute = void (*)(const void* const* in, void* const* out);
void collective(const char* what, const void* in, void* out, Compute compute, const Site& site);

enum class Access { load, store };
// Before each access: throws where it breaks a rule, counts it.
void global_access(Access access, const void* p, int bytes, const Site& site);
void shared_access(Access access, const void* p, int bytes, const Site& site);

unsigned char* shared_memory();
void wait_until_at_least(const int32_t* p, int32_t value, const Site& site);

void cp_async16(void* shared, const void* global, bool valid, const Site& site);
void cp_async_commit();
void cp_async_wait(int groups_under_way);

// matrices: 2 or 4; `r`: as many registers.
void ldmatrix(uint32_t* r, const void* row, int matrices, bool transposed, const Site& site);
void mma_u8s8(int32_t* d, const uint32_t* a, const uint32_t* b, const Site& site);
void mma_f16(float* d, const uint32_t* a, const uint32_t* b, const Site& site);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const Site& site);

}  // namespace quicksilver::emulator
