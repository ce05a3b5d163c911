#include "check.h"

namespace check {

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  double x = exponent == 0    ? std::ldexp(mantissa, -24)
             : exponent == 31 ? (mantissa ? std::nan("") : INFINITY)
                              : std::ldexp(mantissa + 1024, exponent - 25);
  return static_cast<float>(h & 0x8000 ? -x : x);
}

uint16_t float_to_half(float x) {  // nearest, ties to even, by search
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(static_cast<double>(x));
  if (a >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  uint16_t low = 0, high = 0x7bff;
  while (low < high) {  // the largest half that isn't above a
    const uint16_t middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (half_to_float(middle) <= a) {
      low = middle;
    } else {
      high = static_cast<uint16_t>(middle - 1);
    }
  }
  const double above = low == 0x7bff ? 65536.0 : half_to_float(static_cast<uint16_t>(low + 1));
  const double down = a - half_to_float(low), up = above - a;
  return static_cast<uint16_t>(sign | (up < down || (up == down && (low & 1)) ? low + 1 : low));
}

Weight random_weight(Random& random, int64_t n, int64_t k, int group) {
  Weight w{n, k, group, {}, {}, {}, {}, {}, {}, {}};
  const int64_t lines = (k + 7) / 8, groups = (k + group - 1) / group;
  w.codes.resize(static_cast<size_t>(n * k));
  w.hi.assign(static_cast<size_t>(n * lines * 4), 0);
  w.lo = w.hi;
  w.scale.resize(static_cast<size_t>(n * groups));
  w.scale_of.resize(static_cast<size_t>(n * groups));
  w.offset = w.scale;
  w.offset_of = w.scale_of;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t panel = row / 16, rows = n - panel * 16 < 16 ? n - panel * 16 : 16, r = row % 16;
    for (int64_t c = 0; c < lines * 8; ++c) {
      const int extreme = random.integer(0, 9);
      const int code = c >= k ? 136 : extreme == 0 ? 0 : extreme == 1 ? 255 : random.integer(0, 255);
      if (c < k) w.codes[static_cast<size_t>(row * k + c)] = static_cast<uint8_t>(code);
      const int64_t at = panel * 16 * lines * 4 + c / 8 * rows * 4 + r * 4 + c % 4;
      const int shift = c % 8 < 4 ? 0 : 4;
      w.hi[static_cast<size_t>(at)] |= static_cast<uint8_t>((code >> 4) << shift);
      w.lo[static_cast<size_t>(at)] |= static_cast<uint8_t>((code & 15) << shift);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const auto at = static_cast<size_t>(panel * 16 * groups + g * rows + r),
                 of = static_cast<size_t>(row * groups + g);
      w.scale[at] = float_to_half(random.normal() * 0.01f);
      w.offset[at] = float_to_half(random.normal() * 0.1f);
      w.scale_of[of] = half_to_float(w.scale[at]);
      w.offset_of[of] = half_to_float(w.offset[at]);
    }
  }
  return w;
}

}  // namespace check
