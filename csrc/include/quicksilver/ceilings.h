// What the machine could do at best, measured now: the yardsticks of the benchmarks.
#pragma once

#include <cstddef>

namespace quicksilver {

// Bytes per second at which all threads of the pool together read data[0..bytes), once. `data` is aligned to 64 bytes;
// to be the ceiling of memory, `bytes` must be several times the last-level cache. Nothing is checked.
double read_ceiling(const void* data, size_t bytes);

// INT8 multiply-accumulates per second of all threads together, out of registers, with exact sums in int32, by the
// widest instructions of the set in use: vpdpbusd with VNNI; vpmaddubsw, vpmaddwd and vpaddd with AVX2 and AVX-512;
// pmaddwd and paddd on values widened to 16 bits on the baseline. The best of a few rounds, some 50 ms in all.
double int8_ceiling();

}  // namespace quicksilver
