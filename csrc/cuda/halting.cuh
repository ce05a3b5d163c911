// What kernels that judge rows share: drift, entropy, the decision to halt, and the compaction of what goes on.
//
// The order of drift's sums is one for every kernel, so that a row is judged alike in a decode step and in a prefill.
// Columns are added up in parts of 16: inside a part pairwise, 1 apart first, then 2, 4 and 8. Part p is added to sum
// p % 32, in order; the 32 sums are added pairwise, again 1, 2, 4, 8 and 16 apart.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "quicksilver/cuda.h"

namespace quicksilver::QS_CUDA {

constexpr int kPartColumns = 16;

// Sums of squares of the step that a row made, and of the state before it.
struct Squares {
  float step = 0;
  float before = 0;
};

QS_DEVICE Squares squares_of(float now, float before) {
  const float step = sub_rn(now, before);
  return {mul_rn(step, step), mul_rn(before, before)};
}
QS_DEVICE Squares add(Squares a, Squares b) { return {add_rn(a.step, b.step), add_rn(a.before, b.before)}; }
QS_DEVICE Squares add_lanes(Squares a, int mask) {
  return add(a, {shuffle_xor(a.step, mask), shuffle_xor(a.before, mask)});
}

// ||step|| / ||before|| if relative (0 / 0 is 0), else ||step||.
QS_DEVICE float drift_from(Squares total, bool relative) {
  const float length = sqrt_rn(total.step);
  if (!relative) return length;
  const float norm = sqrt_rn(total.before);
  return length == 0 && norm == 0 ? 0.0f : div_rn(length, norm);
}

// By one warp, where lanes 16h..16h+15 hold the columns of a part, in order (zeros past the last column): that part, in
// all of its lanes.
QS_DEVICE Squares part_of_lanes(Squares column) {
  return add_lanes(add_lanes(add_lanes(add_lanes(column, 1), 2), 4), 8);
}

// By one warp: the sum of a row's parts, each {step, before} and written by other threads; the same in all lanes.
QS_DEVICE Squares sum_parts(const float2* parts, int64_t count) {
  Squares sum;
  for (int64_t p = lane(); p < count; p += kWarp) {
    const float2 part = load(parts + p);
    sum = add(sum, {part.x, part.y});
  }
  for (int mask = 1; mask < kWarp; mask *= 2) sum = add_lanes(sum, mask);
  return sum;
}

namespace detail {

// Columns k..k+3, those from d on being `rest`.
QS_DEVICE float4 load_four(const float* row, int64_t k, int64_t d, bool aligned, float rest) {
  if (aligned && k + 4 <= d) return load(reinterpret_cast<const float4*>(row + k));
  return make_float4(k < d ? load(row + k) : rest, k + 1 < d ? load(row + k + 1) : rest,
                     k + 2 < d ? load(row + k + 2) : rest, k + 3 < d ? load(row + k + 3) : rest);
}

// Half a butterfly for two sums at once: lanes without `mask` go on with x, the others with y.
QS_DEVICE Squares fold(Squares x, Squares y, int mask) {
  const bool upper = (lane() & mask) != 0;
  const Squares mine = upper ? y : x, other = upper ? x : y;
  return add(mine, {shuffle_xor(other.step, mask), shuffle_xor(other.before, mask)});
}

}  // namespace detail

// By one warp: drift between two rows of d columns; the same in all lanes.
QS_DEVICE float row_distance(const float* now, const float* before, int64_t d, bool relative) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(now) | reinterpret_cast<uintptr_t>(before)) & 15) == 0;
  Squares sum;
  // A round is 32 parts. Four lanes share a part, and four parts: each lane ends up with one of them, part
  // 8 * (lane % 4) + lane / 4 of the round.
  for (int64_t base = 0; base < d; base += 32 * kPartColumns) {
    Squares of[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t k = base + (i * kWarp + lane()) * 4;
      const float4 x = detail::load_four(now, k, d, aligned, 0.0f);
      const float4 y = detail::load_four(before, k, d, aligned, 0.0f);
      of[i] = add(add(squares_of(x.x, y.x), squares_of(x.y, y.y)), add(squares_of(x.z, y.z), squares_of(x.w, y.w)));
    }
    sum = add(sum, detail::fold(detail::fold(of[0], of[1], 1), detail::fold(of[2], of[3], 1), 2));
  }
  for (int mask : {4, 8, 16, 1, 2}) sum = add_lanes(sum, mask);
  return drift_from(sum, relative);
}

// By one warp: entropy, in bits, of softmax over d values; the same in all lanes.
QS_DEVICE float row_entropy(const float* x, int64_t d) {
  const bool aligned = (reinterpret_cast<uintptr_t>(x) & 15) == 0;
  const float lowest = -__builtin_inff();
  float largest = lowest;
  for (int64_t k = lane() * 4; k < d; k += 4 * kWarp) {
    const float4 v = detail::load_four(x, k, d, aligned, lowest);
    largest = maximum(largest, maximum(maximum(v.x, v.y), maximum(v.z, v.w)));
  }
  largest = warp_max(largest);

  // With s = x - max and z = sum e^s: entropy = ln z - (sum s e^s) / z, two terms that are never negative.
  float z = 0, weighted = 0;
  const auto take = [&](float value) {
    // e^-104 is 0 in fp32, and 0 * -104 is 0 where 0 * -Inf is not; a NaN passes through.
    const float difference = sub_rn(value, largest);
    const float s = difference < -104.0f ? -104.0f : difference;
    const float e = exp(s);
    z = add_rn(z, e);
    weighted = add_rn(weighted, mul_rn(s, e));
  };
  for (int64_t k = lane() * 4; k < d; k += 4 * kWarp) {
    const float4 v = detail::load_four(x, k, d, aligned, lowest);
    take(v.x);
    take(v.y);
    take(v.z);
    take(v.w);
  }
  z = warp_sum(z);
  weighted = warp_sum(weighted);
  return mul_rn(sub_rn(log(z), div_rn(weighted, z)), 1.44269504f);
}

// Whom to halt.
struct HaltDecision {
  float drift_threshold = 0;
  bool tests_entropy = false;
  float entropy_threshold = 0;
  int32_t sink_tokens = 0;
  const int32_t* positions = nullptr;  // indexed by row
  const int8_t* overrides = nullptr;   // indexed by row, or null
  uint8_t* halted = nullptr;           // indexed by row
  const int32_t* active = nullptr;     // [count]; null: those of rows 0..count-1 that aren't halted yet
  int32_t* next_active = nullptr;      // may be `active`
  int32_t* next_count = nullptr;       // [1]; may be where `count` came from
};

constexpr int kHaltShared = 2 * 32;  // int32_t

// By one block of any size: judges active rows 0..count-1 by drift_of(i) and, if tests_entropy, entropy_of(i), marks
// those that halt, and writes the others and their number, in order. `shared`: kHaltShared values that are free. The
// count must have been read by all threads before.
template <class DriftOf, class EntropyOf>
QS_DEVICE void halt_and_compact(const HaltDecision& decision, int32_t count, DriftOf drift_of, EntropyOf entropy_of,
                                int32_t* shared) {
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  int32_t kept = 0;
  for (int32_t base = 0, chunk = 0; base < count; base += threads, ++chunk) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    int32_t row = i;
    bool goes_on = false;
    if (decision.active && i < count) row = load(decision.active + i);
    if (i < count && (decision.active || load(decision.halted + row) == 0)) {
      // A NaN makes either comparison false.
      bool halts = drift_of(i) < decision.drift_threshold &&
                   (!decision.tests_entropy || entropy_of(i) < decision.entropy_threshold);
      if (decision.overrides) {
        const int8_t override_of = load(decision.overrides + row);
        if (override_of != 0) halts = override_of > 0;
      }
      if (decision.sink_tokens > 0 && load(decision.positions + row) < decision.sink_tokens) halts = false;
      if (halts) store(decision.halted + row, uint8_t{1});
      goes_on = !halts;
    }
    // The warps' counts alternate between two places, so that one barrier a chunk is enough. It also keeps the writes
    // behind the reads, should the list be compacted in place.
    int32_t* counts = shared + chunk % 2 * 32;
    const unsigned votes = ballot(goes_on);
    if (lane() == 0) store_shared(counts + warp(), __builtin_popcount(votes));
    sync_block();
    int32_t before = kept;
    for (int w = 0; w < warps; ++w) {
      const int32_t of_warp = load_shared(counts + w);
      if (w < warp()) before += of_warp;
      kept += of_warp;
    }
    if (goes_on) store(decision.next_active + before + __builtin_popcount(votes & ((1u << lane()) - 1)), row);
  }
  if (threadIdx.x == 0) store(decision.next_count, kept);
}

}  // namespace quicksilver::QS_CUDA
