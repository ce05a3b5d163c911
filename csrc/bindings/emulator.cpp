// The emulator of CUDA kernels for Python: its settings and counts, and its models of the matrix instructions.
#include "emulator.h"

#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace quicksilver {
namespace {

using emulator::Site;

template <class T, size_t n>
using Registers = std::array<std::array<T, n>, emulator::kLanes>;  // of each lane

size_t lane() { return emulator::position().thread.x; }

template <class T, void (*instruction)(T*, const uint32_t*, const uint32_t*, const Site&)>
Registers<T, 4> mma(const Registers<uint32_t, 4>& a, const Registers<uint32_t, 2>& b, Registers<T, 4> c) {
  emulator::launch("mma", {1, 1, 1}, emulator::kLanes, 0,
                   [&] { instruction(c[lane()].data(), a[lane()].data(), b[lane()].data(), Site::current()); });
  return c;
}

std::vector<std::vector<uint32_t>> ldmatrix(const std::string& shared,
                                            const std::array<int64_t, emulator::kLanes>& rows, int matrices,
                                            bool transposed) {
  if (matrices != 2 && matrices != 4) throw std::invalid_argument("matrices must be 2 or 4");
  std::vector<std::vector<uint32_t>> r(emulator::kLanes, std::vector<uint32_t>(static_cast<size_t>(matrices)));
  emulator::launch("ldmatrix", {1, 1, 1}, emulator::kLanes, static_cast<int64_t>(shared.size()), [&] {
    if (lane() == 0) std::memcpy(emulator::shared_memory(), shared.data(), shared.size());
    emulator::sync_block(Site::current());
    emulator::ldmatrix(r[lane()].data(), emulator::shared_memory() + rows[lane()], matrices, transposed,
                       Site::current());
  });
  return r;
}

constexpr std::pair<const char*, emulator::Settings::Schedule> kSchedules[] = {
    {"forward", emulator::Settings::Schedule::forward},
    {"backward", emulator::Settings::Schedule::backward},
    {"random", emulator::Settings::Schedule::random},
};

std::string schedule_name(const emulator::Settings& settings) {
  for (const auto& [name, schedule] : kSchedules) {
    if (schedule == settings.schedule) return name;
  }
  return "";
}

void set_schedule(emulator::Settings& settings, const std::string& wanted) {
  for (const auto& [name, schedule] : kSchedules) {
    if (name == wanted) {
      settings.schedule = schedule;
      return;
    }
  }
  throw std::invalid_argument("schedule must be one of 'forward', 'backward', 'random', not '" + wanted + "'");
}

void set_workers(emulator::Settings& settings, int workers) {
  if (workers < 1) throw std::invalid_argument("workers must be at least 1, not " + std::to_string(workers));
  settings.workers = workers;
}

py::list take_counts() {
  py::list all;
  for (const emulator::KernelCounts& c : emulator::take_counts()) {
    py::dict counts;
    counts["name"] = c.name;
    counts["device"] = c.device;
    for (const auto& [name, number] : emulator::kCountNames) counts[name] = c.*number;
    all.append(counts);
  }
  return all;
}

}  // namespace

void bind_emulator(py::module_& parent) {
  py::module_ module = parent.def_submodule("emulator", "Runs the CUDA kernels on the host.");
  py::class_<emulator::Settings>(module, "Settings")
      .def_property("schedule", schedule_name, set_schedule,
                    "Which of the threads that can run goes next: 'forward', 'backward' or 'random'.")
      .def_readwrite("seed", &emulator::Settings::seed, "Of the random schedule.")
      .def_property(
          "workers", [](const emulator::Settings& s) { return s.workers; }, set_workers, "OS threads that run blocks.")
      .def_readwrite("counts", &emulator::Settings::counts, "Whether kernels are counted, for take_counts().");
  module.attr("settings") = py::cast(&emulator::settings(), py::return_value_policy::reference);
  module.def(
      "take_counts", take_counts,
      "A dict for each kernel that ran since the last call, in order of first launch; see csrc/emulator/emulator.h.");
  module.def("mma_u8s8", mma<int32_t, emulator::mma_u8s8>, py::arg("a"), py::arg("b"), py::arg("c"),
             "mma.m16n8k32 of unsigned and signed bytes by one warp. a, b, c: 4, 2, 4 registers of each of 32 lanes.");
  module.def("mma_f16", mma<float, emulator::mma_f16>, py::arg("a"), py::arg("b"), py::arg("c"),
             "mma.m16n8k16 of halves, added up in fp32.");
  module.def("mma_bf16", mma<float, emulator::mma_bf16>, py::arg("a"), py::arg("b"), py::arg("c"),
             "mma.m16n8k16 of bfloat16, added up in fp32.");
  module.def(
      "ldmatrix",
      [](const py::bytes& shared, const std::array<int64_t, emulator::kLanes>& rows, int matrices, bool transposed) {
        return ldmatrix(shared, rows, matrices, transposed);
      },
      py::arg("shared"), py::arg("rows"), py::arg("matrices"), py::arg("transposed"),
      "ldmatrix by one warp from a block's shared memory; rows: the offset that each lane gives.");
}

}  // namespace quicksilver
