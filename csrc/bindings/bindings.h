// What the binding sources share. Nothing outside csrc/bindings includes this.
#pragma once

#include <pybind11/pybind11.h>

namespace quicksilver {

// The torch-free runtime: instruction set, threads, counters, and the layer stages on raw addresses.
void bind_runtime(pybind11::module_& module);

}  // namespace quicksilver
