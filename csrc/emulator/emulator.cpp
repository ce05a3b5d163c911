#include "emulator.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "block.h"

namespace quicksilver::emulator {
namespace {

// What a small GPU holds at a time: blocks that wait for each other must not count on more.
constexpr int64_t kResidentBlocks = 32, kResidentThreads = 16 * 1024;
constexpr int64_t kMostThreads = 1024, kMostSharedBytes = 227 * 1024, kMostBlocksDown = 65535;

std::mutex counts_mutex;
std::vector<KernelCounts> all_counts;

// Blocks keep their tables from launch to launch.
std::mutex blocks_mutex;
std::vector<std::unique_ptr<Block>> free_blocks;

std::unique_ptr<Block> take_block() {
  const std::lock_guard lock(blocks_mutex);
  if (free_blocks.empty()) return std::make_unique<Block>();
  auto block = std::move(free_blocks.back());
  free_blocks.pop_back();
  return block;
}

void give_block(std::unique_ptr<Block> block) {
  const std::lock_guard lock(blocks_mutex);
  free_blocks.push_back(std::move(block));
}

class Launch {
 public:
  Launch(const Work& work, const Settings& settings)
      : work_(work),
        settings_(settings),
        blocks_(int64_t{work.grid.x} * work.grid.y * work.grid.z),
        most_resident_(std::min(kResidentBlocks, kResidentThreads / work.threads)) {}

  void run() {
    const int64_t workers = std::clamp<int64_t>(settings_.workers, 1, blocks_);
    waits_.resize(static_cast<size_t>(workers));
    counts_.resize(static_cast<size_t>(workers));
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < workers; ++i) {
      threads.emplace_back([this, i] { work(static_cast<size_t>(i)); });
    }
    work(0);
    for (std::thread& thread : threads) thread.join();
    if (!error_.empty()) throw std::runtime_error(error_);
    if (settings_.counts) add_counts();
  }

 private:
  struct Wait {
    const int32_t* flag;
    int32_t value;
    std::string who;
  };

  // Runs blocks until there are none left. A block whose threads wait for another block stays while others run.
  void work(size_t worker) {
    std::vector<std::unique_ptr<Block>> mine;
    try {
      while (!failed_) {
        std::unique_ptr<Block>* block = nullptr;
        for (auto& candidate : mine) {
          if (candidate->wake()) block = &candidate;
        }
        if (block == nullptr) block = start_block(worker, mine);
        if (block == nullptr) {
          if (mine.empty() && next_ >= blocks_) break;
          wait(worker, mine);
          continue;
        }
        (*block)->run();
        if ((*block)->ended()) {
          give_block(std::move(*block));
          mine.erase(mine.begin() + (block - mine.data()));
          --resident_;
        }
      }
    } catch (const std::exception& error) {
      fail(error.what());
    }
    for (auto& block : mine) {
      if (!block->ended()) block->abandon();
    }
    const std::lock_guard lock(mutex_);
    ++idle_;
  }

  std::unique_ptr<Block>* start_block(size_t worker, std::vector<std::unique_ptr<Block>>& mine) {
    if (++resident_ > most_resident_) {
      --resident_;
      return nullptr;
    }
    const int64_t number = next_++;
    if (number >= blocks_) {
      --resident_;
      return nullptr;
    }
    auto block = take_block();
    block->start(work_, number, settings_, settings_.counts ? &counts_[worker] : nullptr);
    mine.push_back(std::move(block));
    return &mine.back();
  }

  // Until something may have changed. Throws where no worker has anything to do but wait: then nothing ever changes.
  void wait(size_t worker, const std::vector<std::unique_ptr<Block>>& mine) {
    {
      const std::lock_guard lock(mutex_);
      for (const auto& block : mine) {
        block->for_waiting([&](const Fiber& fiber) { waits_[worker].push_back(describe_wait(fiber)); });
      }
      ++idle_;
      if (idle_ == static_cast<int>(waits_.size()) && stuck()) {
        throw std::runtime_error("kernel " + work_.name + ": no block can go on, with " + std::to_string(resident_) +
                                 " of " + std::to_string(blocks_) + " blocks resident: " + all_waits());
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    const std::lock_guard lock(mutex_);
    --idle_;
    waits_[worker].clear();
  }

  static Wait describe_wait(const Fiber& fiber) {
    const Index& block = fiber.position.block;
    return {fiber.flag, fiber.value,
            "thread " + std::to_string(fiber.number) + " of block (" + std::to_string(block.x) + ", " +
                std::to_string(block.y) + ", " + std::to_string(block.z) + ") waits at " + describe(fiber.site) +
                " for " + std::to_string(fiber.value)};
  }

  bool stuck() const {
    if (next_ < blocks_ && resident_ < most_resident_) return false;
    for (const auto& waits : waits_) {
      for (const Wait& wait : waits) {
        if (std::atomic_ref(*const_cast<int32_t*>(wait.flag)).load() >= wait.value) return false;
      }
    }
    return true;
  }

  std::string all_waits() const {
    std::string text;
    int named = 0;
    for (const auto& waits : waits_) {
      for (const Wait& wait : waits) {
        if (++named > 8) return text + "; ...";
        text += (named > 1 ? "; " : "") + wait.who + ", which is " + std::to_string(*wait.flag);
      }
    }
    return text;
  }

  void fail(const std::string& error) {
    const std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = error;
    failed_ = true;
  }

  void add_counts() {
    const std::lock_guard lock(counts_mutex);
    auto at = std::find_if(all_counts.begin(), all_counts.end(), [&](const auto& c) { return c.name == work_.name; });
    if (at == all_counts.end()) {
      at = all_counts.emplace(at);
      at->name = work_.name;
    }
    at->launches += 1;
    at->blocks += blocks_;
    at->threads += blocks_ * work_.threads;
    for (const KernelCounts& counts : counts_) add(*at, counts);
    at->shared_bytes = std::max(at->shared_bytes, work_.shared_bytes);
    at->device = current_device();
  }

  const Work& work_;
  const Settings settings_;
  const int64_t blocks_, most_resident_;
  std::atomic<int64_t> next_ = 0, resident_ = 0;
  std::atomic<bool> failed_ = false;
  std::mutex mutex_;  // of what follows
  int idle_ = 0;      // workers that wait or are through
  std::vector<std::vector<Wait>> waits_;
  std::string error_;
  std::vector<KernelCounts> counts_;  // of each worker
};

void check_launch(const Work& work) {
  const auto check = [&](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error("kernel " + work.name + ": launched with " + what);
  };
  check(work.threads > 0 && work.threads <= kMostThreads && work.threads % kLanes == 0,
        std::to_string(work.threads) + " threads in a block; a multiple of 32 up to 1024 is wanted");
  check(work.shared_bytes >= 0 && work.shared_bytes <= kMostSharedBytes,
        std::to_string(work.shared_bytes) + " bytes of shared memory; no GPU has more than 227 KiB");
  check(work.grid.x <= 0x7fffffffu && work.grid.y <= kMostBlocksDown && work.grid.z <= kMostBlocksDown,
        "a grid of " + std::to_string(work.grid.x) + " x " + std::to_string(work.grid.y) + " x " +
            std::to_string(work.grid.z) + " blocks");
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

std::vector<KernelCounts> take_counts() {
  const std::lock_guard lock(counts_mutex);
  return std::exchange(all_counts, {});
}

void launch(const char* name, Index grid, int threads, int64_t shared_bytes, void (*body)(const void*),
            const void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const Work work{name, grid, threads, shared_bytes, body, context};
  check_launch(work);
  Launch(work, settings()).run();
}

// --- by the running thread -------------------------------------------------------------------------------------------
const Position& position() { return running().fiber->position; }

unsigned char* shared_memory() { return running().block->shared().data(); }

void sync_block(const Site& site) { running().block->sync_block(site); }

void sync_warp(const Site& site) { running().block->collective("sync_warp", nullptr, nullptr, nullptr, true, site); }

void collective(const char* what, const void* in, void* out, Compute compute, const Site& site) {
  running().block->collective(what, in, out, compute, false, site);
}

void global_access(Access access, const void* p, int bytes, const Site& site) {
  const auto [block, fiber] = running();
  const auto here = [&] {
    return std::string(access == Access::load ? "load" : "store") + " by thread " + std::to_string(fiber->number) +
           " at " + describe(site);
  };
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0) {
    throw std::runtime_error(here() + " of " + std::to_string(bytes) +
                             " bytes at an address that isn't a multiple of them");
  }
  if (block->shared().contains(p))
    throw std::runtime_error(here() + " of shared memory: use load_shared, store_shared");
  if (BlockCounter* counter = block->counter()) {
    counter->access(access == Access::load ? RequestKind::global_load : RequestKind::global_store, fiber->warp(),
                    fiber->lane(), p, bytes, site);
  }
}

void shared_access(Access access, const void* p, int bytes, const Site& site) {
  const auto [block, fiber] = running();
  block->shared().access(access, fiber->number, p, bytes, site);
  if (BlockCounter* counter = block->counter()) {
    counter->access(access == Access::load ? RequestKind::shared_load : RequestKind::shared_store, fiber->warp(),
                    fiber->lane(), p, bytes, site);
  }
}

void wait_until_at_least(const int32_t* p, int32_t value, const Site& site) {
  Block& block = *running().block;
  while (std::atomic_ref(*const_cast<int32_t*>(p)).load(std::memory_order_acquire) < value) block.wait(p, value, site);
}

void cp_async16(void* shared, const void* global, bool valid, const Site& site) {
  const auto [block, fiber] = running();
  block->shared().issue(fiber->copies, fiber->number, shared, valid ? global : nullptr, site);
  BlockCounter* counter = block->counter();
  if (counter != nullptr && valid) {
    counter->access(RequestKind::cp_async, fiber->warp(), fiber->lane(), global, 16, site);
  }
}

void cp_async_commit() { ++running().fiber->copies.groups; }

void cp_async_wait(int groups_under_way) {
  const auto [block, fiber] = running();
  block->shared().finish(fiber->copies, fiber->number, groups_under_way);
}

}  // namespace quicksilver::emulator
