#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <utility>

namespace profiler {
namespace {

const std::vector<std::pair<std::string, Kernel>>& kernels() {
  static const std::vector<std::pair<std::string, Kernel>> all = {{"quantize_rows", Kernel::quantize_rows},
                                                                  {"matryoshka_gemm", Kernel::matryoshka_gemm},
                                                                  {"kv_scatter", Kernel::kv_scatter},
                                                                  {"halting_update", Kernel::halting_update},
                                                                  {"fusion_groups", Kernel::fusion_groups},
                                                                  {"fusion_reduce", Kernel::fusion_reduce},
                                                                  {"attention_input", Kernel::attention_input},
                                                                  {"attention", Kernel::attention},
                                                                  {"attention_output", Kernel::attention_output},
                                                                  {"mlp_input", Kernel::mlp_input},
                                                                  {"mlp_output", Kernel::mlp_output},
                                                                  {"lm_head", Kernel::lm_head},
                                                                  {"decode", Kernel::decode},
                                                                  {"prefill", Kernel::prefill}};
  return all;
}

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {{"demo", 30, 576, 9, 3, 64, 1536, 49152, true},
                                         {"gpt2", 12, 768, 12, 12, 64, 3072, 50257, false},
                                         {"gpt2-large", 36, 1280, 20, 20, 64, 5120, 50257, false},
                                         {"llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, true}};
  return all;
}

template <class Item, class Name>
std::string listed(const std::vector<Item>& items, const Name& name) {
  std::string text;
  for (const Item& item : items) text += (text.empty() ? "" : ", ") + name(item);
  return text;
}

std::string one_of(const std::string& option, const std::string& value, const std::vector<std::string>& known) {
  for (const std::string& word : known) {
    if (value == word) return value;
  }
  throw UsageError(option + ": got '" + value + "', wanted one of " +
                   listed(known, [](const std::string& word) { return word; }));
}

int64_t integer(const std::string& option, const std::string& value, int64_t least) {
  size_t end = 0;
  long long number = 0;
  try {
    number = std::stoll(value, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != value.size() || number < least) {
    throw UsageError(option + ": got '" + value + "', wanted an integer of at least " + std::to_string(least));
  }
  return number;
}

double share(const std::string& option, const std::string& value, double most) {
  size_t end = 0;
  double number = 0;
  try {
    number = std::stod(value, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != value.size() || !(number >= 0 && number <= most)) {
    throw UsageError(option + ": got '" + value + "', wanted a number from 0 to " + (most == 1 ? "1" : "0.75"));
  }
  return number;
}

void check_shape(const Shape& s) {
  if (s.heads % s.kv_heads != 0) throw UsageError("--heads must be a multiple of --kv-heads");
  if (s.head_size % 2 != 0) throw UsageError("--head-size must be even");
}

}  // namespace

int64_t Arguments::active_rows() const { return rows - std::llround(halting_ratio * static_cast<double>(rows)); }
// At most four rows go to a group.
int64_t Arguments::fused_rows() const {
  return std::max<int64_t>((rows + 3) / 4, rows - std::llround(fusion_ratio * static_cast<double>(rows)));
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments a;
  bool kernel_given = false, rows_given = false, sequences_given = false, context_given = false, share_given = false;
  std::string shape = "demo", family;
  std::vector<std::pair<int64_t Shape::*, int64_t>> sizes;

  const auto size_option = [&](int64_t Shape::* field) {
    return [&sizes, field](const std::string& option, const std::string& value) {
      sizes.emplace_back(field, integer(option, value, 1));
    };
  };
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> valued = {
      {"--backend", [&](auto& o, auto& v) { a.backend = one_of(o, v, {"cpu", "cuda", "emulated"}); }},
      {"--shape",
       [&](auto& o, auto& v) {
         std::vector<std::string> names;
         for (const Shape& s : shapes()) names.push_back(s.name);
         shape = one_of(o, v, names);
       }},
      {"--family", [&](auto& o, auto& v) { family = one_of(o, v, {"llama", "gpt2"}); }},
      {"--layers", size_option(&Shape::layers)},
      {"--d", size_option(&Shape::d)},
      {"--heads", size_option(&Shape::heads)},
      {"--kv-heads", size_option(&Shape::kv_heads)},
      {"--head-size", size_option(&Shape::head_size)},
      {"--ffn", size_option(&Shape::ffn)},
      {"--vocab", size_option(&Shape::vocab)},
      {"--group",
       [&](auto& o, auto& v) { sizes.emplace_back(&Shape::group, integer(o, one_of(o, v, {"32", "64", "128"}), 1)); }},
      {"--matrix",
       [&](auto& o, auto& v) { a.matrix = one_of(o, v, {"q", "k", "v", "o", "gate", "up", "down", "head"}); }},
      {"--rows", [&](auto& o, auto& v) { a.rows = integer(o, v, 1), rows_given = true; }},
      {"--sequences", [&](auto& o, auto& v) { a.sequences = integer(o, v, 1), sequences_given = true; }},
      {"--context", [&](auto& o, auto& v) { a.context = integer(o, v, 0), context_given = true; }},
      {"--halting-ratio", [&](auto& o, auto& v) { a.halting_ratio = share(o, v, 1); }},
      {"--fusion-ratio", [&](auto& o, auto& v) { a.fusion_ratio = share(o, v, 0.75); }},
      {"--int4-share", [&](auto& o, auto& v) { a.int4_share = share(o, v, 1), share_given = true; }},
      {"--precision", [&](auto& o, auto& v) { a.precision = one_of(o, v, {"int8", "int4", "adaptive"}); }},
      {"--kv-type",
       [&](auto& o, auto& v) {
         const std::vector<std::string> names = {"f32", "f16", "bf16", "i8"};
         a.kv_type_name = one_of(o, v, names);
         for (size_t i = 0; i < names.size(); ++i) {
           if (v == names[i]) a.kv_type = static_cast<quicksilver::KvType>(i);
         }
       }},
      {"--threads", [&](auto& o, auto& v) { a.threads = integer(o, v, 1); }},
      {"--warmup", [&](auto& o, auto& v) { a.warmup = integer(o, v, 0); }},
      {"--repeat", [&](auto& o, auto& v) { a.repeat = integer(o, v, 1); }},
      {"--seed", [&](auto& o, auto& v) { a.seed = integer(o, v, 0); }},
      {"--json", [&](auto&, auto& v) { a.json = v; }},
  };
  for (size_t i = 0; i < words.size(); ++i) {
    std::string option = words[i], value;
    if (option == "--help" || option == "-h") {
      a.help = true;
      return a;
    }
    if (option == "--cold-cache") {
      a.cold_cache = true;
      continue;
    }
    if (option == "--no-check") {
      a.check = false;
      continue;
    }
    if (option.rfind("--", 0) != 0) {
      if (kernel_given) throw UsageError("more than one kernel: '" + a.kernel_name + "' and '" + option + "'");
      for (const auto& [name, kernel] : kernels()) {
        if (name != option) continue;
        a.kernel = kernel;
        a.kernel_name = name;
        kernel_given = true;
      }
      if (!kernel_given) {
        throw UsageError("unknown kernel '" + option + "', wanted one of " +
                         listed(kernels(), [](const auto& item) { return item.first; }));
      }
      continue;
    }
    const size_t equals = option.find('=');
    const bool joined = equals != std::string::npos;
    if (joined) {
      value = option.substr(equals + 1);
      option.resize(equals);
    }
    const auto found = valued.find(option);
    if (found == valued.end()) throw UsageError("unknown option '" + option + "'");
    if (!joined) {
      if (++i == words.size()) throw UsageError(option + " wants a value");
      value = words[i];
    }
    found->second(option, value);
  }
  if (!kernel_given) {
    throw UsageError("no kernel given, wanted one of " +
                     listed(kernels(), [](const auto& item) { return item.first; }));
  }

  for (const Shape& s : shapes()) {
    if (s.name == shape) a.shape = s;
  }
  for (const auto& [field, value] : sizes) a.shape.*field = value;
  if (!family.empty()) a.shape.llama = family == "llama";
  if (!sizes.empty() || !family.empty()) a.shape.name += ", changed";
  check_shape(a.shape);
  const bool fusing = a.kernel == Kernel::fusion_groups || a.kernel == Kernel::fusion_reduce;
  const bool prompt = a.kernel == Kernel::prefill || fusing;
  if (!rows_given && prompt) a.rows = 128;
  if (!sequences_given) a.sequences = prompt ? 1 : a.rows;
  if (a.rows % a.sequences != 0) throw UsageError("--rows must be a multiple of --sequences");
  if (a.kernel == Kernel::decode && a.sequences != a.rows) throw UsageError("decode has a row for each sequence");
  if (a.fusion_ratio > 0 && (!prompt || a.sequences != 1)) {
    throw UsageError("--fusion-ratio wants prefill, fusion_groups or fusion_reduce, and one sequence");
  }
  if (a.fusion_ratio > 0 && a.halting_ratio > 0)
    throw UsageError("--fusion-ratio and --halting-ratio: give one of them");
  if (a.halting_ratio > 0 && fusing) throw UsageError("--halting-ratio: fusion looks at all rows");
  if (!context_given && a.kernel != Kernel::prefill) a.context = 128;
  if (a.precision == "adaptive" && !share_given) a.int4_share = 0.5;
  if (a.precision != "adaptive" && share_given) throw UsageError("--int4-share wants --precision adaptive");
  if (a.matrix == "gate" && !a.shape.llama) throw UsageError("--matrix gate: GPT-2's MLP has no gate");
  return a;
}

std::string usage() {
  return "usage: quicksilver_profile KERNEL [options]\n\n"
         "Runs a kernel, a stage of a layer, or a whole step on random data, times it and checks its answer.\n"
         "KERNEL is one of " +
         listed(kernels(), [](const auto& item) { return item.first; }) +
         ".\n\n"
         "  --backend cpu|cuda|emulated      (cpu)\n"
         "  --shape NAME                     " +
         listed(shapes(), [](const Shape& s) { return s.name; }) +
         " (demo)\n"
         "  --layers --d --heads --kv-heads --head-size --ffn --vocab --group N, --family llama|gpt2\n"
         "                                   change the shape\n"
         "  --matrix q|k|v|o|gate|up|down|head   of matryoshka_gemm (up)\n"
         "  --rows N                         tokens (1; 128 for prefill and fusion)\n"
         "  --sequences N                    that they belong to, evenly (one each; 1 for prefill and fusion)\n"
         "  --context N                      entries of each sequence in the cache already (128; prefill 0)\n"
         "  --halting-ratio X                share of rows that halted before the kernel; in a step, after half of the "
         "layers\n"
         "  --fusion-ratio X                 share of rows fused away, up to 0.75; in prefill, after half of the "
         "layers\n"
         "  --precision int8|int4|adaptive   (int8), --int4-share X: rows of 4 bits where adaptive (0.5)\n"
         "  --kv-type f32|f16|bf16|i8        (f32)\n"
         "  --threads N                      of the cpu backend\n"
         "  --warmup N (3) --repeat N (20)\n"
         "  --cold-cache                     writes over the last-level cache before every run\n"
         "  --no-check                       doesn't compare the answer with a plain computation\n"
         "  --seed N (1)\n"
         "  --json FILE|-                    writes the figures as JSON\n\n"
         "Exit 0; 1 where the answer is wrong; 2 for a mistake in the options.\n";
}

}  // namespace profiler
