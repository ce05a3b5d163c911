// The emulator itself: bugs planted in kernels must be found (emulator_bugs.h) and correct kernels must pass, counts
// must be those worked out by hand, and the matrix instructions must do what the PTX ISA's tables say.
#include <array>

#include "cuda_check.h"
#include "emulator_bugs.h"
#include "half.h"
#include "launch.cuh"

namespace quicksilver::QS_CUDA {
namespace {

// --- correct kernels -------------------------------------------------------------------------------------------------
QS_KERNEL void poison_kernel(int32_t* bad) {
  if (threadIdx.x == 0 && !std::isnan(load_shared(shared_memory<float>() + 63))) atomic_add(bad, 1);
  sync_block();
  store_shared(shared_memory<float>() + threadIdx.x, 1.0f);
}

QS_KERNEL void block_sum_kernel(const int* in, int n, int64_t* out) {
  int64_t* parts = shared_memory<int64_t>();
  int64_t sum = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    sum += load(in + i);
  }
  sum = warp_sum(sum);
  if (lane() == 0) store_shared(parts + warp(), sum);
  sync_block();
  if (warp() == 0) {
    sum = lane() < static_cast<int>(blockDim.x) / kWarp ? load_shared(parts + lane()) : 0;
    sum = warp_sum(sum);
    if (lane() == 0) store(out + blockIdx.x, sum);
  }
}

// Inclusive, of one block.
QS_KERNEL void scan_kernel(const int* in, int* out) {
  int* shared = shared_memory<int>();
  int value = load(in + threadIdx.x);
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int below = shuffle_up(value, delta);
    if (lane() >= delta) value += below;
  }
  if (lane() == kWarp - 1) store_shared(shared + warp(), value);
  sync_block();
  for (int w = 0; w < warp(); ++w) value += load_shared(shared + w);
  store(out + threadIdx.x, value);
}

QS_KERNEL void transpose_kernel(const float* in, float* out, int width, int height) {
  float* tile = shared_memory<float>();
  const int x = static_cast<int>(blockIdx.x) * 32 + lane(), y = static_cast<int>(blockIdx.y) * 32;
  for (int row = warp(); row < 32; row += static_cast<int>(blockDim.x) / kWarp) {
    if (x < width && y + row < height) store_shared(tile + row * 33 + lane(), load(in + (y + row) * width + x));
  }
  sync_block();
  const int to_x = y + lane(), to_y = static_cast<int>(blockIdx.x) * 32;
  for (int row = warp(); row < 32; row += static_cast<int>(blockDim.x) / kWarp) {
    if (to_x < height && to_y + row < width)
      store(out + (to_y + row) * height + to_x, load_shared(tile + lane() * 33 + row));
  }
}

// Sums columns of rounds x blockDim vectors, three stages ahead.
QS_KERNEL void pipeline_kernel(const float4* in, int rounds, float* out) {
  constexpr int kStages = 4;
  float4* stages = shared_memory<float4>();
  const int n = static_cast<int>(blockDim.x), i = static_cast<int>(threadIdx.x);
  const auto request = [&](int round) {
    cp_async16(stages + round % kStages * n + i, in + round * n + i, round < rounds);
    cp_async_commit();
  };
  for (int round = 0; round < kStages - 1; ++round) request(round);
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    cp_async_wait<kStages - 2>();
    sync_block();
    const float4 v = load_shared(stages + round % kStages * n + (i + 37) % n);
    sum += v.x + v.y + v.z + v.w;
    request(round + kStages - 1);
  }
  store(out + i, sum);
}

QS_KERNEL void last_block_kernel(const int* in, int* parts, int* out, int32_t* counter) {
  const int sum = warp_sum(load(in + blockIdx.x * blockDim.x + threadIdx.x));
  if (threadIdx.x == 0) store(parts + blockIdx.x, sum);
  if (!last_block(counter, static_cast<int>(gridDim.x), shared_memory<bool>())) return;
  int total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += load(parts + i);
  total = warp_sum(total);
  if (threadIdx.x == 0) store(out, total);
}

// The first tickets prepare a value each, which every block then reads.
QS_KERNEL void ticket_kernel(int values, int* prepared, int* out, int32_t* counters) {
  int* shared = shared_memory<int>();
  const int ticket = block_ticket(counters, shared);
  for (int i = ticket; i < values; i += static_cast<int>(gridDim.x)) {
    if (threadIdx.x == 0) {
      store(prepared + i, i * i);
      fence();
      atomic_add(counters + 1, 1);
    }
  }
  if (threadIdx.x == 0) wait_until_at_least(counters + 1, values);
  sync_block();
  int sum = 0;
  for (int i = lane(); i < values; i += kWarp) sum += load(prepared + i);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) store(out + ticket, sum);
  if (last_block(counters + 2, static_cast<int>(gridDim.x), reinterpret_cast<bool*>(shared + 1)) && threadIdx.x < 2) {
    store(counters + threadIdx.x, 0);
  }
}

QS_KERNEL void collectives_kernel(int* bad) {
  const int i = lane();
  const int64_t wide = int64_t{i} << 33;
  bool good = shuffle(i, (i + 5) % 32) == (i + 5) % 32 && shuffle_xor(wide, 3) == int64_t{i ^ 3} << 33;
  good = shuffle_up(i, 4) == (i < 4 ? i : i - 4) && good;
  good = shuffle_down(i, 4) == (i > 27 ? i : i + 4) && good;
  good = ballot(i % 3 == 0) == 0x49249249u && good;
  good = any(i == 7) && !any(false) && all(true) && good;
  good = !all(i != 7) && good;
  good = warp_sum(i) == 496 && warp_max(static_cast<float>(i ^ 9)) == 31.0f && good;
  if (!good) atomic_add(bad, 1);
}

void correct_kernels() {
  check::Random random(31);
  const auto integers = [&](int n) {
    std::vector<int> values(static_cast<size_t>(n));
    for (int& v : values) v = random.integer(-1000, 1000);
    return values;
  };
  check::schedules("bytes of a word", [&] { launch("bytes", bytes_kernel, {}, 64, 64, nullptr, false); });
  check::schedules("poison", [&] {
    int32_t bad = 0;
    for (int i = 0; i < 2; ++i) launch("poison", poison_kernel, {3}, 64, 256, nullptr, &bad);
    check::report(bad == 0, "shared memory starts as NaN");
  });
  check::schedules("collectives", [&] {
    int bad = 0;
    launch("collectives", collectives_kernel, {2}, 1024, 0, nullptr, &bad);
    check::report(bad == 0, "shuffles and votes");
  });
  for (const int workers : {1, 2, 5}) {
    settings().workers = workers;
    check::schedules("block sum", [&] {
      const int n = random.integer(1, 20000);
      const auto in = integers(n);
      std::vector<int64_t> out(7);
      launch("block_sum", block_sum_kernel, {7}, 1024, 32 * 8, nullptr, in.data(), n, out.data());
      int64_t sum = 0, want = 0;
      for (const int64_t v : out) sum += v;
      for (const int v : in) want += v;
      check::report(sum == want, "block sum");
    });
    check::schedules("scan", [&] {
      const auto in = integers(256);
      std::vector<int> out(256);
      launch("scan", scan_kernel, {}, 256, 32, nullptr, in.data(), out.data());
      int sum = 0;
      bool same = true;
      for (size_t i = 0; i < in.size(); ++i) same = (sum += in[i]) == out[i] && same;
      check::report(same, "scan");
    });
    check::schedules("transpose", [&] {
      const int width = random.integer(1, 100), height = random.integer(1, 100);
      const auto in = random.normals(width * height);
      auto out = check::poisoned(width * height), want = out;
      launch("transpose", transpose_kernel,
             {static_cast<unsigned>(width + 31) / 32, static_cast<unsigned>(height + 31) / 32}, 128, 32 * 33 * 4,
             nullptr, in.data(), out.data(), width, height);
      for (int y = 0; y < height; ++y) {
        for (int x = 0; x < width; ++x)
          want[static_cast<size_t>(x * height + y)] = in[static_cast<size_t>(y * width + x)];
      }
      check::report(check::same(out, want), "transpose");
    });
    check::schedules("pipeline", [&] {
      const int rounds = random.integer(0, 9), n = 64;
      std::vector<float4> in(static_cast<size_t>(rounds * n));
      for (auto& v : in) v = {random.normal(), random.normal(), random.normal(), random.normal()};
      auto out = check::poisoned(n), want = std::vector<float>(n);
      launch("pipeline", pipeline_kernel, {}, n, 4 * n * 16, nullptr, in.data(), rounds, out.data());
      for (int i = 0; i < n; ++i) {
        for (int round = 0; round < rounds; ++round) {
          const float4 v = in[static_cast<size_t>(round * n + (i + 37) % n)];
          want[static_cast<size_t>(i)] += v.x + v.y + v.z + v.w;
        }
      }
      check::report(check::same(out, want), "pipeline");
    });
    check::schedules("last block", [&] {
      const auto in = integers(50 * 32);
      std::vector<int> parts(50);
      int total = 0, want = 0;
      int32_t counter = 0;
      for (const int v : in) want += v;
      launch("last_block", last_block_kernel, {50}, 32, 1, nullptr, in.data(), parts.data(), &total, &counter);
      check::report(total == want && counter == 0, "last block");
    });
    check::schedules("tickets", [&] {
      std::vector<int> prepared(20), out(60);
      int32_t counters[3] = {};
      launch("tickets", ticket_kernel, {60}, 64, 8, nullptr, 20, prepared.data(), out.data(), counters);
      bool same = true;
      for (const int v : out) same = same && v == 2470;
      check::report(same && counters[0] + counters[1] + counters[2] == 0, "tickets");
    });
  }
  settings().workers = 2;
}

// --- counts ----------------------------------------------------------------------------------------------------------
// One load and one store of a float by each thread, `stride` floats apart.
QS_KERNEL void strided_kernel(const float* in, float* out, int stride) {
  store(out + threadIdx.x, load(in + static_cast<int>(threadIdx.x) * stride));
}
QS_KERNEL void banks_kernel(int stride) {
  volatile float keep = load_shared(shared_memory<float>() + lane() * stride);
  (void)keep;
}
template <class T>
QS_KERNEL void wide_banks_kernel(int stride) {
  load_shared(shared_memory<T>() + lane() * stride);
}
QS_KERNEL void half_warp_kernel(const float* in, int rounds) {
  for (int i = 0; i < (lane() < 16 ? rounds : 1); ++i) load(in + i * 32 + lane());
}
QS_KERNEL void rows_kernel(int row_bytes) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory<unsigned char>() + lane() * row_bytes);
}
QS_KERNEL void mma_count_kernel() {
  int32_t d[4] = {};
  float f[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int i = 0; i < 3; ++i) mma_u8s8(d, a, b, d);
  for (int i = 0; i < 2; ++i) mma_f16(f, a, b);
  mma_bf16(f, a, b);
}

void counts() {
  settings().counts = true;
  emulator::take_counts();
  alignas(32) static float in[1 << 15];
  alignas(32) static float out[256];
  const auto counted = [](const auto& run) {
    run();
    const auto all = emulator::take_counts();
    return all.size() == 1 ? all[0] : emulator::KernelCounts{};
  };
  const auto expect = [](const std::string& what, int64_t got, int64_t want) {
    check::report(got == want, "count of " + what + ": got " + std::to_string(got) + ", want " + std::to_string(want));
  };
  check::schedules("counts of global memory", [&] {
    for (const auto& [stride, sectors] : {std::array{1, 4}, std::array{2, 8}, std::array{8, 32}, std::array{0, 1}}) {
      const auto c =
          counted([&, step = stride] { launch("strided", strided_kernel, {5}, 64, 0, nullptr, in, out, step); });
      expect("name", c.name == "strided", 1);
      expect("launches", c.launches, 1);
      expect("blocks", c.blocks, 5);
      expect("threads", c.threads, 320);
      expect("load requests", c.global_load_requests, 10);
      expect("load sectors", c.global_load_sectors, 10 * sectors);
      expect("load bytes", c.global_load_bytes, 320 * 4);
      expect("store requests", c.global_store_requests, 10);
      expect("store sectors", c.global_store_sectors, 10 * 4);
      expect("store bytes", c.global_store_bytes, 320 * 4);
      expect("instructions", c.instructions, 20);
      expect("active lanes", c.active_lanes, 640);
    }
    const auto c = counted([&] { launch("half", half_warp_kernel, {}, 32, 0, nullptr, in, 4); });
    expect("requests of half a warp", c.global_load_requests, 4);
    expect("sectors of half a warp", c.global_load_sectors, 4 + 3 * 2);
    expect("active lanes of half a warp", c.active_lanes, 32 + 3 * 16);
  });
  check::schedules("counts of shared memory", [&] {
    const auto conflicts = [&](auto kernel, int stride) {
      const auto c = counted([&] { launch("banks", kernel, {}, 64, 32 * 1024, nullptr, stride); });
      expect("shared requests", c.shared_requests, 2);
      return c.shared_conflicts / 2;
    };
    expect("conflicts of neighbours", conflicts(banks_kernel, 1), 0);
    expect("conflicts of a broadcast", conflicts(banks_kernel, 0), 0);
    expect("conflicts of stride 2", conflicts(banks_kernel, 2), 1);
    expect("conflicts of stride 33", conflicts(banks_kernel, 33), 0);
    expect("conflicts of stride 32", conflicts(banks_kernel, 32), 31);
    expect("conflicts of pairs", conflicts(wide_banks_kernel<float2>, 1), 0);
    expect("conflicts of pairs, stride 2", conflicts(wide_banks_kernel<float2>, 2), 2);  // in each half
    expect("conflicts of fours", conflicts(wide_banks_kernel<float4>, 1), 0);
    expect("conflicts of fours, stride 2", conflicts(wide_banks_kernel<float4>, 2), 4);  // in each quarter
    expect("conflicts of packed rows", conflicts(rows_kernel, 16), 0);
    expect("conflicts of rows of 128 bytes", conflicts(rows_kernel, 128), 28);  // 7 in each matrix
    expect("conflicts of rows of 144 bytes", conflicts(rows_kernel, 144), 0);
  });
  check::schedules("counts of instructions", [&] {
    const auto c = counted([&] { launch("mma", mma_count_kernel, {3}, 64, 0, nullptr); });
    expect("u8s8", c.mma_u8s8, 18);
    expect("f16", c.mma_f16, 12);
    expect("bf16", c.mma_bf16, 6);
    static float4 vectors[4 * 64], copied[4 * 64];
    const auto copies =
        counted([&] { launch("copy", copy_kernel, {}, 64, 1024, nullptr, vectors, copied, Copy::right); });
    expect("copied bytes", copies.cp_async_bytes, 1024);
    expect("copied sectors", copies.cp_async_sectors, 32 + (reinterpret_cast<uintptr_t>(vectors) % 32 != 0 ? 2 : 0));
  });
  settings().counts = false;
}

// --- matrix instructions ---------------------------------------------------------------------------------------------
struct Registers {
  uint32_t a[32][4], b[32][2];
  uint32_t d[32][4];
};
template <class T, void (*mma)(T (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], emulator::Site)>
QS_KERNEL void mma_kernel(Registers* r) {
  T d[4];
  std::memcpy(d, r->d[lane()], 16);
  mma(d, r->a[lane()], r->b[lane()], emulator::Site::current());
  std::memcpy(r->d[lane()], d, 16);
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32" with .u8 and .s8, where groupID = lane >> 2 and
// threadID_in_group = lane % 4.
void add_product(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Site) {
  mma_u8s8(d, a, b, d);
}
void mma_integer() {
  check::Random random(5);
  const int low[] = {0, -128};
  std::vector<int> a(16 * 32), b(32 * 8), d(16 * 8);
  for (int& v : a) v = random.integer(low[0], low[0] + 255);
  for (int& v : b) v = random.integer(low[1], low[1] + 255);
  for (int& v : d) v = random.integer(-1000000, 1000000);
  const auto row_of_d = [](int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; };
  const auto column_of_d = [](int lane, int i) { return lane % 4 * 2 + (i & 1); };
  Registers r = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      const int column = i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
      r.a[lane][i / 4] |= static_cast<uint32_t>(a[static_cast<size_t>(row * 32 + column)] & 255) << i % 4 * 8;
    }
    for (int i = 0; i < 8; ++i) {
      const int row = i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
      r.b[lane][i / 4] |= static_cast<uint32_t>(b[static_cast<size_t>(row * 8 + group)] & 255) << i % 4 * 8;
    }
    for (int i = 0; i < 4; ++i) {
      r.d[lane][i] = static_cast<uint32_t>(d[static_cast<size_t>(row_of_d(lane, i) * 8 + column_of_d(lane, i))]);
    }
  }
  launch("mma_u8s8", mma_kernel<int32_t, add_product>, {}, 32, 0, nullptr, &r);
  bool same = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = row_of_d(lane, i), column = column_of_d(lane, i);
      int want = d[static_cast<size_t>(row * 8 + column)];
      for (int k = 0; k < 32; ++k)
        want += a[static_cast<size_t>(row * 32 + k)] * b[static_cast<size_t>(k * 8 + column)];
      same = same && static_cast<int>(r.d[lane][i]) == want;
    }
  }
  check::report(same, "mma_u8s8");
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <void (*mma)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], emulator::Site)>
void mma_floating(const std::string& name, float (*to_float)(uint16_t), uint16_t (*from_float)(float)) {
  check::Random random(6);
  std::vector<uint16_t> a(16 * 16), b(16 * 8);
  for (auto& v : a) v = from_float(random.normal());
  for (auto& v : b) v = from_float(random.normal());
  const auto d = random.normals(16 * 8);
  const auto row_of_d = [](int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; };
  const auto column_of_d = [](int lane, int i) { return lane % 4 * 2 + (i & 1); };
  Registers r = {};
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      r.a[lane][i / 2] |= static_cast<uint32_t>(a[static_cast<size_t>(row * 16 + column)]) << i % 2 * 16;
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      r.b[lane][i / 2] |= static_cast<uint32_t>(b[static_cast<size_t>(row * 8 + group)]) << i % 2 * 16;
      std::memcpy(&r.d[lane][i], &d[static_cast<size_t>(row_of_d(lane, i) * 8 + column_of_d(lane, i))], 4);
    }
  }
  launch(name.c_str(), mma_kernel<float, mma>, {}, 32, 0, nullptr, &r);
  bool same = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = row_of_d(lane, i), column = column_of_d(lane, i);
      float want = d[static_cast<size_t>(row * 8 + column)];
      for (int k = 0; k < 16; ++k) {
        want += to_float(a[static_cast<size_t>(row * 16 + k)]) * to_float(b[static_cast<size_t>(k * 8 + column)]);
      }
      same = same && std::memcmp(&want, &r.d[lane][i], 4) == 0;
    }
  }
  check::report(same, name);
}

struct Loaded {
  uint32_t x4[32][4], x2[32][2], x4_trans[32][4], x2_trans[32][2];
};
// Element c of row j of matrix i is 256 * i + 16 * j + c; rows lie apart and out of order.
QS_KERNEL void ldmatrix_kernel(Loaded* out) {
  uint16_t* shared = shared_memory<uint16_t>();
  const auto place = [](int row) { return (row * 5 + 3) % 32 * 24; };
  const int i = lane() / 8, j = lane() % 8;
  for (int c = 0; c < 8; ++c) store_shared(shared + place(lane()) + c, static_cast<uint16_t>(256 * i + 16 * j + c));
  sync_warp();
  const uint16_t* row = shared + place(lane());
  ldmatrix_x4(out->x4[lane()], row);
  ldmatrix_x2(out->x2[lane()], row);
  ldmatrix_x4_trans(out->x4_trans[lane()], row);
  ldmatrix_x2_trans(out->x2_trans[lane()], row);
}

// PTX ISA, "ldmatrix": thread T holds elements 2 * (T % 4) and the next of row T / 4; transposed, of column T / 4.
void matrices_from_shared_memory() {
  Loaded loaded = {};
  launch("ldmatrix", ldmatrix_kernel, {}, 32, 32 * 48, nullptr, &loaded);
  bool same = true;
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned first = 256 * i + 16 * (lane / 4) + lane % 4 * 2;
      const uint32_t want = first | (first + 1) << 16;
      const unsigned top = 256 * i + 16 * (lane % 4 * 2) + lane / 4;
      const uint32_t want_trans = top | (top + 16) << 16;
      same = same && loaded.x4[lane][i] == want && loaded.x4_trans[lane][i] == want_trans;
      if (i < 2) same = same && loaded.x2[lane][i] == want && loaded.x2_trans[lane][i] == want_trans;
    }
  }
  check::report(same, "ldmatrix");
}

void numbers_of_16_bits() {
  bool halves = true, rounded = true, bfloats = true;
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float x = half_to_float(static_cast<uint16_t>(h)), want = check::half_to_float(static_cast<uint16_t>(h));
    halves = halves && check::same(&x, &want, 1);
    const float y = bfloat_to_float(static_cast<uint16_t>(h));
    if (std::isnan(x)) {
      rounded = rounded && float_to_half(x) == 0x7fff;
    } else {
      rounded = rounded && float_to_half(x) == h;
      // Half way to the next one, a bit less and a bit more.
      const float middle = (x + check::half_to_float(static_cast<uint16_t>((h & 0x7fff) == 0x7bff ? h : h + 1))) / 2;
      for (const float z : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, middle * 2)}) {
        rounded = rounded && (std::isnan(z) || float_to_half(z) == check::float_to_half(z));
      }
    }
    if (std::isnan(y)) {
      bfloats = bfloats && float_to_bfloat(y) == 0x7fff;
    } else {
      const uint32_t even = h + (h & 1);
      bfloats = bfloats && float_to_bfloat(y) == h;
      if ((h & 0x7fff) < 0x7f80) {
        bfloats = bfloats && float_to_bfloat(std::bit_cast<float>(h << 16 | 0x8000)) == even &&
                  float_to_bfloat(std::bit_cast<float>(h << 16 | 0x7fff)) == h &&
                  float_to_bfloat(std::bit_cast<float>(h << 16 | 0x8001)) == h + 1;
      }
    }
  }
  check::report(halves, "half to float");
  check::report(rounded, "float to half");
  check::report(bfloats, "bfloat16");
  check::report(pack_half2(1, -2) == 0xc0003c00u && pack_bfloat2(1, -2) == 0xc0003f80u, "packed pairs");
  for (const float x : {65519.0f, 65520.0f, 1e30f, 1e-30f, 0x1p-25f, 0x1.000002p-25f, -0.0f, INFINITY}) {
    check::report(float_to_half(x) == check::float_to_half(x), "float to half of " + std::to_string(x));
  }
}

void device_memory() {
  int in[5] = {1, 2, 3, 4, 5}, out[5] = {};
  void* memory = allocate(sizeof in);
  copy_out(out, memory, sizeof out, nullptr);
  check::report(out[0] == 0 && out[4] == 0, "allocated memory is zero");
  copy_in(memory, in, sizeof in, nullptr);
  copy_out(out, memory, sizeof out, nullptr);
  synchronize(nullptr);
  check::report(std::memcmp(in, out, sizeof in) == 0, "copies");
  release(memory);
}

}  // namespace
}  // namespace quicksilver::QS_CUDA

void emulator_tests() {
  using namespace quicksilver::QS_CUDA;
  const auto before = settings();
  planted_bugs();
  settings() = before;
  correct_kernels();
  counts();
  settings() = before;
  mma_integer();
  mma_floating<mma_f16>("mma m16n8k16 f16", half_to_float, float_to_half);
  mma_floating<mma_bf16>("mma m16n8k16 bf16", bfloat_to_float, float_to_bfloat);
  matrices_from_shared_memory();
  numbers_of_16_bits();
  device_memory();
  // No blocks are no launch, whatever else it asks for.
  launch("nothing", two_writers_kernel, {0}, 33, -1, nullptr);
}
