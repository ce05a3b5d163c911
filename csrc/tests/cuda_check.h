// What the tests of the CUDA kernels share, run by the emulator or, with QS_CUDA=cuda, by a GPU. The CPU's kernels,
// through the public API, are what they are compared with; data, reports and comparisons are check.h's.
#pragma once

#include <algorithm>
#include <functional>

#include "check.h"
#include "quicksilver/cuda.h"
#ifdef QS_EMULATED
#include "emulator.h"
#endif

namespace check {

#ifdef QS_EMULATED
// Runs `body` under the emulator's three schedules of a block's threads. A rule broken by a kernel is a failed test.
inline void schedules(const std::string& what, const std::function<void()>& body) {
  using Schedule = quicksilver::emulator::Settings::Schedule;
  const auto before = quicksilver::emulator::settings();
  const struct {
    Schedule schedule;
    const char* name;
  } all[] = {{Schedule::forward, "forward"}, {Schedule::backward, "backward"}, {Schedule::random, "random"}};
  for (const auto& [schedule, name] : all) {
    quicksilver::emulator::settings().schedule = schedule;
    quicksilver::emulator::settings().seed += 1;
    try {
      body();
    } catch (const std::exception& error) {
      report(false, what + ", " + name + " schedule: " + error.what());
    }
  }
  quicksilver::emulator::settings() = before;
}
#else
// Runs `body` on the GPU, where every launch waits for its end (mapped.cpp).
inline void schedules(const std::string& what, const std::function<void()>& body) {
  try {
    body();
    quicksilver::QS_CUDA::synchronize(nullptr);
  } catch (const std::exception& error) {
    report(false, what + ": " + error.what());
  }
}
#endif

// What `body` throws, or "" where it throws nothing.
inline std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

constexpr int32_t kGarbage = INT32_MIN / 3;  // an index that nobody must follow

template <typename T>
bool all_zero(const std::vector<T>& x) {
  return std::all_of(x.begin(), x.end(), [](T v) { return v == 0; });
}

// Memory that a kernel's scratch wants: zero before its first use, and checked to be zero again where it should be.
inline std::vector<char> zeroed(int64_t bytes) { return std::vector<char>(static_cast<size_t>(bytes), 0); }

}  // namespace check
