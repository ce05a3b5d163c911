#include "shared.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "sanitizer.h"

namespace quicksilver::emulator {
namespace {

constexpr size_t kGuard = 1024, kAlignment = 128, kWord = 4;
constexpr unsigned char kGuardByte = 0xa5, kPoison = 0xff;
constexpr uint16_t kLanesOf = 1024, kManyWarps = kLanesOf + 32;

std::string thread_name(int thread) { return "thread " + std::to_string(thread); }

}  // namespace

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash == nullptr ? site.file_name() : slash + 1) + ":" + std::to_string(site.line());
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

SharedMemory::~SharedMemory() { unpoison(memory_.data(), memory_.size()); }

void SharedMemory::start(int64_t bytes, int warps) {
  const auto size = static_cast<size_t>(bytes);
  unpoison(memory_.data(), memory_.size());
  if (memory_.size() < size + 2 * kGuard + kAlignment) memory_.resize(size + 2 * kGuard + kAlignment);
  const auto start = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
  data_ = memory_.data() + kGuard + (kAlignment - start % kAlignment) % kAlignment;
  bytes_ = bytes;
  std::memset(data_ - kGuard, kGuardByte, kGuard);
  std::memset(data_, kPoison, size);
  std::memset(data_ + size, kGuardByte, kGuard);
  poison(data_ - kGuard, kGuard);
  poison(data_ + size, kGuard);
  words_.resize(std::max(words_.size(), size / kWord + 1));
  if (!bytes_of_words_.empty()) bytes_of_words_.resize(words_.size() * kWord);
  warp_epochs_.resize(std::max(warp_epochs_.size(), static_cast<size_t>(warps)), 0);
  ++block_epoch_;
}

void SharedMemory::check_guards() const {
  unpoison(data_ - kGuard, kGuard);
  unpoison(data_ + bytes_, kGuard);
  const auto written = [](unsigned char byte) { return byte != kGuardByte; };
  const unsigned char* end = data_ + bytes_;
  const unsigned char* after = std::find_if(end, end + kGuard, written);
  const unsigned char* before = std::find_if(data_ - kGuard, data_, written);
  if (after != end + kGuard || before != data_) {
    throw std::runtime_error("something wrote outside of the " + std::to_string(bytes_) +
                             " bytes of shared memory, not through store_shared, at byte " +
                             std::to_string((before != data_ ? before : after) - data_));
  }
}

SharedMemory::Who SharedMemory::who(int thread, const Site& site) const {
  return {thread, {block_epoch_, warp_epochs_[static_cast<size_t>(thread / kLanes)]}, site};
}

void SharedMemory::refuse(const void* p, int bytes, int thread, const char* what, const Site& site) const {
  const auto offset = static_cast<int64_t>(reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(data_));
  const bool inside = offset >= 0 && offset + bytes <= bytes_;
  throw std::runtime_error(std::string(what) + " by " + thread_name(thread) + " at " + describe(site) + " of " +
                           std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
                           (inside ? ", which isn't a multiple of them, of " : ", outside of ") + "the " +
                           std::to_string(bytes_) + " bytes of shared memory");
}

template <class F>
void SharedMemory::for_entries(const void* p, int bytes, const F& f) {
  const auto first = static_cast<size_t>(static_cast<const unsigned char*>(p) - data_);
  const size_t end = first + static_cast<size_t>(bytes);
  for (size_t w = first / kWord; w * kWord < end; ++w) {
    Entry& word = words_[w];
    if (!word.split && static_cast<size_t>(bytes) >= kWord) {
      f(word);
      continue;
    }
    if (!word.split) {
      bytes_of_words_.resize(words_.size() * kWord);
      std::fill_n(bytes_of_words_.begin() + static_cast<std::ptrdiff_t>(w * kWord), kWord, word);
      word.split = true;
    }
    for (size_t i = std::max(first, w * kWord); i < std::min(end, (w + 1) * kWord); ++i) f(bytes_of_words_[i]);
  }
}

void SharedMemory::race(const Entry& entry, const Who& who, const char* does, bool with_writer) const {
  const uint16_t other = with_writer ? entry.writer : entry.reader;
  const std::string name = other == kManyWarps ? "several warps"
                           : other >= kLanesOf ? "several lanes of warp " + std::to_string(other - kLanesOf)
                                               : thread_name(other);
  const bool same_warp =
      other < kLanesOf ? other / kLanes == who.thread / kLanes : other - kLanesOf == who.thread / kLanes;
  throw std::runtime_error("race on shared memory: " + thread_name(who.thread) + " " + does + " at " +
                           describe(who.site) + " what " + name + (with_writer ? " wrote at " : " read at ") +
                           describe(with_writer ? entry.written_at : entry.read_at) + ", without " +
                           (same_warp ? "sync_warp" : "sync_block") + " in between");
}

void SharedMemory::pending(const Entry& entry, const Who& who) const {
  throw std::runtime_error(thread_name(who.thread) + " uses shared memory at " + describe(who.site) +
                           " that is the destination of an asynchronous copy of " + thread_name(entry.writer) + " at " +
                           describe(entry.written_at) + ", which wasn't waited for");
}

void SharedMemory::read(Entry& entry, const Who& who) const {
  if (entry.pending) pending(entry, who);
  const int warp = who.thread / kLanes;
  if (entry.written.block == who.now.block && entry.writer != who.thread &&
      (entry.writer / kLanes != warp || entry.written.warp == who.now.warp)) {
    race(entry, who, "reads", true);
  }
  if (entry.read.block == who.now.block && entry.reader != who.thread) {
    const int reader_warp = entry.reader < kLanesOf ? entry.reader / kLanes : entry.reader - kLanesOf;
    if (reader_warp != warp) {
      entry.reader = kManyWarps;
      return;  // no access by any thread is in order with all of them
    }
    if (entry.read.warp == who.now.warp) {
      entry.reader = static_cast<uint16_t>(kLanesOf + warp);
      return;
    }
  }
  entry.reader = static_cast<uint16_t>(who.thread);
  entry.read = who.now;
  entry.read_at = who.site;
}

void SharedMemory::write(Entry& entry, const Who& who) const {
  if (entry.pending) pending(entry, who);
  const int warp = who.thread / kLanes;
  if (entry.written.block == who.now.block && entry.writer != who.thread &&
      (entry.writer / kLanes != warp || entry.written.warp == who.now.warp)) {
    race(entry, who, "writes", true);
  }
  if (entry.read.block == who.now.block && entry.reader != who.thread) {
    const int reader_warp = entry.reader < kLanesOf ? entry.reader / kLanes : entry.reader - kLanesOf;
    if (reader_warp != warp || entry.read.warp == who.now.warp) race(entry, who, "writes", false);
  }
  entry.writer = static_cast<uint16_t>(who.thread);
  entry.written = who.now;
  entry.written_at = who.site;
}

void SharedMemory::access(Access access, int thread, const void* p, int bytes, const Site& site) {
  if (!good(p, bytes)) refuse(p, bytes, thread, access == Access::load ? "load_shared" : "store_shared", site);
  const Who by = who(thread, site);
  if (access == Access::load) {
    for_entries(p, bytes, [&](Entry& entry) { read(entry, by); });
  } else {
    for_entries(p, bytes, [&](Entry& entry) { write(entry, by); });
  }
}

void SharedMemory::issue(CopyQueue& queue, int thread, void* to, const void* from, const Site& site) {
  constexpr int kBytes = 16;
  if (!good(to, kBytes)) refuse(to, kBytes, thread, "cp_async16", site);
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    throw std::runtime_error("cp_async16 by " + thread_name(thread) + " at " + describe(site) +
                             " from an address that isn't a multiple of 16");
  }
  const Who by = who(thread, site);
  for_entries(to, kBytes, [&](Entry& entry) {
    write(entry, by);
    entry.pending = true;
  });
  std::memset(to, kPoison, kBytes);
  queue.copies.push_back({static_cast<unsigned char*>(to), from, queue.groups, site});
}

void SharedMemory::finish(CopyQueue& queue, int thread, int groups_under_way) {
  constexpr int kBytes = 16;
  size_t done = 0;
  for (; done < queue.copies.size(); ++done) {
    const CopyQueue::Copy& copy = queue.copies[done];
    if (copy.group >= queue.groups - groups_under_way) break;
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, kBytes);
    } else {
      std::memcpy(copy.to, copy.from, kBytes);
    }
    const Who by = who(thread, copy.site);
    for_entries(copy.to, kBytes, [&](Entry& entry) {
      entry.pending = false;
      write(entry, by);
    });
  }
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void SharedMemory::forget(CopyQueue& queue) {
  for (const CopyQueue::Copy& copy : queue.copies) {
    for_entries(copy.to, 16, [](Entry& entry) { entry.pending = false; });
  }
  queue.copies.clear();
  queue.groups = 0;
}

}  // namespace quicksilver::emulator
