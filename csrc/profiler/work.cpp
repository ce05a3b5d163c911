// What a run must do at least, from shapes alone.
#include <algorithm>
#include <initializer_list>

#include "problem.h"

namespace profiler {
namespace {

Work& operator+=(Work& total, const Work& part) {
  total.bytes += part.bytes;
  total.multiply_adds += part.multiply_adds;
  return total;
}

// A product of `count` rows, `eight` of which use all bits: planes, scales, offsets and bias, once.
Work product(const Linear& linear, int64_t count, bool eight) {
  const MatryoshkaWeight& w = linear.weight;
  const double plane = double(w.n) * double((w.k + 7) / 8) * 4;
  Work work;
  work.bytes = plane * (eight && w.lo != nullptr ? 2 : 1) + double(w.n) * double((w.k + w.group - 1) / w.group) * 4 +
               (linear.bias != nullptr ? double(w.n) * 4 : 0);
  work.multiply_adds = double(count) * double(w.n) * double(w.k);
  return work;
}

double element_bytes(KvType type) { return type == KvType::f32 ? 4 : type == KvType::i8 ? 1 : 2; }

}  // namespace

// who: the rows that take part
Work Problem::stage_work(Kernel stage, const std::vector<int32_t>& who) const {
  const Layer& at = layers[0];
  const auto n = static_cast<double>(who.size());
  const bool eight =
      std::any_of(who.begin(), who.end(), [&](int32_t row) { return bits[static_cast<size_t>(row)] == 8; });
  const double d = double(at.d), query = double(at.heads * at.head_size), key = double(at.kv_heads * at.head_size);
  const double vector = double(at.head_size) * element_bytes(arguments.kv_type) +
                        (arguments.kv_type == KvType::i8 ? 4 : 0);  // one head of one entry, key or value
  Work work;
  const auto add = [&](std::initializer_list<const Linear*> all) {
    for (const Linear* linear : all) work += product(*linear, static_cast<int64_t>(who.size()), eight);
  };
  if (who.empty()) return work;
  switch (stage) {
    case Kernel::attention_input:  // reads hidden; keeps it; writes q, k, v and the entries
      add({&at.q, &at.k, &at.v});
      work.bytes += n * (2 * d + query + 2 * key) * 4 + n * 2 * double(at.kv_heads) * vector;
      break;
    case Kernel::attention: {
      std::vector<int64_t> entries(static_cast<size_t>(arguments.sequences), 0);
      double pairs = 0, read = 0;
      for (const int32_t row : who) {
        int64_t& visible = entries[static_cast<size_t>(sequence[static_cast<size_t>(row)])];
        if (visible == 0) visible = arguments.context;
        pairs += double(++visible);  // rows of a sequence come in order, and see themselves
      }
      for (const int64_t visible : entries) read += double(visible);
      work.bytes = n * 2 * query * 4 + read * (2 * double(at.kv_heads) * vector + 4);
      work.multiply_adds = pairs * double(at.heads) * 2 * double(at.head_size);
      break;
    }
    case Kernel::attention_output:
      add({&at.o});
      work.bytes += n * (query + 2 * d) * 4;
      break;
    case Kernel::mlp_input:
      add({&at.up});
      if (at.activation == Activation::silu_gated) add({&at.gate});
      work.bytes += n * (d + double(at.ffn)) * 4;
      break;
    default:
      add({&at.down});
      work.bytes += n * (double(at.ffn) + 2 * d) * 4 + (arguments.halting_ratio > 0 ? n * d * 4 : 0);
      break;
  }
  return work;
}

Work Problem::head_work(int64_t rows_of_head) const {
  Work work = product(head, rows_of_head, true);
  work.bytes += double(rows_of_head) * double(arguments.shape.d + arguments.shape.vocab) * 4;
  return work;
}

Work Problem::work() const {
  const Arguments& a = arguments;
  const auto n = static_cast<double>(taking_part.size());
  const double d = double(a.shape.d), all = double(a.rows);
  Work work;
  switch (a.kernel) {
    case Kernel::quantize_rows:
      work.bytes = n * (d * (4 + 1) + double(quantized.groups) * 8);
      break;
    case Kernel::matryoshka_gemm: {
      const bool eight = gemm.bits == nullptr || std::any_of(taking_part.begin(), taking_part.end(), [&](int32_t row) {
                           return bits[static_cast<size_t>(row)] == 8;
                         });
      work = product({gemm.w, gemm.bias}, static_cast<int64_t>(taking_part.size()), eight);
      work.bytes += n * (double(quantized.k_padded) + double(quantized.groups) * 8 + double(gemm.w.n) * 4);
      break;
    }
    case Kernel::kv_scatter: {
      const double vector =
          double(a.shape.head_size) * (4 + element_bytes(a.kv_type)) + (a.kv_type == KvType::i8 ? 4 : 0);
      work.bytes = n * 2 * double(a.shape.kv_heads) * vector;
      break;
    }
    case Kernel::halting_update:
      work.bytes = n * 2 * d * 4;
      break;
    case Kernel::fusion_groups:
      work.bytes = all * d * 4;
      break;
    case Kernel::fusion_reduce:
      work.bytes = (all + double(a.fused_rows())) * d * 4;
      break;
    case Kernel::lm_head:
      return head_work(static_cast<int64_t>(taking_part.size()));
    case Kernel::decode:
    case Kernel::prefill: {
      std::vector<int32_t> fused_tokens;
      for (int64_t g = 0; g < a.fused_rows(); ++g) {
        fused_tokens.push_back(static_cast<int32_t>((g + 1) * a.rows / a.fused_rows() - 1));
      }
      for (size_t l = 0; l < layers.size(); ++l) {
        const std::vector<int32_t>& who = l < halting_layer()  ? taking_part
                                          : a.fusion_ratio > 0 ? fused_tokens
                                                               : survivors;
        for (const Kernel stage : {Kernel::attention_input, Kernel::attention, Kernel::attention_output,
                                   Kernel::mlp_input, Kernel::mlp_output}) {
          work += stage_work(stage, who);
        }
        if (a.fusion_ratio > 0 && l == halting_layer()) work.bytes += (2 * all + double(a.fused_rows())) * d * 4;
      }
      work += head_work(a.kernel == Kernel::prefill ? 1 : a.rows);
      break;
    }
    default:
      return stage_work(a.kernel, taking_part);
  }
  return work;
}

}  // namespace profiler
