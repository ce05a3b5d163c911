// A block of threads as fibers: their scheduler, barriers, collectives and shared memory.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "counts.h"
#include "emulator.h"
#include "fiber.h"
#include "shared.h"

namespace quicksilver::emulator {

// What a block runs.
struct Work {
  std::string name;
  Index grid;
  int threads;
  int64_t shared_bytes;
  void (*body)(const void*);
  const void* context;
};

struct Fiber {
  Position position;
  int number = 0;  // within the block
  Context context;
  // Where it waits: at a barrier, in a collective, or for *flag to reach `value`.
  const char* what = "";
  Site site;
  const int32_t* flag = nullptr;
  int32_t value = 0;
  CopyQueue copies;

  int warp() const { return number / kLanes; }
  int lane() const { return number % kLanes; }
};

class Block {
 public:
  void start(const Work& work, int64_t number, const Settings& settings, KernelCounts* counts);
  // Runs its threads until all have returned or only waiting ones are left. Throws where a rule is broken, after all
  // threads have ended.
  void run();
  bool ended() const { return returned_ == work_->threads; }
  // Ends the threads of a block that won't be run any more.
  void abandon();

  // Whether a thread that waits for a flag may go on; such threads can run from now on.
  bool wake();
  template <class F>
  void for_waiting(const F& f) const {
    for (size_t w = 0; w < warps_.size(); ++w) {
      for (int i = 0; i < kLanes; ++i) {
        if (warps_[w].waiting >> i & 1) f(fibers_[w * kLanes + static_cast<size_t>(i)]);
      }
    }
  }

  // By the running thread.
  void sync_block(const Site& site);
  void collective(const char* what, const void* in, void* out, Compute compute, bool orders_memory, const Site& site);
  void wait(const int32_t* flag, int32_t value, const Site& site);

  SharedMemory& shared() { return shared_; }
  BlockCounter* counter() { return counter_ ? &*counter_ : nullptr; }

 private:
  // Sets of lanes.
  struct Warp {
    uint32_t can_run = 0, in_collective = 0, at_barrier = 0, waiting = 0, returned = 0;
    const void* in[kLanes];
    void* out[kLanes];
  };
  struct Ended {};  // thrown in threads to end them

  static void entry();
  void make_runnable(size_t warp, uint32_t lanes);
  Fiber* next();
  int choose(uint32_t set);
  void switch_from(Fiber& fiber);  // to a thread that can run, until this one can
  void run_threads();
  void check_return(const Fiber& fiber) const;
  void fail(const std::string& error);
  std::string why_stuck() const;
  Warp& warp_of(const Fiber& fiber) { return warps_[static_cast<size_t>(fiber.warp())]; }
  const Fiber& in_warp(const Fiber& fiber, int lane) const;
  const Fiber* returned() const;

  const Work* work_ = nullptr;
  Index index_;
  Settings::Schedule schedule_{};
  std::minstd_rand random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<void*> stacks_;
  uint32_t warps_that_can_run_ = 0;
  int at_barrier_ = 0, first_at_barrier_ = 0, returned_ = 0;  // threads, a thread, threads
  Context outside_;
  bool ending_ = false;
  std::string error_;
  SharedMemory shared_;
  std::optional<BlockCounter> counter_;
};

// The thread that runs on this OS thread, and its block.
struct Running {
  Block* block;
  Fiber* fiber;
};
Running& running();  // throws std::logic_error outside of kernels

}  // namespace quicksilver::emulator
