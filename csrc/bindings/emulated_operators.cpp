// cuda_operators.cpp once more, for the emulator.
#define QS_EMULATED
#define QS_CUDA emulated
#include "cuda_operators.cpp"
