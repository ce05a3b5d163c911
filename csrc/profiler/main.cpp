// quicksilver_profile: runs a kernel, a stage or a step at a model's shapes, times it and checks its answer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>

#include "check.h"
#include "problem.h"
#include "ranges.h"

namespace {

using namespace profiler;

// One JSON object, its values in the order in which they were given.
class Json {
 public:
  Json& text(const std::string& name, const std::string& value) {
    std::string escaped;
    for (const char c : value) {
      if (c == '"' || c == '\\') escaped += '\\';
      escaped += c;
    }
    return raw(name, '"' + escaped + '"');
  }
  Json& number(const std::string& name, double value) {
    if (!std::isfinite(value)) return raw(name, "null");
    std::ostringstream digits;
    digits.precision(std::floor(value) == value ? 17 : 6);
    digits << value;
    return raw(name, digits.str());
  }
  Json& raw(const std::string& name, const std::string& value) {
    text_ += (text_.empty() ? "\"" : ", \"") + name + "\": " + value;
    return *this;
  }
  std::string str() const { return '{' + text_ + '}'; }

 private:
  std::string text_;
};

struct Times {
  std::vector<double> seconds;  // ascending
  double at(double share) const {
    return seconds[static_cast<size_t>(std::lround(share * static_cast<double>(seconds.size() - 1)))];
  }
};

Times measure(Problem& problem) {
  const Arguments& a = problem.arguments;
  Times times;
  for (int64_t i = -a.warmup; i < a.repeat; ++i) {
    problem.restore();
    if (a.cold_cache) problem.backend.flush_cache();
    const Range range(i < 0 ? "warm-up" : "run");
    const double seconds = problem.backend.time([&] { problem.run(); });
    if (i >= 0) times.seconds.push_back(seconds);
  }
  std::sort(times.seconds.begin(), times.seconds.end());
  return times;
}

std::unique_ptr<Backend> make_backend(const Arguments& a) {
  if (a.backend == "cpu") return cpu_backend(a.threads);
#ifdef QS_HAS_CUDA
  if (a.backend == "cuda") return cuda::make_backend();
#endif
#ifdef QS_HAS_EMULATOR
  if (a.backend == "emulated") return emulated::make_backend();
#endif
  throw UsageError("--backend " + a.backend + ": this quicksilver_profile was built without it");
}

std::string json(const Arguments& a, const std::string& machine, const Work& work, const Times& times,
                 const std::vector<Finding>& findings, const std::string& counts) {
  const Shape& s = a.shape;
  Json shape;
  shape.text("name", s.name).number("layers", double(s.layers)).number("d", double(s.d));
  shape.number("heads", double(s.heads)).number("kv_heads", double(s.kv_heads));
  shape.number("head_size", double(s.head_size)).number("ffn", double(s.ffn)).number("vocab", double(s.vocab));
  shape.number("group", double(s.group)).text("family", s.llama ? "llama" : "gpt2");
  Json all;
  all.text("kernel", a.kernel_name).text("backend", a.backend).text("machine", machine).raw("shape", shape.str());
  if (a.kernel == Kernel::matryoshka_gemm) all.text("matrix", a.matrix);
  all.number("rows", double(a.rows)).number("sequences", double(a.sequences)).number("context", double(a.context));
  all.number("halting_ratio", a.halting_ratio).number("fusion_ratio", a.fusion_ratio);
  all.text("precision", a.precision).number("int4_share", a.int4_share).text("kv_type", a.kv_type_name);
  all.raw("cold_cache", a.cold_cache ? "true" : "false").number("repeat", double(a.repeat));
  all.number("bytes", work.bytes).number("multiply_adds", work.multiply_adds);
  const double median = times.at(0.5);
  all.number("median_us", median * 1e6).number("p10_us", times.at(0.1) * 1e6).number("p90_us", times.at(0.9) * 1e6);
  all.number("gigabytes_per_second", work.bytes / median / 1e9);
  all.number("giga_multiply_adds_per_second", work.multiply_adds / median / 1e9);
  std::string checks;
  for (const Finding& f : findings) {
    Json one;
    one.text("what", f.what).number("error", f.error).number("most", f.most).number("values", double(f.values));
    one.raw("ok", f.ok() ? "true" : "false");
    checks += (checks.empty() ? "" : ", ") + one.str();
  }
  all.raw("checks", '[' + checks + ']');
  if (!counts.empty()) all.raw("counts", counts);
  return all.str();
}

void print_table(const Arguments& a, const std::string& machine, const Work& work, const Times& times) {
  std::printf("%s on %s (%s), %s, %lld rows\n", a.kernel_name.c_str(), a.backend.c_str(), machine.c_str(),
              a.shape.name.c_str(), static_cast<long long>(a.rows));
  std::printf("median %.1f us, from %.1f (10%%) to %.1f (90%%), %zu runs%s\n", times.at(0.5) * 1e6, times.at(0.1) * 1e6,
              times.at(0.9) * 1e6, times.seconds.size(), a.cold_cache ? ", cache overwritten before each" : "");
  std::printf("at least %.3f MB: %.2f GB/s\n", work.bytes / 1e6, work.bytes / times.at(0.5) / 1e9);
  if (work.multiply_adds == 0) return;
  std::printf("%.3f M multiply-adds: %.2f G/s\n", work.multiply_adds / 1e6, work.multiply_adds / times.at(0.5) / 1e9);
}

int run(const Arguments& a) {
  const std::unique_ptr<Backend> backend = make_backend(a);
  Problem problem(*backend, a);
  const Times times = measure(problem);
  problem.restore();
  backend->take_counts();  // what was counted so far is no part of a run
  problem.run();
  const std::string counts = backend->take_counts();
  std::vector<Finding> findings;
  if (a.check) findings = check(problem);
  bool right = true;
  for (const Finding& f : findings) {
    right &= f.ok();
    if (!f.ok()) {
      std::fprintf(stderr, "quicksilver_profile: wrong answer: %s: error %g, at most %g wanted, over %lld values\n",
                   f.what.c_str(), f.error, f.most, static_cast<long long>(f.values));
    }
  }
  const Work work = problem.work();
  if (a.json.empty()) {
    print_table(a, backend->description(), work, times);
    double worst = 0;
    int64_t values = 0;
    for (const Finding& f : findings) {
      worst = std::max(worst, f.error);
      values += f.values;
    }
    if (a.check && right)
      std::printf("answer checked: %lld values, error %.1e\n", static_cast<long long>(values), worst);
  } else {
    const std::string text = json(a, backend->description(), work, times, findings, counts);
    if (a.json == "-") {
      std::cout << text << '\n';
    } else {
      std::ofstream file(a.json);
      file << text << '\n';
      file.close();
      if (!file) throw UsageError("--json: can't write " + a.json);
    }
  }
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parse({argv + 1, argv + argc});
    if (arguments.help) {
      std::cout << usage();
      return 0;
    }
    return run(arguments);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "quicksilver_profile: %s (see quicksilver_profile --help)\n", error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "quicksilver_profile: %s\n", error.what());
  }
  return 2;
}
