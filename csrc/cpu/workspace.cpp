// Work memory: compiled once, for all instruction sets.
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "quicksilver/layer.h"

namespace quicksilver {
namespace {

constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

int64_t padded(int64_t k) { return (k + 7) / 8 * 8; }

// What a workspace's memory begins with: the sizes of its buffers.
constexpr int kBuffers = 10;
struct Head {
  int64_t bytes[kBuffers];
};

}  // namespace

int64_t quantized_rows_bytes(int64_t rows, int64_t k, int32_t group) {
  const int64_t groups = (k + group - 1) / group;
  return aligned(rows * padded(k)) + 2 * aligned(rows * groups * 4);
}

QuantizedRows carve_quantized_rows(void* buffer, int64_t rows, int64_t k, int32_t group) {
  QuantizedRows out;
  out.rows = rows;
  out.k = k;
  out.k_padded = padded(k);
  out.group = group;
  out.groups = (k + group - 1) / group;
  char* next = static_cast<char*>(buffer);
  const auto take = [&next](int64_t bytes) {
    char* start = next;
    next += aligned(bytes);
    return start;
  };
  out.q = reinterpret_cast<int8_t*>(take(rows * out.k_padded));
  out.scale = reinterpret_cast<float*>(take(rows * out.groups * 4));
  out.sum = reinterpret_cast<int32_t*>(take(rows * out.groups * 4));
  return out;
}

Workspace::~Workspace() { std::free(memory_); }

void Workspace::reserve(const Layer& layer, int64_t count) {
  const int64_t query = layer.heads * layer.head_size;
  const int64_t key = layer.kv_heads * layer.head_size;
  int64_t widest = layer.d;
  for (int64_t columns : {query, layer.ffn}) widest = columns > widest ? columns : widest;
  const int64_t quantized_bytes = quantized_rows_bytes(count, widest, 32);  // the smallest groups want most
  const int64_t wanted[kBuffers] = {count * layer.d * 4, count * query * 4,     count * key * 4,       count * key * 4,
                                    count * query * 4,   count * layer.ffn * 4, count * layer.ffn * 4, count * 4,
                                    count * 8,           quantized_bytes};

  Head head{};
  if (memory_ != nullptr) head = *static_cast<const Head*>(memory_);
  bool grows = memory_ == nullptr;
  int64_t total = aligned(sizeof(Head));
  for (int i = 0; i < kBuffers; ++i) {
    if (aligned(wanted[i]) > head.bytes[i]) {
      head.bytes[i] = aligned(wanted[i]);
      grows = true;
    }
    total += head.bytes[i];
  }
  if (!grows) return;

  void* memory = std::aligned_alloc(kAlign, static_cast<size_t>(total));
  if (memory == nullptr) throw std::bad_alloc();
  *static_cast<Head*>(memory) = head;
  char* next = static_cast<char*>(memory) + aligned(sizeof(Head));
  const auto take = [&](auto*& pointer, int i) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
    next += head.bytes[i];
  };
  take(previous, 0);
  take(q, 1);
  take(k, 2);
  take(v, 3);
  take(attention, 4);
  take(gate, 5);
  take(up, 6);
  take(bits, 7);
  take(slots, 8);
  quantized = next;
  // In this order, so that a child that another thread forks meanwhile finds memory wherever it looks.
  std::atomic_thread_fence(std::memory_order_release);
  void* const before = memory_;
  memory_ = memory;
  bytes_ = total;
  std::free(before);
}

}  // namespace quicksilver
