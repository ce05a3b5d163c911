// The table of one instruction set's kernels. Compiled once per instruction set, as the kernels are.
#include "kernels.h"

#define QS_JOIN_(a, b) a##b
#define QS_JOIN(a, b) QS_JOIN_(a, b)

namespace quicksilver {

const Kernels& QS_JOIN(kernels_, QS_ISA)() {
#define QS_ENTRY(result, name, parameters, arguments) &QS_ISA::name,
  static constexpr Kernels table = {QS_KERNELS(QS_ENTRY)};
#undef QS_ENTRY
  return table;
}

}  // namespace quicksilver
