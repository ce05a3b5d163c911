// The module quicksilver_ext._C. Loading it also registers torch.ops.quicksilver (operators.cpp).
#include "bindings.h"
#include "quicksilver/runtime.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "QuickSilver's compiled part. The wrappers in quicksilver_ext.ops are the documented way in.";
  // Chooses the instruction set now, so that a bad QUICKSILVER_ISA is an error of the import.
  quicksilver::set_isa(quicksilver::current_isa());
  quicksilver::bind_runtime(module);
#ifdef QS_HAS_CUDA
  quicksilver::bind_cuda(module);
#endif
#ifdef QS_HAS_EMULATOR
  quicksilver::bind_emulated(module);
  quicksilver::bind_emulator(module);
#endif
}
