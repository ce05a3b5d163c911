// Runs the kernel tests on every instruction set. Exit 0 where all hold.
#include <map>

#include "check.h"

namespace check {

std::vector<Variant> variants() {
  using quicksilver::Isa;
  std::vector<Variant> list = {{"baseline", &quicksilver::kernels_baseline()}};
  const auto add = [&](const char* name, Isa isa, const quicksilver::Kernels& (*kernels)()) {
#ifdef QS_AVX512_BY_AVX2
    (void)isa;
    const bool runs = quicksilver::isa_supported(Isa::avx2);
#else
    const bool runs = quicksilver::isa_supported(isa);
#endif
    if (runs) list.push_back({name, &kernels()});
  };
#ifdef QS_HAS_avx2
  add("avx2", Isa::avx2, quicksilver::kernels_avx2);
#endif
#ifdef QS_HAS_avx512
  add("avx512", Isa::avx512, quicksilver::kernels_avx512);
#endif
#ifdef QS_HAS_avx512vnni
  add("avx512vnni", Isa::avx512vnni, quicksilver::kernels_avx512vnni);
#endif
  return list;
}

void compare_with_others(const Variant& variant, const std::string& what, const std::vector<float>& x, bool fused) {
  static std::map<std::string, std::pair<std::string, std::vector<float>>> first;
  if (fused && variant.name == "baseline") return;
  const auto [entry, fresh] = first.try_emplace(what, variant.name, x);
  if (!fresh)
    report(same(entry->second.second, x), variant.name + " differs from " + entry->second.first + ": " + what);
}

}  // namespace check

int main(int argc, char** argv) {
  for (const check::Variant& variant : check::variants()) {
    if (argc > 1 && variant.name != argv[1]) continue;
    const int before = check::failures;
    check::test_gemm(variant);
    check::test_attention(variant);
    check::test_mechanisms(variant);
    check::test_layer(variant);
    std::printf("%s: %d failures\n", variant.name.c_str(), check::failures - before);
  }
  return check::failures == 0 ? 0 : 1;
}
