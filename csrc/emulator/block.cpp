#include "block.h"

#include <atomic>
#include <bit>
#include <stdexcept>
#include <utility>

namespace quicksilver::emulator {
namespace {

thread_local Running running_thread{nullptr, nullptr};

constexpr uint32_t bit(int lane) { return 1u << lane; }

std::string describe_waiting(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.number) + " (" + fiber.what + " at " + describe(fiber.site) + ")";
}

}  // namespace

Running& running() {
  if (running_thread.fiber == nullptr)
    throw std::logic_error("emulator: a device function was called outside a kernel");
  return running_thread;
}

void Block::start(const Work& work, int64_t number, const Settings& settings, KernelCounts* counts) {
  work_ = &work;
  const int64_t plane = int64_t{work.grid.x} * work.grid.y;
  index_ = {static_cast<unsigned>(number % work.grid.x), static_cast<unsigned>(number % plane / work.grid.x),
            static_cast<unsigned>(number / plane)};
  schedule_ = settings.schedule;
  random_.seed(static_cast<uint32_t>(settings.seed * 2654435761u + static_cast<uint64_t>(number) + 1));
  const auto threads = static_cast<size_t>(work.threads);
  stacks_ = take_stacks(threads);
  fibers_.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.number = static_cast<int>(i);
    fiber.position = {{static_cast<unsigned>(i), 0, 0}, index_, {static_cast<unsigned>(threads), 1, 1}, work.grid};
    fiber.context = start_context(stacks_[i], entry);
  }
  warps_.assign(threads / kLanes, {});
  for (size_t w = 0; w < warps_.size(); ++w) make_runnable(w, ~0u);
  at_barrier_ = returned_ = 0;
  ending_ = false;
  error_.clear();
  shared_.start(work.shared_bytes, static_cast<int>(warps_.size()));
  counter_.reset();
  if (counts != nullptr) counter_.emplace(*counts, static_cast<int>(warps_.size()));
}

void Block::entry() {
  arrived();
  Block& block = *running_thread.block;
  Fiber& fiber = *running_thread.fiber;
  try {
    if (!block.ending_) {
      block.work_->body(block.work_->context);
      block.check_return(fiber);
    }
  } catch (const Ended&) {
  } catch (const std::exception& error) {
    block.fail(error.what());
  } catch (...) {
    block.fail("an exception of an unknown type");
  }
  block.warp_of(fiber).returned |= bit(fiber.lane());
  ++block.returned_;
  Fiber* next = block.next();
  running_thread.fiber = next;
  switch_context(fiber.context, next != nullptr ? next->context : block.outside_, true);
}

// --- the scheduler ---------------------------------------------------------------------------------------------------
void Block::make_runnable(size_t warp, uint32_t lanes) {
  if (lanes == 0) return;
  warps_[warp].can_run |= lanes;
  warps_that_can_run_ |= 1u << warp;
}

int Block::choose(uint32_t set) {
  switch (schedule_) {
    case Settings::Schedule::forward:
      return std::countr_zero(set);
    case Settings::Schedule::backward:
      return 31 - std::countl_zero(set);
    case Settings::Schedule::random:
      break;
  }
  for (auto skip = random_() % static_cast<unsigned>(std::popcount(set)); skip > 0; --skip) set &= set - 1;
  return std::countr_zero(set);
}

Fiber* Block::next() {
  if (warps_that_can_run_ == 0) return nullptr;
  const int w = choose(warps_that_can_run_);
  Warp& warp = warps_[static_cast<size_t>(w)];
  const int lane = choose(warp.can_run);
  warp.can_run &= ~bit(lane);
  if (warp.can_run == 0) warps_that_can_run_ &= ~(1u << w);
  return &fibers_[static_cast<size_t>(w * kLanes + lane)];
}

void Block::switch_from(Fiber& fiber) {
  Fiber* to = next();
  running_thread.fiber = to;
  switch_context(fiber.context, to != nullptr ? to->context : outside_);
  if (ending_) throw Ended();
}

void Block::run_threads() {
  while (Fiber* fiber = next()) {
    running_thread = {this, fiber};
    switch_context(outside_, fiber->context);
  }
  running_thread = {nullptr, nullptr};
}

void Block::run() {
  run_threads();
  if (!ended()) {
    bool waits = false;
    for_waiting([&](const Fiber&) { waits = true; });
    if (waits) return;
    fail(why_stuck());
    run_threads();
  }
  if (counter_) counter_->close();
  for (Fiber& fiber : fibers_) shared_.forget(fiber.copies);
  give_stacks(std::exchange(stacks_, {}));
  try {
    if (error_.empty()) shared_.check_guards();
  } catch (const std::runtime_error& error) {
    error_ = error.what();
  }
  if (!error_.empty()) {
    const std::string block =
        "(" + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ", " + std::to_string(index_.z) + ")";
    throw std::runtime_error("kernel " + work_->name + ", block " + block + ": " + error_);
  }
}

void Block::fail(const std::string& error) {
  if (!ending_) error_ = error;
  ending_ = true;
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    make_runnable(w, warp.in_collective | warp.at_barrier | warp.waiting);
    warp.in_collective = warp.at_barrier = warp.waiting = 0;
  }
}

void Block::abandon() {
  fail("");
  try {
    run();
  } catch (const std::runtime_error&) {  // another block's error is the one to report
  }
}

bool Block::wake() {
  for_waiting([&](const Fiber& fiber) {
    if (std::atomic_ref(*const_cast<int32_t*>(fiber.flag)).load(std::memory_order_acquire) < fiber.value) return;
    warp_of(fiber).waiting &= ~bit(fiber.lane());
    make_runnable(static_cast<size_t>(fiber.warp()), bit(fiber.lane()));
  });
  return warps_that_can_run_ != 0;
}

// --- where threads wait ----------------------------------------------------------------------------------------------
const Fiber& Block::in_warp(const Fiber& fiber, int lane) const {
  return fibers_[static_cast<size_t>(fiber.warp() * kLanes + lane)];
}

const Fiber* Block::returned() const {
  for (const Fiber& fiber : fibers_) {
    if (warps_[static_cast<size_t>(fiber.warp())].returned >> fiber.lane() & 1) return &fiber;
  }
  return nullptr;
}

std::string Block::why_stuck() const {
  const auto gone = [&](const Fiber& fiber) {
    return (warps_[static_cast<size_t>(fiber.warp())].returned >> fiber.lane() & 1) != 0;
  };
  const auto state = [&](const Fiber& fiber) {
    return gone(fiber) ? "have returned" : std::string("wait in ") + fiber.what + " at " + describe(fiber.site);
  };
  std::string text = "no thread can go on";
  for (size_t first = 0, end, named = 0; first < fibers_.size(); first = end) {
    const std::string here = state(fibers_[first]);
    for (end = first + 1; end < fibers_.size() && state(fibers_[end]) == here;) ++end;
    if (++named > 8) return text + "; ...";
    text += "; threads " + std::to_string(first) + " to " + std::to_string(end - 1) + " " + here;
  }
  return text;
}

void Block::check_return(const Fiber& fiber) const {
  const Warp& warp = warps_[static_cast<size_t>(fiber.warp())];
  const Fiber* waits = warp.in_collective != 0 ? &in_warp(fiber, std::countr_zero(warp.in_collective))
                       : at_barrier_ > 0       ? &fibers_[static_cast<size_t>(first_at_barrier_)]
                                               : nullptr;
  if (waits == nullptr) return;
  throw std::runtime_error("thread " + std::to_string(fiber.number) + " returned, but " + describe_waiting(*waits) +
                           " waits for all threads");
}

void Block::sync_block(const Site& site) {
  Fiber& fiber = *running_thread.fiber;
  if (ending_) throw Ended();
  fiber.what = "sync_block";
  fiber.site = site;
  Warp& warp = warp_of(fiber);
  if (warp.in_collective != 0) {
    throw std::runtime_error("threads of a warp went apart: " + describe_waiting(fiber) + " and " +
                             describe_waiting(in_warp(fiber, std::countr_zero(warp.in_collective))));
  }
  if (returned_ > 0) {
    throw std::runtime_error(describe_waiting(fiber) + " waits for all threads, but thread " +
                             std::to_string(returned()->number) + " has returned");
  }
  if (at_barrier_ == 0) {
    first_at_barrier_ = fiber.number;
  } else if (const Fiber& first = fibers_[static_cast<size_t>(first_at_barrier_)]; !same_place(first.site, site)) {
    throw std::runtime_error("threads of a block wait at different barriers: " + describe_waiting(first) + " and " +
                             describe_waiting(fiber));
  }
  if (++at_barrier_ < work_->threads) {
    warp.at_barrier |= bit(fiber.lane());
    switch_from(fiber);
    return;
  }
  at_barrier_ = 0;
  for (size_t w = 0; w < warps_.size(); ++w) make_runnable(w, std::exchange(warps_[w].at_barrier, 0));
  shared_.block_barrier();
}

void Block::collective(const char* what, const void* in, void* out, Compute compute, bool orders_memory,
                       const Site& site) {
  Fiber& fiber = *running_thread.fiber;
  if (ending_) throw Ended();
  fiber.what = what;
  fiber.site = site;
  Warp& warp = warp_of(fiber);
  if (warp.returned != 0) {
    throw std::runtime_error(describe_waiting(fiber) + " needs all lanes, but thread " +
                             std::to_string(in_warp(fiber, std::countr_zero(warp.returned)).number) + " has returned");
  }
  const uint32_t others = warp.at_barrier | warp.in_collective;
  if (others != 0) {
    const Fiber& other = in_warp(fiber, std::countr_zero(others));
    if (warp.at_barrier != 0 || !same_place(other.site, site)) {
      throw std::runtime_error("threads of a warp went apart: " + describe_waiting(other) + " and " +
                               describe_waiting(fiber));
    }
  }
  warp.in[fiber.lane()] = in;
  warp.out[fiber.lane()] = out;
  warp.in_collective |= bit(fiber.lane());
  if (warp.in_collective != ~0u) {
    switch_from(fiber);
    return;
  }
  warp.in_collective = 0;
  if (compute != nullptr) compute(warp.in, warp.out);
  if (orders_memory) shared_.warp_barrier(fiber.warp());
  make_runnable(static_cast<size_t>(fiber.warp()), ~bit(fiber.lane()));
}

void Block::wait(const int32_t* flag, int32_t value, const Site& site) {
  Fiber& fiber = *running_thread.fiber;
  if (ending_) throw Ended();
  fiber.what = "wait_until_at_least";
  fiber.site = site;
  fiber.flag = flag;
  fiber.value = value;
  warp_of(fiber).waiting |= bit(fiber.lane());
  switch_from(fiber);
}

}  // namespace quicksilver::emulator
