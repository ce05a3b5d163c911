// Named ranges on Nsight's time line. Without the toolkit's header, or without a profiler, they cost nothing.
#pragma once

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define QS_HAS_NVTX 1
#endif

namespace profiler {

class Range {
 public:
#ifdef QS_HAS_NVTX
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
#else
  explicit Range(const char*) {}
  ~Range() {}
#endif
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace profiler
