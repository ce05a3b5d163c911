// The persistent thread pool and the counters.
#include "quicksilver/runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace quicksilver {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The CPU that the calling thread is on, or -1.
int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A GEMV can last 30 microseconds and a sleeping thread takes that long to wake, so who waits spins first; but not for
// longer than that, because the core may be wanted by somebody else.
constexpr std::chrono::microseconds kSpin{40};

// Waits until `value` differs from `old`.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, bool spin) {
  if (spin) {
    // The first checks come without a look at the clock: most waits end here.
    for (int i = 0; i < 64; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// CPUs that this process may use.
int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// One thread per core that this process may use (a second thread on a core only fights for its caches), and no more
// than the container's CPU quota.
int default_threads() {
  int count = available_cpus();
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
      std::string siblings;
      cores.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
    }
    if (!cores.empty()) count = static_cast<int>(cores.size());
  }
  std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (quota_file >> quota >> period && period > 0) {
    count = std::min(count, std::max(1, static_cast<int>(quota / period + 0.5)));
  }
#endif
  return std::max(1, count);
}

// Each run has as many shares as the pool has threads. A thread takes a share when it gets there, so that the caller
// does the work itself where a worker is late, as it is on a busy machine: nobody waits for a thread that hasn't begun.
class Pool {
 public:
  explicit Pool(int size) { start(size); }
  ~Pool() { stop(); }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void resize(int size) {
    const std::lock_guard lock(mutex_);
    if (size == this->size()) return;
    stop();
    start(size);
  }

  void run(void (*body)(void*, int, int), void* context) {
    const std::lock_guard lock(mutex_);
    const int shares = size();
    if (shares == 1) {
      body(context, 0, 1);
      return;
    }
    body_ = body;
    context_ = context;
    caller_cpu_.store(current_cpu(), std::memory_order_relaxed);
    unfinished_.store(static_cast<uint32_t>(shares), std::memory_order_relaxed);
    next_share_.store(0, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_shares();
    for (uint32_t left = unfinished_.load(std::memory_order_acquire); left != 0;
         left = unfinished_.load(std::memory_order_acquire)) {
      wait_for_change(unfinished_, left, spin_);
    }
  }

 private:
  void start(int size) {
    size_.store(size, std::memory_order_relaxed);
    next_share_.store(size, std::memory_order_relaxed);
    // With more threads than CPUs, the one that we spin for may be waiting for our CPU.
    spin_ = size <= available_cpus();
    stopping_ = false;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    for (int worker = 1; worker < size; ++worker) {
      threads_.emplace_back([this, generation] { work(generation); });
    }
  }

  void stop() {
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void work(uint32_t seen) {
    for (;;) {
      // On the caller's own CPU, spinning would only keep the caller from its work.
      const bool spin = spin_ && current_cpu() != caller_cpu_.load(std::memory_order_relaxed);
      wait_for_change(generation_, seen, spin);
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_) return;
      take_shares();
    }
  }

  // A share once taken keeps the run from ending, so body_ and context_ are the ones that it was taken of: also for a
  // late thread, which was woken for an earlier run.
  void take_shares() {
    const int shares = size();
    for (;;) {
      int share = next_share_.load(std::memory_order_acquire);
      do {
        if (share >= shares) return;
      } while (!next_share_.compare_exchange_weak(share, share + 1, std::memory_order_acq_rel));
      body_(context_, share, shares);
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::atomic<int> size_{1};
  std::atomic<int> caller_cpu_{-1};
  bool spin_ = true;
  std::atomic<bool> stopping_{false};  // read by a worker that is still leaving its last wait
  std::vector<std::thread> threads_;
  void (*body_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  // Written by different threads at different times, so each has a cache line of its own.
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> next_share_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
};

std::atomic<Pool*> pool_instance{nullptr};
std::atomic<int> chosen_size{0};  // 0: nobody has said yet

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of the threads: it makes a pool of its own at first use, of the same size, and leaves the
// parent's alone. Registered before there is a pool, and nothing here takes a lock outside of the pool itself: a thread
// of the parent that held one would hold it for ever in the child.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  if (Pool* parents = pool_instance.exchange(nullptr)) chosen_size = parents->size();
});
#endif

// The pool is never destroyed: at exit its threads sleep, and a destructor would have to join them in an order that a
// shared library can't promise.
Pool& pool() {
  Pool* current = pool_instance.load(std::memory_order_acquire);
  if (current != nullptr) [[likely]]
    return *current;
  const int size = chosen_size.load();
  Pool* const made = new Pool(size > 0 ? size : default_threads());
  if (pool_instance.compare_exchange_strong(current, made, std::memory_order_acq_rel)) return *made;
  delete made;  // another thread was first
  return *current;
}

std::atomic<int64_t> gemm_macs{0}, attention_pairs{0}, weight_bytes_read{0}, kv_bytes_read{0};
std::atomic<int64_t> attention_nanoseconds{0}, step_nanoseconds{0}, step_attention_nanoseconds{0};

}  // namespace

int threads() { return pool().size(); }

void set_threads(int count) {
  if (count < 1) throw std::invalid_argument("threads must be at least 1, not " + std::to_string(count));
  chosen_size = count;
  pool().resize(count);
}

void start_threads(int count) {
  if (count < 1) throw std::invalid_argument("threads must be at least 1, not " + std::to_string(count));
  int nobody = 0;
  if (pool_instance.load(std::memory_order_acquire) == nullptr) chosen_size.compare_exchange_strong(nobody, count);
}

void parallel(void (*body)(void* context, int worker, int workers), void* context) { pool().run(body, context); }

void count(const Counters& delta) {
  const auto add = [](std::atomic<int64_t>& sum, int64_t value) {
    if (value != 0) sum.fetch_add(value, std::memory_order_relaxed);
  };
  add(gemm_macs, delta.gemm_macs);
  add(attention_pairs, delta.attention_pairs);
  add(weight_bytes_read, delta.weight_bytes_read);
  add(kv_bytes_read, delta.kv_bytes_read);
  add(attention_nanoseconds, delta.attention_nanoseconds);
  add(step_nanoseconds, delta.step_nanoseconds);
  add(step_attention_nanoseconds, delta.step_attention_nanoseconds);
}

Counters counters() {
  return {gemm_macs.load(),
          attention_pairs.load(),
          weight_bytes_read.load(),
          kv_bytes_read.load(),
          attention_nanoseconds.load(),
          step_nanoseconds.load(),
          step_attention_nanoseconds.load()};
}

void reset_counters() {
  for (std::atomic<int64_t>* sum : {&gemm_macs, &attention_pairs, &weight_bytes_read, &kv_bytes_read,
                                    &attention_nanoseconds, &step_nanoseconds, &step_attention_nanoseconds}) {
    sum->store(0);
  }
}

int64_t second_level_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long said = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (said > 0) return static_cast<int64_t>(said);
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace quicksilver
