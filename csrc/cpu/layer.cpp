// The stages of a decoder layer, each in one to three parallel regions.
#include "quicksilver/layer.h"

#include "kernels.h"
#include "norm.h"
#include "quantize.h"
#include "workers.h"

namespace quicksilver::QS_ISA {
namespace {

int64_t row_of(const Rows& rows, int64_t i) { return rows.active ? rows.active[i] : i; }

// A single row that needs no more than this is quantized by every share of a
// product for itself: cheaper than a region.
constexpr int64_t kOwnBytes = 48 * 1024;
struct Own {
  alignas(64) char bytes[kOwnBytes];
};

// The quantized rows of a stage: source_of(i) gives row i of k columns.
template <class SourceOf>
class Quantized {
 public:
  // Outside a parallel region.
  Quantized(int64_t count, int64_t k, const MatryoshkaWeight& weight, int planes, void* shared,
            const SourceOf& source_of)
      : own_(count == 1 && quantized_rows_bytes(1, k, weight.group, planes) <= kOwnBytes),
        k_(k),
        group_(weight.group),
        planes_(planes),
        shared_(carve_quantized_rows(shared, count, k, weight.group, planes)),
        source_of_(source_of) {
    if (own_) return;
    in_parallel(count, k * 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) quantize_row(shared_, i, source_of_(i));
    });
  }
  // Inside one: the rows, complete.
  QuantizedRows rows(Own& own) const {
    if (!own_) return shared_;
    const QuantizedRows out = carve_quantized_rows(own.bytes, 1, k_, group_, planes_);
    quantize_row(out, 0, source_of_(0));
    return out;
  }

 private:
  bool own_;
  int64_t k_;
  int32_t group_;
  int planes_;
  QuantizedRows shared_;
  const SourceOf& source_of_;
};

// A product that writes compact rows of its own width.
MatryoshkaGemm product(const Linear& linear, const QuantizedRows& x, const int32_t* bits, float* y) {
  MatryoshkaGemm gemm;
  gemm.x = x;
  gemm.w = linear.weight;
  gemm.bits = bits;
  gemm.bias = linear.bias;
  gemm.y = y;
  gemm.y_stride = linear.weight.n;
  return gemm;
}

// Only what gemm_count looks at.
QuantizedRows shape(int64_t count, const MatryoshkaWeight& weight) {
  QuantizedRows x;
  x.rows = count;
  x.k = weight.k;
  x.k_padded = (weight.k + 7) / 8 * 8;
  x.group = weight.group;
  x.groups = (weight.k + weight.group - 1) / weight.group;
  return x;
}

// bits of the active rows, or null
const int32_t* compact_bits(const Rows& rows, Workspace& work) {
  if (rows.bits == nullptr) return nullptr;
  for (int64_t i = 0; i < rows.count; ++i) work.bits[i] = rows.bits[row_of(rows, i)];
  return work.bits;
}

// Pairs (i, i + size / 2) of one head, turned.
void rotate(float* x, int64_t size, const float* cosine, const float* sine) {
  const int64_t half = size / 2;
  for (int64_t k = 0; k < half; k += 16) {
    const int n = half - k < 16 ? static_cast<int>(half - k) : 16;
    const f32x16 a = load(x + k, n), b = load(x + half + k, n), c = load(cosine + k, n), s = load(sine + k, n);
    store(x + k, a * c - b * s, n);
    store(x + half + k, b * c + a * s, n);
  }
}

// Norm, projections, rotary embedding, new cache entries; without the query
// where only entries are wanted.
bool project(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work, bool with_query) {
  if (rows.count <= 0) return true;
  work.reserve(layer, rows.count);
  const int64_t* slots = rows.slots;
  if (slots == nullptr) {
    if (!QS_ISA::kv_allocate(cache, rows.active, rows.count, rows.sequence, rows.positions, work.slots)) return false;
    slots = work.slots;
  }
  const int32_t* bits = compact_bits(rows, work);
  const int64_t size = layer.head_size;
  const int skip = with_query ? 0 : 1;
  const auto products = [&](const QuantizedRows& x, MatryoshkaGemm* gemms) {
    gemms[0] = product(layer.q, x, bits, work.q);
    gemms[1] = product(layer.k, x, bits, work.k);
    gemms[2] = product(layer.v, x, bits, work.v);
  };
  KvScatter scatter;
  scatter.key = work.k;
  scatter.value = work.v;
  scatter.key_stride = scatter.value_stride = layer.kv_heads * size;
  scatter.slots = slots;
  scatter.count = rows.count;
  scatter.cache = cache;

  const auto source = [&](int64_t i) {
    return norm_source(layer.attention_norm, rows.hidden + row_of(rows, i) * layer.d, layer.d);
  };
  const Quantized quantized(rows.count, layer.d, layer.k.weight, layer.attention_input_planes, work.quantized, source);
  on_all_threads([&](int worker, int workers) {
    if (with_query) {
      const Range part = split(rows.count, worker, workers);
      for (int64_t i = part.begin; i < part.end; ++i) {
        memcpy(work.previous + i * layer.d, rows.hidden + row_of(rows, i) * layer.d, static_cast<size_t>(layer.d) * 4);
      }
    }
    Own own;
    MatryoshkaGemm gemms[3];
    products(quantized.rows(own), gemms);
    gemm_worker(gemms + skip, 3 - skip, worker, workers);
  });

  const int64_t query_heads = with_query ? layer.heads : 0;
  const int64_t heads = query_heads + layer.kv_heads;
  in_parallel(rows.count * heads, size * 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / heads, head = item % heads - query_heads;
      float* x_head = head < 0 ? work.q + (i * layer.heads + head + query_heads) * size
                               : work.k + (i * layer.kv_heads + head) * size;
      if (layer.cosine) {
        const int64_t at = rows.positions[row_of(rows, i)] * (size / 2);
        rotate(x_head, size, layer.cosine + at, layer.sine + at);
      }
      if (head >= 0) kv_scatter_heads(scatter, i, head, head + 1);
    }
  });
  MatryoshkaGemm gemms[3];
  products(shape(rows.count, layer.k.weight), gemms);
  gemm_count(gemms + skip, 3 - skip);
  return true;
}

// hidden += linear(rows from source_of)
template <class SourceOf>
void add_product(const Linear& linear, int planes, const Rows& rows, int64_t d, Workspace& work,
                 const SourceOf& source_of) {
  const int32_t* bits = compact_bits(rows, work);
  const auto residual_product = [&](const QuantizedRows& x) {
    MatryoshkaGemm gemm = product(linear, x, bits, rows.hidden);
    gemm.residual = rows.hidden;
    gemm.y_stride = d;
    gemm.out_index = rows.active;
    return gemm;
  };
  const Quantized quantized(rows.count, linear.weight.k, linear.weight, planes, work.quantized, source_of);
  on_all_threads([&](int worker, int workers) {
    Own own;
    const MatryoshkaGemm gemm = residual_product(quantized.rows(own));
    gemm_worker(&gemm, 1, worker, workers);
  });
  const MatryoshkaGemm gemm = residual_product(shape(rows.count, linear.weight));
  gemm_count(&gemm, 1);
}

}  // namespace

bool attention_input(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
  return project(layer, rows, cache, work, true);
}

bool write_kv(const Layer& layer, const Rows& rows, KvCache& cache, Workspace& work) {
  return project(layer, rows, cache, work, false);
}

void attention(const Layer& layer, const Rows& rows, const KvCache& cache, Workspace& work, float* log_sum_exp) {
  Attention params;
  params.query = work.q;
  params.query_stride = layer.heads * layer.head_size;
  params.heads = layer.heads;
  params.count = rows.count;
  params.index = rows.active;
  params.query_positions = rows.positions;
  params.query_sequence = rows.sequence;
  params.scale = layer.attention_scale;
  params.cache = cache;
  params.out = work.attention;
  params.out_stride = layer.heads * layer.head_size;
  params.log_sum_exp = log_sum_exp;
  QS_ISA::compacted_attention(params);
}

void attention_output(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  const int64_t width = layer.heads * layer.head_size;
  add_product(layer.o, layer.attention_output_planes, rows, layer.d, work, [&](int64_t i) {
    const float* row = work.attention + i * width;
    return [row](int64_t k, int n) { return load(row + k, n); };
  });
}

void mlp_input(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  const int32_t* bits = compact_bits(rows, work);
  const int skip = layer.activation == Activation::silu_gated ? 0 : 1;
  const auto products = [&](const QuantizedRows& x, MatryoshkaGemm* gemms) {
    gemms[0] = product(layer.gate, x, bits, work.gate);
    gemms[1] = product(layer.up, x, bits, work.up);
  };
  const auto source = [&](int64_t i) {
    return norm_source(layer.mlp_norm, rows.hidden + row_of(rows, i) * layer.d, layer.d);
  };
  const Quantized quantized(rows.count, layer.d, layer.up.weight, layer.mlp_input_planes, work.quantized, source);
  on_all_threads([&](int worker, int workers) {
    Own own;
    MatryoshkaGemm gemms[2];
    products(quantized.rows(own), gemms);
    gemm_worker(gemms + skip, 2 - skip, worker, workers);
  });
  MatryoshkaGemm gemms[2];
  products(shape(rows.count, layer.up.weight), gemms);
  gemm_count(gemms + skip, 2 - skip);
}

void mlp_output(const Layer& layer, const Rows& rows, Workspace& work) {
  if (rows.count <= 0) return;
  if (layer.activation == Activation::silu_gated) {
    add_product(layer.down, layer.mlp_output_planes, rows, layer.d, work,
                [&](int64_t i) { return SiluSource{work.gate + i * layer.ffn, work.up + i * layer.ffn}; });
  } else {
    add_product(layer.down, layer.mlp_output_planes, rows, layer.d, work,
                [&](int64_t i) { return GeluSource{work.up + i * layer.ffn}; });
  }
}

void lm_head(const Norm& norm, const Linear& head, int32_t planes, const Rows& rows, int64_t d, float* logits,
             int64_t logits_stride, Workspace& work) {
  if (rows.count <= 0) return;
  const auto logits_product = [&](const QuantizedRows& x) {
    MatryoshkaGemm gemm = product(head, x, nullptr, logits);
    gemm.y_stride = logits_stride;
    return gemm;
  };
  const auto source = [&](int64_t i) { return norm_source(norm, rows.hidden + row_of(rows, i) * d, d); };
  const Quantized quantized(rows.count, d, head.weight, planes, work.quantized, source);
  on_all_threads([&](int worker, int workers) {
    Own own;
    const MatryoshkaGemm gemm = logits_product(quantized.rows(own));
    gemm_worker(&gemm, 1, worker, workers);
  });
  const MatryoshkaGemm gemm = logits_product(shape(rows.count, head.weight));
  gemm_count(&gemm, 1);
}

int64_t argmax(const float* x, int64_t n) {
  // Per lane: the largest so far, where its sixteen values began, and whether
  // all were numbers.
  f32x16 top = broadcast(-__builtin_inff());
  i32x16 where = broadcast(0), numbers = broadcast(-1);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 a = load(x + i);
    numbers = numbers & ordered(a);
    QS_PARTS(part) {
      const ni larger = a.v[part] > top.v[part];
      top.v[part] = larger ? a.v[part] : top.v[part];
      where.v[part] = larger ? broadcast_ni(static_cast<int32_t>(i)) : where.v[part];
    }
  }
  int64_t best = 0;
  float largest = i > 0 ? max_lane(top) : x[0];
  if (i > 0) {
    float values[16];
    int32_t starts[16];
    store(values, top);
    store(starts, where);
    best = n;
    for (int lane = 0; lane < 16; ++lane) {
      if (values[lane] == largest && starts[lane] + lane < best) best = starts[lane] + lane;
    }
  }
  bool nan = sum(numbers) != -16;
  for (; i < n; ++i) {
    if (x[i] > largest) {
      largest = x[i];
      best = i;
    }
    nan |= x[i] != x[i];
  }
  for (i = 0; nan && i < n; ++i) {
    if (x[i] != x[i]) return i;
  }
  return best;
}

}  // namespace quicksilver::QS_ISA
