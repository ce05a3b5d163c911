#include "quicksilver/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <vector>

namespace quicksilver {
namespace {

// Sets the weights of all but the nucleus to zero. score <= top; total: of the weights. Sorts by buckets of the scores,
// and exactly only in the one where the nucleus ends.
void keep_nucleus(const std::vector<float>& score, std::vector<float>& weight, float top, double total, float top_p) {
  constexpr int kBuckets = 1024;
  constexpr float kPerUnit = 32;  // the last bucket has what is e^-32 as likely as the top, and less
  const auto bucket_of = [&](size_t i) {
    const float below = (top - score[i]) * kPerUnit;
    return below < kBuckets - 1 ? static_cast<int>(below) : kBuckets - 1;
  };
  std::array<double, kBuckets> mass = {};
  for (size_t i = 0; i < score.size(); ++i) {
    if (weight[i] > 0) mass[static_cast<size_t>(bucket_of(i))] += weight[i];
  }
  const double wanted = double(top_p) * total;
  double before = 0;
  int last = 0;
  while (last < kBuckets - 1 && before + mass[static_cast<size_t>(last)] < wanted) {
    before += mass[static_cast<size_t>(last++)];
  }
  std::vector<size_t> ending;
  for (size_t i = 0; i < score.size(); ++i) {
    const int bucket = weight[i] > 0 ? bucket_of(i) : kBuckets;
    if (bucket == last) ending.push_back(i);
    if (bucket > last) weight[i] = 0;
  }
  std::stable_sort(ending.begin(), ending.end(), [&](size_t a, size_t b) { return score[a] > score[b]; });
  bool first = before == 0;
  for (const size_t i : ending) {
    if (!first && before >= wanted) {
      weight[i] = 0;
      continue;
    }
    before += weight[i];
    first = false;
  }
}

}  // namespace

int64_t sample(const float* logits, int64_t n, const Sampling& how, double point) {
  thread_local std::vector<float> score, weight;  // a vocabulary's worth, for the next token too
  score.resize(static_cast<size_t>(n));
  weight.resize(static_cast<size_t>(n));
  float top = -INFINITY;
  for (size_t i = 0; i < score.size(); ++i) {
    score[i] = logits[i] / how.temperature;
    if (std::isnan(score[i])) return -1;
    top = std::max(top, score[i]);
  }
  if (!std::isfinite(top)) return -1;
  float least = -INFINITY;
  if (how.top_k > 0 && how.top_k < n) {
    weight = score;
    std::nth_element(weight.begin(), weight.begin() + (how.top_k - 1), weight.end(), std::greater<>());
    least = weight[static_cast<size_t>(how.top_k - 1)];
  }
  double total = 0;
  for (size_t i = 0; i < score.size(); ++i) {
    weight[i] = score[i] >= least ? std::exp(score[i] - top) : 0;
    total += weight[i];
  }
  if (how.top_p < 1) {
    keep_nucleus(score, weight, top, total, how.top_p);
    total = 0;
    for (const float w : weight) total += w;
  }
  const double goal = point * total;
  double passed = 0;
  int64_t token = -1;
  for (int64_t i = 0; i < n; ++i) {
    const float w = weight[static_cast<size_t>(i)];
    if (w == 0) continue;
    token = i;
    passed += w;
    if (passed > goal) break;
  }
  return token;
}

}  // namespace quicksilver
