// Drawing a token from logits: temperature, the likeliest k, the nucleus (arXiv 1904.09751), softmax, in this order.
#pragma once

#include <cstdint>

namespace quicksilver {

struct Sampling {
  float temperature = 1;
  int64_t top_k = 0;  // with all that are as likely as the last of them; 0: all
  float top_p = 1;    // the fewest that have this much of what is left, at least one
};

// The token at `point`, 0 <= point < 1, of the distribution, tokens being laid side by side in the order of their
// indices: a single random number draws one. -1 where a logit is NaN or the largest isn't finite.
int64_t sample(const float* logits, int64_t n, const Sampling& how, double point);

}  // namespace quicksilver
