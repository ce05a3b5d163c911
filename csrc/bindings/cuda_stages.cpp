// pybind11 bindings of the stages on CUDA, and, compiled a second time, of the same on the emulator: the submodules
// _C.cuda and _C.emulated. As in runtime.cpp, tensors come in as addresses; theirs are device pointers here.
#include "bindings.h"
#include "cuda_device.h"

namespace py = pybind11;

namespace quicksilver {
namespace {

// A batch's work memory, on the device where the stages are to run.
struct Work {
  kernels::DeviceWorkspace memory;
  int32_t device = 0;
};

void bind_memory(py::module_& m) {
  py::class_<Work> work(m, "Work", py::module_local());
  work.def(py::init([](Address buffer, int32_t device, const Layer& layer, int64_t rows, int64_t sequences,
                       int64_t max_entries) {
             if (buffer == 0 || buffer % 256 != 0) throw std::invalid_argument("buffer must be aligned to 256 bytes");
             return Work{kernels::carve_workspace(at<void>(buffer), layer, rows, sequences, max_entries), device};
           }),
           py::arg("buffer"), py::arg("device"), py::arg("layer"), py::arg("rows"), py::arg("sequences"),
           py::arg("max_entries"),
           "Work memory of up to `rows` rows, in a buffer that is zero and of Work.nbytes(...) bytes.");
  work.def_static("nbytes", &kernels::workspace_bytes, py::arg("layer"), py::arg("rows"), py::arg("sequences"),
                  py::arg("max_entries"));
  work.def_property_readonly("previous", [](const Work& w) { return address(w.memory.previous); });
  work.def_property_readonly("q", [](const Work& w) { return address(w.memory.q); });
  work.def_property_readonly("drift", [](const Work& w) { return address(w.memory.drift); });
  work.def_property_readonly("full", [](const Work& w) { return address(w.memory.full); });

  using kernels::DeviceHalting;
  py::class_<DeviceHalting> halting(m, "Halting", py::module_local());
  halting.def(py::init<>())
      .def_readwrite("drift_threshold", &DeviceHalting::drift_threshold)
      .def_readwrite("relative", &DeviceHalting::relative)
      .def_readwrite("tests_entropy", &DeviceHalting::tests_entropy)
      .def_readwrite("entropy_threshold", &DeviceHalting::entropy_threshold)
      .def_readwrite("sink_tokens", &DeviceHalting::sink_tokens);
  def_address(halting, "overrides", &DeviceHalting::overrides);
  def_address(halting, "halted", &DeviceHalting::halted);
  def_address(halting, "active", &DeviceHalting::active);
  def_address(halting, "count", &DeviceHalting::count);
}

// count: the address of the number of active rows on the device, or 0 where rows.count is that number.
void bind_stages(py::module_& m) {
  m.attr("DECODE_ROWS") = kernels::kDecodeRows;
  m.def("attention_input",
        [](const Layer& layer, const Rows& rows, Address count, const KvCache& cache, const Work& work) {
          const On on(work.device);
          kernels::attention_input(layer, rows, at<int32_t>(count), cache, work.memory, on.stream());
        });
  m.def("write_kv", [](const Layer& layer, const Rows& rows, Address count, const KvCache& cache, const Work& work) {
    const On on(work.device);
    kernels::write_kv(layer, rows, at<int32_t>(count), cache, work.memory, on.stream());
  });
  m.def("attention", [](const Layer& layer, const Rows& rows, Address count, const KvCache& cache, const Work& work,
                        Address log_sum_exp) {
    const On on(work.device);
    kernels::attention(layer, rows, at<int32_t>(count), cache, work.memory, at<float>(log_sum_exp), on.stream());
  });
  m.def("attention_output", [](const Layer& layer, const Rows& rows, Address count, const Work& work) {
    const On on(work.device);
    kernels::attention_output(layer, rows, at<int32_t>(count), work.memory, on.stream());
  });
  m.def("mlp_input", [](const Layer& layer, const Rows& rows, Address count, const Work& work) {
    const On on(work.device);
    kernels::mlp_input(layer, rows, at<int32_t>(count), work.memory, on.stream());
  });
  m.def("mlp_output", [](const Layer& layer, const Rows& rows, Address count, const Work& work, Address depth,
                         const kernels::DeviceHalting* halting) {
    const On on(work.device);
    kernels::mlp_output(layer, rows, at<int32_t>(count), work.memory, at<int32_t>(depth), halting, on.stream());
  });
  m.def("lm_head", [](const Norm& norm, const Linear& head, const Rows& rows, Address count, int64_t d, Address logits,
                      int64_t logits_stride, const Work& work) {
    const On on(work.device);
    kernels::lm_head(norm, head, rows, at<int32_t>(count), d, at<float>(logits), logits_stride, work.memory,
                     on.stream());
  });
}

}  // namespace

#ifdef QS_EMULATED
void bind_emulated(py::module_& module) {
  py::module_ m = module.def_submodule("emulated", "The stages of csrc/cuda, run on the host by csrc/emulator.");
#else
void bind_cuda(py::module_& module) {
  py::module_ m = module.def_submodule("cuda", "The stages on a CUDA device.");
#endif
  bind_memory(m);
  bind_stages(m);
}

}  // namespace quicksilver
