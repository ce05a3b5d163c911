#include "counts.h"

#include <algorithm>
#include <bit>

namespace quicksilver::emulator {
namespace {

constexpr uint64_t kSector = 32, kBankBytes = 4, kBanks = 32;

uint64_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

int64_t sectors_of(const uint64_t* addresses, uint32_t lanes) {
  uint64_t sectors[kLanes];  // an aligned access of up to 16 bytes lies in one
  int n = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (lanes >> i & 1) sectors[n++] = addresses[i] / kSector;
  }
  std::sort(sectors, sectors + n);
  return std::unique(sectors, sectors + n) - sectors;
}

// Wavefronts beyond the first for accesses of `n` lanes that hardware serves together: a bank gives one word in each.
int64_t conflicts_of(const uint64_t* addresses, uint32_t lanes, int bytes) {
  uint64_t words[kLanes * 4];
  int n = 0;
  for (int i = 0; i < kLanes; ++i) {
    if ((lanes >> i & 1) == 0) continue;
    for (uint64_t at = 0; at < static_cast<uint64_t>(bytes); at += kBankBytes) {
      words[n++] = (addresses[i] + at) / kBankBytes;
    }
  }
  std::sort(words, words + n);
  int in_bank[kBanks] = {}, most = 0;
  for (int i = 0; i < n; ++i) {
    if (i == 0 || words[i] != words[i - 1]) most = std::max(most, ++in_bank[words[i] % kBanks]);
  }
  return most > 1 ? most - 1 : 0;
}

// 8 bytes go by half warps, 16 by quarters: 128 bytes at a time.
int64_t conflicts_by_phase(const uint64_t* addresses, uint32_t lanes, int bytes) {
  const int together = bytes <= 4 ? kLanes : 128 / bytes;
  int64_t sum = 0;
  for (int first = 0; first < kLanes; first += together) {
    const uint32_t phase = (together == kLanes ? ~0u : (1u << together) - 1) << first;
    sum += conflicts_of(addresses, lanes & phase, bytes);
  }
  return sum;
}

}  // namespace

void BlockCounter::access(RequestKind kind, int warp, int lane, const void* p, int bytes, const Site& site) {
  const Key key{site.file_name(), site.line(), site.column(), static_cast<int>(kind) * 32 + bytes};
  Place& place = warps_[static_cast<size_t>(warp)][key];
  place.kind = kind;
  place.bytes = bytes;
  const uint64_t at = place.accesses[lane]++ - place.closed;
  if (at == place.open.size()) place.open.emplace_back();
  Request& request = place.open[at];
  request.lanes |= 1u << lane;
  request.address[lane] = address_of(p);
  while (!place.open.empty() && place.open.front().lanes == ~0u) {
    count(place, place.open.front());
    place.open.pop_front();
    ++place.closed;
  }
}

void BlockCounter::count(const Place& place, const Request& request) {
  const int lanes = std::popcount(request.lanes);
  const int64_t bytes = int64_t{lanes} * place.bytes;
  const auto sectors = [&] { return sectors_of(request.address, request.lanes); };
  if (place.kind != RequestKind::cp_async) {
    ++counts_.instructions;
    counts_.active_lanes += lanes;
  }
  switch (place.kind) {
    case RequestKind::global_load:
      ++counts_.global_load_requests;
      counts_.global_load_sectors += sectors();
      counts_.global_load_bytes += bytes;
      break;
    case RequestKind::global_store:
      ++counts_.global_store_requests;
      counts_.global_store_sectors += sectors();
      counts_.global_store_bytes += bytes;
      break;
    case RequestKind::shared_load:
    case RequestKind::shared_store:
      ++counts_.shared_requests;
      counts_.shared_conflicts += conflicts_by_phase(request.address, request.lanes, place.bytes);
      break;
    case RequestKind::cp_async:
      counts_.cp_async_sectors += sectors();
      counts_.cp_async_bytes += bytes;
      break;
  }
}

void BlockCounter::ldmatrix(const void* const* rows, int matrices) {
  uint64_t addresses[kLanes] = {};
  for (int i = 0; i < 8 * matrices; ++i) addresses[i] = address_of(rows[i]);
  ++counts_.shared_requests;
  for (int i = 0; i < matrices; ++i) counts_.shared_conflicts += conflicts_of(addresses, 0xffu << 8 * i, 16);
}

void BlockCounter::close() {
  for (auto& places : warps_) {
    for (auto& [key, place] : places) {
      for (const Request& request : place.open) count(place, request);
    }
    places.clear();
  }
}

void add(KernelCounts& to, const KernelCounts& from) {
  for (const auto& [name, number] : kCountNames) to.*number += from.*number;
}

}  // namespace quicksilver::emulator
