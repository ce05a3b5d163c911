// Runs the tests of the CUDA kernels, in the emulator (and those of the emulator) or on a GPU. Exit 0 where all hold.
#include "cuda_check.h"

void emulator_tests();
void mechanisms_cuda_tests();
void prefill_tests();
void decode_tests();
void attention_tests();
void limits_tests();

namespace {

int tests(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } suites[] = {
#ifdef QS_EMULATED
      {"emulator", emulator_tests},
#endif
      {"mechanisms", mechanisms_cuda_tests}, {"prefill", prefill_tests}, {"decode", decode_tests},
      {"attention", attention_tests},        {"limits", limits_tests}};
  for (const auto& [name, run] : suites) {
    if (argc > 1 && std::string(name) != argv[1]) continue;
    const int before = check::failures;
    run();
    std::printf("%s: %d failures\n", name, check::failures - before);
  }
  return check::failures == 0 ? 0 : 1;
}

}  // namespace

#ifdef QS_EMULATED
int main(int argc, char** argv) { return tests(argc, argv); }
#else
int on_mapped_memory(int (*body)(int, char**), int argc, char** argv);  // mapped.cpp
int main(int argc, char** argv) { return on_mapped_memory(tests, argc, argv); }
#endif
