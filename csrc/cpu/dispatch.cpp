// Which instruction set runs: what the CPU has, what the OS saves, what QUICKSILVER_ISA asks for; and the public
// functions that call the chosen set's kernels.
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quicksilver {
namespace {

struct Variant {
  const char* name;
  const Kernels& (*kernels)();  // null: not compiled here
};

constexpr Variant kVariants[] = {
    {"baseline", kernels_baseline},
#ifdef QS_HAS_avx2
    {"avx2", kernels_avx2},
#else
    {"avx2", nullptr},
#endif
#ifdef QS_HAS_avx512
    {"avx512", kernels_avx512},
#else
    {"avx512", nullptr},
#endif
#ifdef QS_HAS_avx512vnni
    {"avx512vnni", kernels_avx512vnni},
#else
    {"avx512vnni", nullptr},
#endif
};
constexpr int kCount = static_cast<int>(std::size(kVariants));

// The widest set that both the CPU and the OS support.
int probe() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const auto all = [](unsigned value, std::initializer_list<int> bits) {
    for (int bit : bits) {
      if (!(value >> bit & 1)) return false;
    }
    return true;
  };
  // FMA 12, OSXSAVE 27, AVX 28, F16C 29
  if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, {12, 27, 28, 29})) return 0;
  // The instruction by hand: the intrinsic would need -mxsave, and this source is shared.
  unsigned xcr0 = 0, high = 0;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  if ((xcr0 & 0x06) != 0x06) return 0;  // the OS saves SSE and AVX registers
  // AVX2 5, BMI2 8
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !all(b, {5, 8})) return 0;
  // F 16, DQ 17, BW 30, VL 31; the OS also saves mask and ZMM registers
  if ((xcr0 & 0xe6) != 0xe6 || !all(b, {16, 17, 30, 31})) return 1;
  return all(c, {11}) ? 3 : 2;  // VNNI
#else
  return 0;
#endif
}

int widest() {
  static const int level = probe();
  return level;
}

std::string list(bool supported_only) {
  std::string names;
  for (int i = 0; i < kCount; ++i) {
    if (supported_only && !isa_supported(static_cast<Isa>(i))) continue;
    names += (names.empty() ? "" : ", ") + std::string(kVariants[i].name);
  }
  return names;
}

Isa initial_isa() {
  const char* wanted = std::getenv("QUICKSILVER_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported_isas().back();
  Isa isa{};
  try {
    isa = isa_from_name(wanted);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("QUICKSILVER_ISA: ") + error.what());
  }
  if (!isa_supported(isa)) {
    throw std::runtime_error(std::string("QUICKSILVER_ISA: this machine can't run '") + wanted + "', only " +
                             list(true));
  }
  return isa;
}

std::atomic<int> chosen{-1};
std::atomic<const Kernels*> table{nullptr};

const Kernels& kernels() {
  const Kernels* current = table.load(std::memory_order_acquire);
  if (current == nullptr) [[unlikely]] {
    set_isa(current_isa());
    current = table.load(std::memory_order_acquire);
  }
  return *current;
}

}  // namespace

const char* isa_name(Isa isa) { return kVariants[static_cast<int>(isa)].name; }

Isa isa_from_name(const std::string& name) {
  for (int i = 0; i < kCount; ++i) {
    if (name == kVariants[i].name) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("unknown instruction set '" + name + "', known are " + list(false));
}

bool isa_supported(Isa isa) {
  const int level = static_cast<int>(isa);
  return level >= 0 && level < kCount && level <= widest() && kVariants[level].kernels != nullptr;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < kCount; ++i) {
    if (isa_supported(static_cast<Isa>(i))) isas.push_back(static_cast<Isa>(i));
  }
  return isas;
}

Isa current_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return isa >= 0 ? static_cast<Isa>(isa) : initial_isa();
}

void set_isa(Isa isa) {
  if (!isa_supported(isa)) {
    const int level = static_cast<int>(isa);
    const std::string name = level >= 0 && level < kCount ? kVariants[level].name : std::to_string(level);
    throw std::invalid_argument("this machine can't run the instruction set '" + name + "', only " + list(true));
  }
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  table.store(&kVariants[static_cast<int>(isa)].kernels(), std::memory_order_release);
}

#define QS_DISPATCH(result, name, parameters, arguments) \
  result name parameters { return kernels().name arguments; }
QS_KERNELS(QS_DISPATCH)
#undef QS_DISPATCH

}  // namespace quicksilver
