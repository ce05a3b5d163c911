// quantize_rows, matryoshka_gemm and matryoshka_pack against their definition, in scalars: equal to the bit.
#include <algorithm>

#include "check.h"

namespace check {
namespace {

using namespace quicksilver;

void quantize_by_definition(const float* x, int64_t stride, const int32_t* index, const QuantizedRows& out) {
  const float limit = 127.0f;
  for (int64_t i = 0; i < out.rows; ++i) {
    const float* row = x + (index ? index[i] : i) * stride;
    std::fill(out.q + i * out.k_padded, out.q + (i + 1) * out.k_padded, int8_t(0));
    for (int64_t g = 0; g < out.groups; ++g) {
      float largest = 0;
      bool finite = true;
      int32_t sum = 0;
      const int64_t end = std::min(out.k, (g + 1) * out.group);
      for (int64_t k = g * out.group; k < end; ++k) {
        finite = finite && std::isfinite(row[k]);
        largest = std::max(largest, std::fabs(row[k]));
      }
      largest = check::rounded_magnitude(largest);
      for (int64_t k = g * out.group; finite && largest > 0 && k < end; ++k) {
        const float inverse = limit / largest;
        const float scaled = row[k] == 0 ? 0.0f : row[k] * inverse;
        const int v = static_cast<int>(std::nearbyint(std::min(std::max(scaled, -limit), limit)));
        sum += v;
        out.q[i * out.k_padded + k] = static_cast<int8_t>(v);
      }
      out.scale[i * out.groups + g] = finite ? largest / limit : std::nanf("");
      out.sum[i * out.groups + g] = sum;
    }
  }
}

void gemm_by_definition(const MatryoshkaGemm& p, const Weight& w, std::vector<float>& y) {
  const QuantizedRows& q = p.x;
  for (int64_t i = 0; i < q.rows; ++i) {
    const bool eight = p.w.lo && (!p.bits || p.bits[i] == 8);
    for (int64_t n = 0; n < w.n; ++n) {
      float total = 0, acc = 0;
      for (int64_t g = 0, segment = 0; g < q.groups; ++g) {
        for (; segment_begin(segment + 1, q.groups) <= g; ++segment) {
          total = total + acc;
          acc = 0;
        }
        int32_t dot = 0;
        for (int64_t k = g * w.group; k < std::min(w.k, (g + 1) * w.group); ++k) {
          const int u = w.codes[static_cast<size_t>(n * w.k + k)];
          dot += (8 * (u >> 4) + (eight ? (u & 15) - 8 : 0)) * q.q[i * q.k_padded + k];
        }
        const int64_t at = i * q.groups + g, of = n * q.groups + g;
        const float both = q.scale[at] / 8 * w.scale_of[static_cast<size_t>(of)];
        const float scaled_sum = static_cast<float>(q.sum[at]) * q.scale[at];
        acc = std::fma(static_cast<float>(dot), both, acc);
        acc = std::fma(scaled_sum, w.offset_of[static_cast<size_t>(of)], acc);
      }
      acc = total + acc;
      const int64_t at = (p.out_index ? p.out_index[i] : i) * p.y_stride + n;
      if (p.bias) acc = acc + p.bias[n];
      if (p.residual) acc = p.residual[at] + acc;
      y[static_cast<size_t>(at)] = acc;
    }
  }
}

struct Case {
  int64_t rows, n, k;
  int group;
  bool low, mixed, strange;
};

void run_case(const Variant& variant, const Case& c, uint32_t seed) {
  Random random(seed);
  const std::string name = variant.name + " gemm T" + std::to_string(c.rows) + " N" + std::to_string(c.n) + " K" +
                           std::to_string(c.k) + " g" + std::to_string(c.group) + (c.low ? "" : " int4") +
                           (c.mixed ? " mixed" : "");
  const Weight w = random_weight(random, c.n, c.k, c.group);
  const int64_t stride = c.k + random.integer(0, 5);
  std::vector<float> x = random.normals((c.rows + 3) * stride);
  if (c.strange) {
    for (size_t i = 0; i < x.size(); i += 97) x[i] *= 1e30f;
    for (size_t i = 5; i < x.size(); i += 211) x[i] = std::nanf("");
    for (size_t i = 9; i < x.size(); i += 401) x[i] = -INFINITY;
    for (int64_t k = 0; k < c.k; ++k) x[static_cast<size_t>(k)] = k % 3 == 0 ? 0.0f : 1e-39f;
    for (int64_t k = 0; k < c.k && c.rows > 1; ++k) x[static_cast<size_t>(stride + k)] = 0.0f;
  }
  std::vector<int32_t> index(static_cast<size_t>(c.rows));
  for (int32_t& i : index) i = random.integer(0, static_cast<int>(c.rows) + 2);

  OwnedRows want(c.rows, c.k, c.group), got(c.rows, c.k, c.group);
  quantize_by_definition(x.data(), stride, index.data(), want.rows);
  variant.kernels->quantize_rows(x.data(), stride, index.data(), got.rows);
  const size_t bytes = static_cast<size_t>(c.rows * want.rows.k_padded);
  const int64_t groups = c.rows * want.rows.groups;
  report(std::memcmp(want.rows.q, got.rows.q, bytes) == 0, name + ": q");
  report(std::memcmp(want.rows.sum, got.rows.sum, static_cast<size_t>(groups) * 4) == 0, name + ": sum");
  report(same(want.rows.scale, got.rows.scale, groups), name + ": scale");

  std::vector<int32_t> bits(static_cast<size_t>(c.rows)), out_index(static_cast<size_t>(c.rows));
  for (size_t i = 0; i < bits.size(); ++i) {
    bits[i] = random.integer(0, 1) ? 8 : 4;
    out_index[i] = static_cast<int32_t>(2 * i + 1);
  }
  const std::vector<float> bias = random.normals(c.n);
  const int64_t y_stride = c.n + 3;
  const size_t y_size = static_cast<size_t>((2 * c.rows + 1) * y_stride);
  MatryoshkaGemm p;
  p.x = got.rows;
  p.w = w.view(c.low);
  p.bits = c.mixed ? bits.data() : nullptr;
  p.y_stride = y_stride;
  const bool extras = seed % 2 == 0;
  if (extras) {
    p.bias = bias.data();
    p.out_index = out_index.data();
  }
  const std::vector<float> before =
      extras ? random.normals(static_cast<int64_t>(y_size)) : poisoned(static_cast<int64_t>(y_size));
  std::vector<float> wanted = before;
  if (extras) p.residual = before.data();
  gemm_by_definition(p, w, wanted);

  for (int threads : {1, 2, 3}) {
    set_threads(threads);
    std::vector<float> y = before;
    p.y = y.data();
    if (extras) p.residual = y.data();  // in place
    variant.kernels->matryoshka_gemm(p);
    report(same(wanted, y), name + " on " + std::to_string(threads) + " threads");
  }
  // One row at a time, out of the same rows.
  std::vector<float> y = before;
  for (int64_t i = 0; i < c.rows; ++i) {
    MatryoshkaGemm one = p;
    one.x.q += i * p.x.k_padded;
    one.x.scale += i * p.x.groups;
    one.x.sum += i * p.x.groups;
    one.x.rows = 1;
    if (p.bits) one.bits += i;
    if (p.out_index) one.out_index += i;
    one.y = y.data() + (p.out_index ? 0 : i * y_stride);
    if (extras) one.residual = one.y;
    variant.kernels->matryoshka_gemm(one);
  }
  report(same(wanted, y), name + " row by row");
}

// Packing values that lie on a grid gives back their codes, its scale and its offset, and residuals of nothing.
void run_pack(const Variant& variant, int64_t n, int64_t k, int group, bool low, uint32_t seed) {
  Random random(seed);
  Weight w = random_weight(random, n, k, group);
  const int64_t groups = (k + group - 1) / group;
  std::vector<float> values(static_cast<size_t>(n * k)), importance = random.normals(k);
  for (float& each : importance) each = std::fabs(each) + 0.1f;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = half_to_float(float_to_half(0.01f + 0.001f * static_cast<float>(random.integer(0, 9))));
      const float offset = half_to_float(float_to_half(random.integer(0, 1) ? -0.1f : 0.07f));
      const auto of = static_cast<size_t>(row * groups + g);
      w.scale_of[of] = scale;
      w.offset_of[of] = offset;
      for (int64_t c = g * group; c < std::min(k, (g + 1) * group); ++c) {
        // The ends of the range are there, so that the values say what the grid is.
        const int code = c % group == 0 ? 0 : c % group == 1 ? 15 : w.codes[static_cast<size_t>(row * k + c)] >> 4;
        w.codes[static_cast<size_t>(row * k + c)] = static_cast<uint8_t>(code << 4 | 8);
        const float steps = scale * static_cast<float>(code);
        values[static_cast<size_t>(row * k + c)] = steps + offset;
      }
    }
  }
  std::vector<uint8_t> hi(w.hi.size(), 0xa5), lo(low ? w.lo.size() : 0, 0xa5);
  std::vector<uint16_t> scale(w.scale.size(), 0xa5a5), offset = scale;
  MatryoshkaPack p;
  p.weight = values.data();
  p.importance = seed % 2 ? importance.data() : nullptr;
  p.n = n;
  p.k = k;
  p.group = group;
  p.hi = hi.data();
  p.lo = low ? lo.data() : nullptr;
  p.scale = scale.data();
  p.offset = offset.data();
  variant.kernels->matryoshka_pack(p);
  const std::string name =
      variant.name + " pack N" + std::to_string(n) + " K" + std::to_string(k) + " g" + std::to_string(group);
  const int64_t lines = (k + 7) / 8;
  bool same_codes = true, same_grid = true;
  for (int64_t row = 0; row < n; ++row) {
    const int64_t panel = row / 16, height = std::min<int64_t>(16, n - panel * 16), r = row % 16;
    for (int64_t c = 0; c < k; ++c) {
      const auto at = static_cast<size_t>(panel * 16 * lines * 4 + c / 8 * height * 4 + r * 4 + c % 4);
      const int shift = c % 8 < 4 ? 0 : 4, code = w.codes[static_cast<size_t>(row * k + c)] >> 4;
      if (k % group == 1 && c == k - 1) continue;  // a group of one value has no range
      same_codes = same_codes && (hi[at] >> shift & 15) == code && (!low || (lo[at] >> shift & 15) == 8);
    }
    for (int64_t g = 0; g < groups; ++g) {
      if (k % group == 1 && g == groups - 1) continue;
      const auto at = static_cast<size_t>(panel * 16 * groups + g * height + r),
                 of = static_cast<size_t>(row * groups + g);
      same_grid =
          same_grid && half_to_float(scale[at]) == w.scale_of[of] && half_to_float(offset[at]) == w.offset_of[of];
    }
  }
  report(same_codes, name + ": codes");
  report(same_grid, name + ": grid");
}

}  // namespace

void test_gemm(const Variant& variant) {
  Random random(7);
  for (uint32_t i = 0; i < 160; ++i) {
    const int group = 32 << random.integer(0, 2);
    run_case(variant,
             {random.integer(1, i % 4 == 0 ? 40 : 12), random.integer(1, 80), random.integer(1, 300), group,
              random.integer(0, 4) != 0, random.integer(0, 1) == 1, i % 5 == 0},
             i);
  }
  // Larger than a block of rows, of panels and of K, and with the two precisions crossing blocks.
  run_case(variant, {113, 147, 700, 64, true, true, false}, 1000);
  run_case(variant, {101, 83, 1100, 32, true, true, false}, 1002);
  run_case(variant, {49, 64, 512, 128, false, false, false}, 1001);
  run_case(variant, {50, 150, 1500, 64, true, true, false}, 1003);
  run_case(variant, {530, 40, 130, 32, true, true, false}, 1004);
  // So wide that few rows have room for all of K.
  run_case(variant, {3, 17, 20008, 128, true, false, false}, 1005);
  run_case(variant, {99, 33, 20008, 128, true, true, false}, 1006);
  run_case(variant, {1, 17, 70000, 64, true, false, false}, 1007);

  for (uint32_t i = 0; i < 60; ++i) {
    run_pack(variant, random.integer(1, 50), random.integer(1, 300), 32 << random.integer(0, 2), i % 3 != 0, i);
  }
  run_pack(variant, 200, 700, 64, true, 60);

  // Several products of the same rows.
  const std::vector<float> x = random.normals(5 * 96);
  OwnedRows q(5, 96, 32);
  variant.kernels->quantize_rows(x.data(), 96, nullptr, q.rows);
  std::vector<Weight> weights;
  for (int64_t n : {48, 7, 33, 200}) weights.push_back(random_weight(random, n, 96, 32));
  std::vector<std::vector<float>> many, single;
  std::vector<MatryoshkaGemm> gemms(weights.size());
  for (const Weight& w : weights) {
    many.push_back(poisoned(5 * w.n));
    single.push_back(poisoned(5 * w.n));
  }
  reset_counters();
  for (size_t i = 0; i < weights.size(); ++i) {
    gemms[i].x = q.rows;
    gemms[i].w = weights[i].view();
    gemms[i].y = single[i].data();
    gemms[i].y_stride = weights[i].n;
    variant.kernels->matryoshka_gemm(gemms[i]);
    gemms[i].y = many[i].data();
  }
  const Counters one = counters();
  variant.kernels->matryoshka_gemm_many(gemms.data(), static_cast<int>(gemms.size()));
  const Counters both = counters();
  for (size_t i = 0; i < weights.size(); ++i) report(same(single[i], many[i]), variant.name + " gemm_many");
  report(one.gemm_macs == 5 * 96 * (48 + 7 + 33 + 200) && both.gemm_macs == 2 * one.gemm_macs, variant.name + " macs");
  report(one.weight_bytes_read == (48 + 7 + 33 + 200) * (96 + 3 * 4) &&
             both.weight_bytes_read == 2 * one.weight_bytes_read,
         variant.name + " weight bytes");
}

}  // namespace check
