// Kernels with planted bugs, and what the emulator must say of each.
#pragma once

#include "cuda_check.h"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

using emulator::settings;

QS_KERNEL void missing_barrier_kernel(float* out) {
  float* shared = shared_memory<float>();
  store_shared(shared + threadIdx.x, static_cast<float>(threadIdx.x));
  store(out + threadIdx.x, load_shared(shared + (threadIdx.x + 32) % blockDim.x));
}

QS_KERNEL void missing_warp_barrier_kernel(float* out) {
  float* shared = shared_memory<float>();
  store_shared(shared + threadIdx.x, static_cast<float>(threadIdx.x));
  store(out + threadIdx.x, load_shared(shared + (threadIdx.x ^ 1)));
}

// A shuffle brings lanes together, but doesn't order their accesses to memory.
QS_KERNEL void shuffle_for_barrier_kernel(float* out) {
  float* shared = shared_memory<float>();
  store_shared(shared + threadIdx.x, static_cast<float>(threadIdx.x));
  const float sum = warp_sum(1.0f);
  store(out + threadIdx.x, sum + load_shared(shared + (threadIdx.x ^ 1)));
}

// Read by two warps, then written over by a third thread without a barrier.
QS_KERNEL void write_after_read_kernel(float* out) {
  float* shared = shared_memory<float>();
  store_shared(shared + threadIdx.x, 1.0f);
  sync_block();
  store(out + threadIdx.x, load_shared(shared + threadIdx.x % 4));
  if (threadIdx.x == 2) store_shared(shared + 2, 2.0f);
}

QS_KERNEL void two_writers_kernel() {
  if (lane() == 0) store_shared(shared_memory<int>(), warp());
}

QS_KERNEL void bytes_kernel(bool racing) {
  uint8_t* bytes = shared_memory<uint8_t>();
  store_shared(bytes + (racing ? threadIdx.x / 2 : threadIdx.x), static_cast<uint8_t>(threadIdx.x));
  sync_block();
  if (threadIdx.x < 16) store_shared(reinterpret_cast<uint32_t*>(bytes) + threadIdx.x, 0u);
}

constexpr int kDivergentLine = __LINE__;
QS_KERNEL void divergent_barrier_kernel() {
  if (threadIdx.x < 32) {
    sync_block();
  } else {
    sync_block();
  }
}

QS_KERNEL void returned_before_barrier_kernel() {
  if (threadIdx.x == 33) return;
  sync_block();
}

QS_KERNEL void barrier_missed_kernel() {
  if (threadIdx.x != 33) sync_block();
  sync_warp();
}

QS_KERNEL void missing_lane_kernel(float* out) {
  float sum = 1;
  if (lane() < 31) sum = warp_sum(sum);
  store(out + threadIdx.x, sum);
}

QS_KERNEL void parted_lanes_kernel() {
  if (lane() < 16) {
    ballot(true);
  } else {
    ballot(false);
  }
}

QS_KERNEL void lane_waits_alone_kernel(int32_t* flag) {
  if (lane() == 3) wait_until_at_least(flag, 1);
  sync_warp();
}

QS_KERNEL void outside_kernel(int at) { store_shared(shared_memory<int>() + at, 1); }
QS_KERNEL void read_outside_kernel(int at) { load_shared(shared_memory<float4>() + at); }
QS_KERNEL void unaligned_kernel() { load_shared(reinterpret_cast<const float2*>(shared_memory<float>() + 1)); }

// Past AddressSanitizer, which would end the process.
__attribute__((noinline, no_sanitize("address"))) void write_raw(int* p) { *p = 1; }
QS_KERNEL void raw_outside_kernel(int at) {
  if (threadIdx.x == 0) write_raw(shared_memory<int>() + at);
}

enum class Copy { right, no_wait, uncommitted, other_thread, overwritten };
QS_KERNEL void copy_kernel(const float4* in, float4* out, Copy copy) {
  float4* shared = shared_memory<float4>();
  const unsigned i = threadIdx.x;
  cp_async16(shared + i, in + i, true);
  if (copy != Copy::uncommitted) cp_async_commit();
  if (copy == Copy::overwritten) store_shared(shared + i, make_float4(0, 0, 0, 0));
  if (copy != Copy::no_wait) cp_async_wait<0>();
  if (copy != Copy::other_thread) sync_block();
  store(out + i, load_shared(shared + (copy == Copy::right || copy == Copy::other_thread ? (i + 1) % blockDim.x : i)));
}

// A buffer of the pipeline is filled again while other warps may still read it.
QS_KERNEL void early_refill_kernel(const float4* in, float4* out) {
  float4* shared = shared_memory<float4>();
  const unsigned i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    cp_async16(shared + i, in + i, true);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
    store(out + i, load_shared(shared + (i + 32) % blockDim.x));
  }
}

// Waits for the block after it, which may not have started.
QS_KERNEL void waits_for_later_blocks_kernel(int32_t* done) {
  atomic_add(done, threadIdx.x == 0);
  if (threadIdx.x == 0) wait_until_at_least(done, static_cast<int>(gridDim.x));
  sync_block();
}

QS_KERNEL void global_shared_kernel() { load(shared_memory<int>()); }

void planted_bugs() {
  std::vector<float> out(1024, 0);
  std::vector<float4> vectors(256), copied(256);
  int32_t flag = 0;
  const auto found = [&](const std::string& what, std::initializer_list<const char*> words, auto&& run) {
    using Schedule = emulator::Settings::Schedule;
    for (const Schedule schedule : {Schedule::forward, Schedule::backward, Schedule::random}) {
      settings().schedule = schedule;
      const std::string error = check::error_of(run);
      bool ok = !error.empty();
      for (const char* word : words) ok = ok && error.find(word) != std::string::npos;
      check::report(ok, "planted bug, " + what + ": got '" + error + "'");
    }
  };
  const auto bug = [&](const std::string& what, std::initializer_list<const char*> words, auto kernel, int threads,
                       auto... arguments) {
    found(what, words, [&] { launch("planted", kernel, {}, threads, 4096, nullptr, arguments...); });
  };
  bug("no barrier", {"kernel planted, block (0, 0, 0): race", "emulator_bugs.h:", "without sync_block"},
      missing_barrier_kernel, 64, out.data());
  bug("no barrier in a warp", {"race", "without sync_warp"}, missing_warp_barrier_kernel, 32, out.data());
  bug("shuffle for a barrier", {"race", "without sync_warp"}, shuffle_for_barrier_kernel, 32, out.data());
  bug("write after read", {"race", "sync_"}, write_after_read_kernel, 96, out.data());
  bug("two writers", {"race", "writes"}, two_writers_kernel, 64);
  bug("two writers of a byte", {"race", "writes"}, bytes_kernel, 64, true);
  const auto place = [](int after) {
    return "sync_block at emulator_bugs.h:" + std::to_string(kDivergentLine + after);
  };
  bug("divergent barriers", {"different barriers", place(3).c_str(), place(5).c_str()}, divergent_barrier_kernel, 64);
  bug("barrier after a return", {"thread 33", "returned", "sync_block"}, returned_before_barrier_kernel, 64);
  bug("missed barrier", {"thread 33", "sync_warp", "sync_block"}, barrier_missed_kernel, 64);
  bug("missing lane", {"shuffle_xor", "returned", "emulator_bugs.h:"}, missing_lane_kernel, 64, out.data());
  bug("parted lanes", {"went apart", "ballot"}, parted_lanes_kernel, 32);
  bug("a flag that nobody sets", {"no block can go on", "thread 3 of block", "which is 0"}, lane_waits_alone_kernel, 32,
      &flag);
  bug("write outside", {"store_shared", "at byte 4096", "4096 bytes"}, outside_kernel, 32, 1024);
  bug("write before", {"store_shared", "at byte -4"}, outside_kernel, 32, -1);
  bug("read outside", {"load_shared", "of 16 bytes"}, read_outside_kernel, 32, 256);
  bug("unaligned", {"multiple"}, unaligned_kernel, 32);
  bug("raw write outside", {"not through store_shared", "byte 4096"}, raw_outside_kernel, 32, 1024);
  bug("raw write before", {"not through store_shared", "byte -8"}, raw_outside_kernel, 32, -2);
  bug("global load of shared memory", {"use load_shared"}, global_shared_kernel, 32);
  for (const Copy copy : {Copy::no_wait, Copy::uncommitted, Copy::overwritten}) {
    bug("asynchronous copy " + std::to_string(static_cast<int>(copy)), {"wasn't waited for"}, copy_kernel, 64,
        vectors.data(), copied.data(), copy);
  }
  // Its neighbour's copy: pending, or done without a barrier.
  bug("asynchronous copy of another thread", {"emulator_bugs.h:"}, copy_kernel, 64, vectors.data(), copied.data(),
      Copy::other_thread);
  bug("early refill", {"race", "without sync_block"}, early_refill_kernel, 64, vectors.data(), copied.data());
  found("too many blocks wait for each other", {"no block can go on", "blocks resident"}, [&] {
    flag = 0;
    launch("planted", waits_for_later_blocks_kernel, {100}, 32, 0, nullptr, &flag);
  });
  found("threads", {"kernel planted", "33 threads"},
        [&] { launch("planted", two_writers_kernel, {}, 33, 64, nullptr); });
  found("shared memory", {"kernel planted", "shared memory"},
        [&] { launch("planted", two_writers_kernel, {}, 32, 1 << 20, nullptr); });
}

}  // namespace
}  // namespace quicksilver::QS_CUDA
