// pybind11 bindings of the torch-free runtime. Tensors come in as addresses (Tensor.data_ptr()), 0 being null: the
// decoder owns them, has checked them, and may make 150 of these calls in a step of a few milliseconds.
#include "quicksilver/runtime.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "quicksilver/ceilings.h"
#include "quicksilver/decode_step.h"
#include "quicksilver/halting.h"
#include "quicksilver/layer.h"

namespace py = pybind11;

namespace quicksilver {
namespace {

// Releasing the GIL costs as much as a small stage gains by it; a prefill's stages last milliseconds.
constexpr int64_t kRowsToReleaseGil = 16;

template <typename F>
auto maybe_without_gil(int64_t rows, const F& body) {
  std::optional<py::gil_scoped_release> release;
  if (rows >= kRowsToReleaseGil) release.emplace();
  return body();
}

template <typename E, size_t n>
struct Names {
  const char* what;
  const char* names[n];

  E parse(const std::string& name) const {
    std::string known;
    for (size_t i = 0; i < n; ++i) {
      if (name == names[i]) return static_cast<E>(i);
      known += (i == 0 ? "'" : ", '") + std::string(names[i]) + "'";
    }
    throw std::invalid_argument(std::string(what) + " must be one of " + known + ", not '" + name + "'");
  }
  const char* name(E value) const { return names[static_cast<size_t>(value)]; }
};

constexpr Names<NormKind, 2> kNormKinds{"norm kind", {"rms", "layer"}};
constexpr Names<Activation, 2> kActivations{"activation", {"silu_gated", "gelu_tanh"}};
constexpr Names<KvType, 4> kKvTypes{"KV cache type", {"f32", "f16", "bf16", "i8"}};

void bind_state(py::module_& m) {
  m.def("isa", [] { return isa_name(current_isa()); }, "Name of the instruction set in use.");
  m.def(
      "supported_isas",
      [] {
        py::list names;
        for (Isa isa : supported_isas()) names.append(isa_name(isa));
        return names;
      },
      "Instruction sets that this machine runs, widest last.");
  m.def(
      "set_isa", [](const std::string& name) { set_isa(isa_from_name(name)); }, py::arg("name"),
      "Switches all kernels to an instruction set. ValueError for an unknown one or one that can't run here.");
  m.def("threads", &threads, "Threads in the pool, the caller included.");
  m.def("set_threads", &set_threads, py::arg("count"), py::call_guard<py::gil_scoped_release>(),
        "Resizes the pool. ValueError for count < 1.");
  m.def("start_threads", &start_threads, py::arg("count"),
        "Says the size of a pool that is yet to be made, where nobody has; otherwise it does nothing.");

  py::class_<Counters>(m, "Counters")
      .def_readonly("gemm_macs", &Counters::gemm_macs)
      .def_readonly("attention_pairs", &Counters::attention_pairs)
      .def_readonly("weight_bytes_read", &Counters::weight_bytes_read)
      .def_readonly("kv_bytes_read", &Counters::kv_bytes_read)
      .def_readonly("attention_nanoseconds", &Counters::attention_nanoseconds)
      .def_readonly("step_nanoseconds", &Counters::step_nanoseconds)
      .def_readonly("step_attention_nanoseconds", &Counters::step_attention_nanoseconds);
  m.def("counters", &counters, "What the kernels did since reset_counters().");
  m.def("reset_counters", &reset_counters);

  m.def(
      "read_ceiling",
      [](Address data, int64_t bytes) {
        if (data == 0 || data % 64 != 0) throw std::invalid_argument("address must be a multiple of 64 and not null");
        if (bytes < 4096) throw std::invalid_argument("bytes must be at least 4096, not " + std::to_string(bytes));
        const py::gil_scoped_release release;
        return read_ceiling(at<const void>(data), static_cast<size_t>(bytes));
      },
      py::arg("address"), py::arg("bytes"), "Bytes per second of all threads reading this memory once.");
  m.def("int8_ceiling", &int8_ceiling, py::call_guard<py::gil_scoped_release>(),
        "INT8 multiply-accumulates per second of all threads, out of registers.");
}

void bind_structs(py::module_& m) {
  py::class_<MatryoshkaWeight>(m, "MatryoshkaWeight")
      .def(py::init([](Address hi, Address lo, Address scale, int64_t n, int64_t k, int32_t group) {
             if (hi == 0 || scale == 0) throw std::invalid_argument("hi and scale must not be null");
             if (n < 1 || k < 1) throw std::invalid_argument("n and k must be at least 1");
             if (group != 32 && group != 64 && group != 128) {
               throw std::invalid_argument("group must be 32, 64 or 128, not " + std::to_string(group));
             }
             return MatryoshkaWeight{at<uint8_t>(hi), at<uint8_t>(lo), at<uint16_t>(scale), n, k, group};
           }),
           py::arg("hi"), py::arg("lo"), py::arg("scale"), py::arg("n"), py::arg("k"), py::arg("group"))
      .def_readonly("n", &MatryoshkaWeight::n)
      .def_readonly("k", &MatryoshkaWeight::k)
      .def_readonly("group", &MatryoshkaWeight::group);

  py::class_<Linear>(m, "Linear")
      .def(py::init([](const MatryoshkaWeight& weight, Address bias) { return Linear{weight, at<float>(bias)}; }),
           py::arg("weight"), py::arg("bias") = 0)
      .def_readonly("weight", &Linear::weight);

  py::class_<Norm>(m, "Norm").def(py::init([](const std::string& kind, Address weight, Address bias, float eps) {
                                    return Norm{kNormKinds.parse(kind), at<float>(weight), at<float>(bias), eps};
                                  }),
                                  py::arg("kind"), py::arg("weight"), py::arg("bias") = 0, py::arg("eps") = 1e-5f);

  py::class_<Layer> layer(m, "Layer");
  layer.def(py::init<>())
      .def_readwrite("d", &Layer::d)
      .def_readwrite("heads", &Layer::heads)
      .def_readwrite("kv_heads", &Layer::kv_heads)
      .def_readwrite("head_size", &Layer::head_size)
      .def_readwrite("ffn", &Layer::ffn)
      .def_property(
          "activation", [](const Layer& self) { return kActivations.name(self.activation); },
          [](Layer& self, const std::string& name) { self.activation = kActivations.parse(name); })
      .def_readwrite("attention_norm", &Layer::attention_norm)
      .def_readwrite("q", &Layer::q)
      .def_readwrite("k", &Layer::k)
      .def_readwrite("v", &Layer::v)
      .def_readwrite("o", &Layer::o)
      .def_readwrite("mlp_norm", &Layer::mlp_norm)
      .def_readwrite("gate", &Layer::gate)
      .def_readwrite("up", &Layer::up)
      .def_readwrite("down", &Layer::down)
      .def_readwrite("attention_scale", &Layer::attention_scale)
      .def_readwrite("attention_input_planes", &Layer::attention_input_planes)
      .def_readwrite("attention_output_planes", &Layer::attention_output_planes)
      .def_readwrite("mlp_input_planes", &Layer::mlp_input_planes)
      .def_readwrite("mlp_output_planes", &Layer::mlp_output_planes);
  def_address(layer, "cosine", &Layer::cosine);
  def_address(layer, "sine", &Layer::sine);

  py::class_<Rows> rows(m, "Rows");
  rows.def(py::init<>()).def_readwrite("rows", &Rows::rows).def_readwrite("count", &Rows::count);
  def_address(rows, "hidden", &Rows::hidden);
  def_address(rows, "active", &Rows::active);
  def_address(rows, "positions", &Rows::positions);
  def_address(rows, "sequence", &Rows::sequence);
  def_address(rows, "bits", &Rows::bits);
  def_address(rows, "slots", &Rows::slots);

  py::class_<KvCache> cache(m, "KvCache");
  cache.def(py::init<>())
      .def_property(
          "type", [](const KvCache& self) { return kKvTypes.name(self.type); },
          [](KvCache& self, const std::string& name) { self.type = kKvTypes.parse(name); })
      .def_readwrite("blocks", &KvCache::blocks)
      .def_readwrite("block_size", &KvCache::block_size)
      .def_readwrite("kv_heads", &KvCache::kv_heads)
      .def_readwrite("head_size", &KvCache::head_size)
      .def_readwrite("max_blocks", &KvCache::max_blocks)
      .def_readwrite("sequences", &KvCache::sequences);
  def_address(cache, "key", &KvCache::key);
  def_address(cache, "value", &KvCache::value);
  def_address(cache, "key_scale", &KvCache::key_scale);
  def_address(cache, "value_scale", &KvCache::value_scale);
  def_address(cache, "block_table", &KvCache::block_table);
  def_address(cache, "lengths", &KvCache::lengths);
  def_address(cache, "positions", &KvCache::positions);
  def_address(cache, "until", &KvCache::until);
  def_address(cache, "blocks_used", &KvCache::blocks_used);

  py::class_<Workspace> work(m, "Workspace");
  work.def(py::init<>())
      .def("reserve", &Workspace::reserve, py::arg("layer"), py::arg("count"))
      .def_property_readonly("previous", [](const Workspace& w) { return address(w.previous); })
      .def_property_readonly("q", [](const Workspace& w) { return address(w.q); })
      .def_property_readonly("k", [](const Workspace& w) { return address(w.k); })
      .def_property_readonly("v", [](const Workspace& w) { return address(w.v); })
      .def_property_readonly("attention", [](const Workspace& w) { return address(w.attention); })
      .def_property_readonly("gate", [](const Workspace& w) { return address(w.gate); })
      .def_property_readonly("up", [](const Workspace& w) { return address(w.up); })
      .def_property_readonly("bits", [](const Workspace& w) { return address(w.bits); })
      .def_property_readonly("slots", [](const Workspace& w) { return address(w.slots); })
      .def_property_readonly("quantized", [](const Workspace& w) { return address(w.quantized); });
}

// A decode step of up to `rows` sequences, with the memory that it works in.
struct StepRunner {
  StepRunner(std::vector<const Layer*> layers_, std::vector<KvCache*> caches_, Address embedding,
             Address position_embedding, const Norm& final_norm, const Linear& head, int32_t head_planes, int64_t rows,
             Address logits)
      : layers(std::move(layers_)),
        caches(std::move(caches_)),
        hidden(static_cast<size_t>(rows * (layers.empty() ? 0 : layers[0]->d))),
        active(static_cast<size_t>(rows)),
        bits(static_cast<size_t>(rows), 8),
        depth(static_cast<size_t>(rows)) {
    if (layers.empty() || layers.size() != caches.size()) {
      throw std::invalid_argument("layers and caches must be of one length, and not empty");
    }
    if (embedding == 0 || logits == 0) throw std::invalid_argument("embedding and logits must not be null");
    step.layers = layers.data();
    step.caches = caches.data();
    step.layer_count = static_cast<int64_t>(layers.size());
    step.embedding = at<uint16_t>(embedding);
    step.position_embedding = at<float>(position_embedding);
    step.final_norm = final_norm;
    step.head = head;
    step.head_planes = head_planes;
    step.hidden = hidden.data();
    step.active = active.data();
    step.bits = bits.data();
    step.depth = depth.data();
    step.logits = at<float>(logits);
  }
  StepRunner(const StepRunner&) = delete;

  bool run(const std::vector<int64_t>& ids, const std::vector<int32_t>& positions,
           const std::vector<int32_t>& sequence) {
    if (ids.empty() || ids.size() > active.size() || positions.size() != ids.size() || sequence.size() != ids.size()) {
      throw std::invalid_argument("ids, positions and sequence must be of one length, 1 to " +
                                  std::to_string(active.size()));
    }
    step.count = static_cast<int64_t>(ids.size());
    step.ids = ids.data();
    step.positions = positions.data();
    step.sequence = sequence.data();
    const py::gil_scoped_release release;
    return decode_step(step, work);
  }

  std::vector<const Layer*> layers;
  std::vector<KvCache*> caches;
  std::vector<float> hidden;
  std::vector<int32_t> active, bits, depth;
  StepHalting halting;
  StepAmq amq;
  Workspace work;
  DecodeStep step;
};

void bind_step(py::module_& m) {
  const auto first = [](const std::vector<int32_t>& values, int64_t count) {
    return std::vector<int32_t>(values.begin(), values.begin() + count);
  };
  py::class_<StepRunner>(m, "DecodeStep")
      .def(py::init<std::vector<const Layer*>, std::vector<KvCache*>, Address, Address, const Norm&, const Linear&,
                    int32_t, int64_t, Address>(),
           py::arg("layers"), py::arg("caches"), py::arg("embedding"), py::arg("position_embedding"),
           py::arg("final_norm"), py::arg("head"), py::arg("head_planes"), py::arg("rows"), py::arg("logits"),
           // Layers and caches are pointed at: they live as long as the step does.
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
      .def(
          "set_halting",
          [](StepRunner& self, float drift_threshold, bool relative, std::optional<float> entropy_threshold,
             int32_t sink_tokens, int64_t min_layer) {
            self.halting = {drift_threshold, relative, entropy_threshold.has_value(), entropy_threshold.value_or(0),
                            sink_tokens,     min_layer};
            self.step.halting = &self.halting;
          },
          py::arg("drift_threshold"), py::arg("relative"), py::arg("entropy_threshold"), py::arg("sink_tokens"),
          py::arg("min_layer"))
      .def(
          "set_amq",
          [](StepRunner& self, int64_t layer, float threshold, float full_entropy) {
            self.amq = {layer, threshold, full_entropy};
            self.step.amq = &self.amq;
          },
          py::arg("layer"), py::arg("threshold"), py::arg("full_entropy"))
      .def("run", &StepRunner::run, py::arg("ids"), py::arg("positions"), py::arg("sequence"),
           "Whether there was room in the caches.")
      .def_property_readonly("depth", [first](const StepRunner& self) { return first(self.depth, self.step.count); })
      .def_property_readonly("bits", [first](const StepRunner& self) { return first(self.bits, self.step.count); });
}

void bind_stages(py::module_& m) {
  m.def("attention_input", [](const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
    return maybe_without_gil(rows.count, [&] { return attention_input(layer, rows, cache, work); });
  });
  m.def("write_kv", [](const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
    return maybe_without_gil(rows.count, [&] { return write_kv(layer, rows, cache, work); });
  });
  m.def(
      "attention",
      [](const Layer& layer, const Rows& rows, const KvCache& cache, Workspace& work, Address log_sum_exp) {
        maybe_without_gil(rows.count, [&] { attention(layer, rows, cache, work, at<float>(log_sum_exp)); });
      },
      py::arg("layer"), py::arg("rows"), py::arg("cache"), py::arg("work"), py::arg("log_sum_exp") = 0);
  m.def("attention_output", [](const Layer& layer, const Rows& rows, Workspace& work) {
    maybe_without_gil(rows.count, [&] { attention_output(layer, rows, work); });
  });
  m.def("mlp_input", [](const Layer& layer, const Rows& rows, Workspace& work) {
    maybe_without_gil(rows.count, [&] { mlp_input(layer, rows, work); });
  });
  m.def("mlp_output", [](const Layer& layer, const Rows& rows, Workspace& work) {
    maybe_without_gil(rows.count, [&] { mlp_output(layer, rows, work); });
  });
  m.def("run_layers", [](const std::vector<const Layer*>& layers, const std::vector<KvCache*>& caches, const Rows& rows,
                         Workspace& work) {
    if (layers.size() != caches.size()) throw std::invalid_argument("layers and caches must be of one length");
    const py::gil_scoped_release release;
    return run_layers(layers.data(), caches.data(), static_cast<int64_t>(layers.size()), rows, work);
  });
  m.def("lm_head", [](const Norm& norm, const Linear& head, int32_t planes, const Rows& rows, int64_t d, Address logits,
                      int64_t logits_stride, Workspace& work) {
    maybe_without_gil(rows.count,
                      [&] { lm_head(norm, head, planes, rows, d, at<float>(logits), logits_stride, work); });
  });
  m.def("argmax", [](Address x, int64_t n) {
    if (x == 0 || n < 1) throw std::invalid_argument("argmax needs at least one value");
    return argmax(at<float>(x), n);
  });
  m.def("halt", [](Address hidden, int64_t stride, Address previous, int64_t previous_stride, int64_t d, Address active,
                   int64_t count, Address entropy, Address positions, Address overrides, float drift_threshold,
                   float entropy_threshold, bool relative, int32_t sink_tokens, Address drift, Address halted,
                   Address next_active) {
    HaltingUpdate p;
    p.hidden = at<float>(hidden);
    p.stride = stride;
    p.previous = at<float>(previous);
    p.previous_stride = previous_stride;
    p.previous_compact = true;
    p.d = d;
    p.active = at<int32_t>(active);
    p.count = count;
    p.entropy = at<float>(entropy);
    p.positions = at<int32_t>(positions);
    p.overrides = at<int8_t>(overrides);
    p.drift_threshold = drift_threshold;
    p.entropy_threshold = entropy_threshold;
    p.relative = relative;
    p.sink_tokens = sink_tokens;
    p.drift = at<float>(drift);
    p.halted = at<uint8_t>(halted);
    p.next_active = at<int32_t>(next_active);
    return halting_update(p);
  });
  m.def("softmax_entropy", [](Address x, int64_t stride, Address index, int64_t count, int64_t d, Address out) {
    softmax_entropy(at<float>(x), stride, at<int32_t>(index), count, d, at<float>(out));
  });
}

}  // namespace

void bind_runtime(py::module_& module) {
  bind_state(module);
  bind_structs(module);
  bind_stages(module);
  bind_step(module);
}

}  // namespace quicksilver
