// Shared memory with guards around it and, for each word, who touched it last.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace quicksilver::emulator {

// Asynchronous copies of a thread, which happen when it waits for them.
struct CopyQueue {
  struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    int group;
    Site site;
  };
  std::vector<Copy> copies;
  int groups = 0;  // committed so far
};

std::string describe(const Site& site);
bool same_place(const Site& a, const Site& b);

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();
  void start(int64_t bytes, int warps);
  void check_guards() const;  // throws

  unsigned char* data() const { return data_; }
  bool contains(const void* p) const {
    const auto* at = static_cast<const unsigned char*>(p);
    return at >= data_ && at < data_ + bytes_;
  }

  // Throw where the access is outside, unaligned, pending or a race.
  void access(Access access, int thread, const void* p, int bytes, const Site& site);
  void issue(CopyQueue& queue, int thread, void* to, const void* from, const Site& site);
  void finish(CopyQueue& queue, int thread, int groups_under_way);
  void forget(CopyQueue& queue);

  void block_barrier() { ++block_epoch_; }
  void warp_barrier(int warp) { ++warp_epochs_[static_cast<size_t>(warp)]; }

 private:
  // Two accesses by different threads are in order where a barrier came between them: they differ in the block's epoch
  // or, within a warp, in the warp's.
  struct Time {
    uint32_t block = 0, warp = 0;
  };
  struct Entry {
    Time written, read;
    uint16_t writer = 0, reader = 0;  // reader: a thread, or kLanesOf + a warp, or kManyWarps
    bool pending = false;             // a copy is on its way
    bool split = false;               // its bytes have entries of their own
    Site written_at, read_at;
  };
  struct Who {
    int thread;
    Time now;
    const Site& site;
  };

  Who who(int thread, const Site& site) const;
  bool good(const void* p, int bytes) const {
    const auto offset =
        static_cast<uint64_t>(static_cast<const unsigned char*>(p) - data_);  // huge where it is negative
    return offset < static_cast<uint64_t>(bytes_) &&
           offset + static_cast<uint64_t>(bytes) <= static_cast<uint64_t>(bytes_) &&
           offset % static_cast<uint64_t>(bytes) == 0;
  }
  [[noreturn]] void refuse(const void* p, int bytes, int thread, const char* what, const Site& site) const;
  template <class F>
  void for_entries(const void* p, int bytes, const F& f);
  void read(Entry& entry, const Who& who) const;
  void write(Entry& entry, const Who& who) const;
  [[noreturn]] void race(const Entry& entry, const Who& who, const char* does, bool with_writer) const;
  [[noreturn]] void pending(const Entry& entry, const Who& who) const;

  std::vector<unsigned char> memory_;
  unsigned char* data_ = nullptr;
  int64_t bytes_ = 0;
  std::vector<Entry> words_, bytes_of_words_;
  uint32_t block_epoch_ = 0;  // never goes back, so that a block finds no traces of the one before it
  std::vector<uint32_t> warp_epochs_;
};

}  // namespace quicksilver::emulator
