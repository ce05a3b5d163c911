// Compares what a run left behind with a plain computation, for a sample of rows and columns.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace profiler {

struct Finding {
  std::string what;
  double error = 0;  // relative, in the 2-norm; for what must be exact: 0 or 1
  double most = 0;
  int64_t values = 0;
  bool ok() const { return error <= most; }  // a NaN isn't
};

// Restores the problem, runs it, and looks.
std::vector<Finding> check(Problem& problem);

}  // namespace profiler
