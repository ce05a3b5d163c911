// What the binding sources share. Nothing outside csrc/bindings includes this.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace quicksilver {

// Tensors come in as Tensor.data_ptr(), 0 being null.
using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
Address address(const T* pointer) {
  return reinterpret_cast<Address>(pointer);
}

// A pointer member as an int attribute.
template <typename C, typename Options, typename T>
void def_address(Options& type, const char* name, T* C::* member) {
  type.def_property(
      name, [member](const C& self) { return address(self.*member); },
      [member](C& self, Address value) { self.*member = at<T>(value); });
}

// The torch-free runtime: instruction set, threads, counters, and the layer stages on raw addresses.
void bind_runtime(pybind11::module_& module);
// The stages on CUDA (submodule `cuda`), and the same on the emulator (submodules `emulated` and, for its settings and
// counts, `emulator`); each where it was built.
void bind_cuda(pybind11::module_& module);
void bind_emulated(pybind11::module_& module);
void bind_emulator(pybind11::module_& module);

}  // namespace quicksilver
