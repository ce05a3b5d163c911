// Counts what the warps of a block ask of memory.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace quicksilver::emulator {

enum class RequestKind : uint8_t { global_load, global_store, shared_load, shared_store, cp_async };

class BlockCounter {
 public:
  BlockCounter(KernelCounts& counts, int warps) : counts_(counts), warps_(static_cast<size_t>(warps)) {}

  // Lanes come to an instruction one by one. The n-th access of a lane at a place in the source belongs to the same
  // request as the n-th ones of the other lanes there.
  void access(RequestKind kind, int warp, int lane, const void* p, int bytes, const Site& site);
  // A warp's load of `matrices` 8x8 matrices from these rows.
  void ldmatrix(const void* const* rows, int matrices);
  // At the end of the block: requests that not all lanes took part in.
  void close();

  KernelCounts& counts() { return counts_; }

 private:
  struct Request {
    uint32_t lanes = 0;
    uint64_t address[kLanes];
  };
  struct Place {
    RequestKind kind;
    int bytes = 0;
    uint64_t closed = 0;  // requests that are counted already
    uint64_t accesses[kLanes] = {};
    std::deque<Request> open;
  };
  struct Key {
    const char* file;
    uint32_t line, column;
    int kind_and_bytes;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return (reinterpret_cast<size_t>(key.file) ^ key.line * 0x9e3779b97f4a7c15u) +
             (key.column * 64u + static_cast<size_t>(key.kind_and_bytes)) * 0xc2b2ae3d27d4eb4fu;
    }
  };
  void count(const Place& place, const Request& request);

  KernelCounts& counts_;
  std::vector<std::unordered_map<Key, Place, Hash>> warps_;
};

void add(KernelCounts& to, const KernelCounts& from);

}  // namespace quicksilver::emulator
