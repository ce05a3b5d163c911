// pybind11 bindings of the torch-free runtime. Tensors come in as addresses (Tensor.data_ptr()), 0 being null: the
// decoder owns them, has checked them, and may make 150 of these calls in a step of a few milliseconds.
#include "quicksilver/runtime.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "quicksilver/ceilings.h"
#include "quicksilver/decode_step.h"
#include "quicksilver/halting.h"
#include "quicksilver/layer.h"
#include "quicksilver/sampling.h"

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
constexpr Names<Activation, 4> kActivations{"activation", {"silu_gated", "gelu_tanh", "gelu", "relu"}};
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
      .def(py::init([](Address hi, Address lo, Address scale, Address offset, int64_t n, int64_t k, int32_t group) {
             if (hi == 0 || scale == 0 || offset == 0) {
               throw std::invalid_argument("hi, scale and offset must not be null");
             }
             if (n < 1 || k < 1) throw std::invalid_argument("n and k must be at least 1");
             if (group != 32 && group != 64 && group != 128) {
               throw std::invalid_argument("group must be 32, 64 or 128, not " + std::to_string(group));
             }
             return MatryoshkaWeight{
                 at<uint8_t>(hi), at<uint8_t>(lo), at<uint16_t>(scale), at<uint16_t>(offset), n, k, group};
           }),
           py::arg("hi"), py::arg("lo"), py::arg("scale"), py::arg("offset"), py::arg("n"), py::arg("k"),
           py::arg("group"))
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
      .def_readwrite("attention_scale", &Layer::attention_scale);
  const auto head_norm = [&layer](const char* name, Norm Layer::* member) {
    layer.def_property(
        name, [member](const Layer& self) { return self.*member; },
        [member, name](Layer& self, const Norm& norm) {
          if (norm.kind != NormKind::rms) throw std::invalid_argument(std::string(name) + " must be of kind 'rms'");
          self.*member = norm;
        });
  };
  head_norm("q_norm", &Layer::q_norm);
  head_norm("k_norm", &Layer::k_norm);
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
      .def_readwrite("sequences", &KvCache::sequences)
      .def_readwrite("window", &KvCache::window);
  def_address(cache, "key", &KvCache::key);
  def_address(cache, "value", &KvCache::value);
  def_address(cache, "key_scale", &KvCache::key_scale);
  def_address(cache, "value_scale", &KvCache::value_scale);
  def_address(cache, "block_table", &KvCache::block_table);
  def_address(cache, "lengths", &KvCache::lengths);
  def_address(cache, "positions", &KvCache::positions);
  def_address(cache, "until", &KvCache::until);
  def_address(cache, "blocks_used", &KvCache::blocks_used);
  def_address(cache, "free_blocks", &KvCache::free_blocks);
  def_address(cache, "overflow", &KvCache::overflow);

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

// A decode step of a model, with the memory that it works in: for any caches and number of rows.
class StepRunner {
 public:
  StepRunner(const py::list& layers, Address embedding, Address position_embedding, const Norm& final_norm,
             const Linear& head)
      : owner_(layers), layers_(pointers<const Layer>(owner_, "layers")) {
    if (layers_.empty()) throw std::invalid_argument("layers must not be empty");
    if (embedding == 0) throw std::invalid_argument("embedding must not be null");
    step_.layers = layers_.data();
    step_.layer_count = static_cast<int64_t>(layers_.size());
    step_.embedding = at<uint16_t>(embedding);
    step_.position_embedding = at<float>(position_embedding);
    step_.final_norm = final_norm;
    step_.head = head;
  }
  StepRunner(const StepRunner&) = delete;

  void set_halting(float drift_threshold, bool relative, std::optional<float> entropy_threshold, int32_t sink_tokens,
                   int64_t min_layer) {
    halting_ = {drift_threshold, relative, entropy_threshold.has_value(), entropy_threshold.value_or(0),
                sink_tokens,     min_layer};
    step_.halting = &halting_;
  }
  void set_amq(int64_t layer, float threshold, float full_entropy, int32_t sink_tokens) {
    amq_ = {layer, threshold, full_entropy, sink_tokens};
    step_.amq = &amq_;
  }

  bool run(const py::list& caches, const std::vector<int64_t>& ids, const std::vector<int32_t>& positions,
           const std::vector<int32_t>& sequence, Address logits, bool log) {
    const size_t count = ids.size(), layers = layers_.size();
    if (ids.empty() || positions.size() != count || sequence.size() != count) {
      throw std::invalid_argument("ids, positions and sequence must be of one length, and not empty");
    }
    if (logits == 0) throw std::invalid_argument("logits must not be null");
    const py::tuple held(caches);  // the list may change while others have the GIL
    const std::vector<KvCache*> all = pointers<KvCache>(held, "caches");
    if (all.size() != layers) throw std::invalid_argument("caches must be as many as layers");
    const auto grow = [](auto& values, size_t size) {
      if (values.size() < size) values.resize(size);
      return values.data();
    };
    step_.caches = all.data();
    step_.count = static_cast<int64_t>(count);
    step_.ids = ids.data();
    step_.positions = positions.data();
    step_.sequence = sequence.data();
    step_.hidden = grow(hidden_, count * static_cast<size_t>(layers_[0]->d));
    step_.active = grow(active_, count);
    step_.bits = grow(bits_, count);
    step_.depth = grow(depth_, count);
    step_.logits = at<float>(logits);
    step_.drift = log ? grow(drift_, layers * count) : nullptr;
    step_.entropy = log ? grow(entropy_, layers * count) : nullptr;
    if (step_.amq == nullptr) std::fill_n(step_.bits, count, 8);
    const py::gil_scoped_release release;
    return decode_step(step_, work_);
  }

  std::vector<int32_t> depth() const { return first(depth_.begin()); }
  std::vector<int32_t> bits() const { return first(bits_.begin()); }
  std::vector<std::vector<float>> drift() const { return lines(step_.drift); }
  std::vector<std::vector<float>> entropy() const { return lines(step_.entropy); }

 private:
  template <typename T>
  static std::vector<T*> pointers(const py::tuple& objects, const char* what) {
    std::vector<T*> result;
    result.reserve(objects.size());
    for (const py::handle object : objects) {
      result.push_back(object.cast<T*>());
      if (result.back() == nullptr) throw std::invalid_argument(std::string(what) + " must not hold None");
    }
    return result;
  }
  // The rows of the last run.
  std::vector<int32_t> first(std::vector<int32_t>::const_iterator begin) const { return {begin, begin + step_.count}; }
  std::vector<std::vector<float>> lines(const float* log) const {
    std::vector<std::vector<float>> result;
    for (int64_t layer = 0; log != nullptr && layer < step_.layer_count; ++layer) {
      result.emplace_back(log + layer * step_.count, log + (layer + 1) * step_.count);
    }
    return result;
  }

  py::tuple owner_;  // of the layers, which are pointed at
  std::vector<const Layer*> layers_;
  std::vector<float> hidden_, drift_, entropy_;
  std::vector<int32_t> active_, bits_, depth_;
  StepHalting halting_;
  StepAmq amq_;
  Workspace work_;
  DecodeStep step_;
};

void bind_step(py::module_& m) {
  py::class_<StepRunner>(m, "DecodeStep")
      .def(py::init<const py::list&, Address, Address, const Norm&, const Linear&>(), py::arg("layers"),
           py::arg("embedding"), py::arg("position_embedding"), py::arg("final_norm"), py::arg("head"))
      .def("set_halting", &StepRunner::set_halting, py::arg("drift_threshold"), py::arg("relative"),
           py::arg("entropy_threshold"), py::arg("sink_tokens"), py::arg("min_layer"))
      .def("set_amq", &StepRunner::set_amq, py::arg("layer"), py::arg("threshold"), py::arg("full_entropy"),
           py::arg("sink_tokens"))
      .def("run", &StepRunner::run, py::arg("caches"), py::arg("ids"), py::arg("positions"), py::arg("sequence"),
           py::arg("logits"), py::arg("log") = false, "Whether there was room in the caches.")
      .def_property_readonly("depth", &StepRunner::depth)
      .def_property_readonly("bits", &StepRunner::bits)
      .def_property_readonly("drift", &StepRunner::drift)
      .def_property_readonly("entropy", &StepRunner::entropy);
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
  m.def("lm_head", [](const Norm& norm, const Linear& head, const Rows& rows, int64_t d, Address logits,
                      int64_t logits_stride, Workspace& work) {
    maybe_without_gil(rows.count, [&] { lm_head(norm, head, rows, d, at<float>(logits), logits_stride, work); });
  });
  m.def("argmax", [](Address x, int64_t n) {
    if (x == 0 || n < 1) throw std::invalid_argument("argmax needs at least one value");
    return argmax(at<float>(x), n);
  });
  m.def("sample", [](Address x, int64_t n, float temperature, int64_t top_k, float top_p, double point) {
    if (x == 0 || n < 1) throw std::invalid_argument("sample needs at least one value");
    if (!(temperature > 0) || top_k < 0 || !(top_p >= 0) || !(point >= 0 && point < 1)) {
      throw std::invalid_argument("sample wants a temperature above 0, top_k and top_p from 0, a point in [0, 1)");
    }
    const py::gil_scoped_release release;
    return sample(at<float>(x), n, {temperature, top_k, top_p}, point);
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
