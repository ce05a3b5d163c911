// Instruction set, thread pool and counters: the state that all CPU kernels share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace quicksilver {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512vnni = 3 };

const char* isa_name(Isa isa);
// Throws std::invalid_argument naming the known sets.
Isa isa_from_name(const std::string& name);
// True where the kernels were compiled, the CPU has the instructions and the OS saves the registers (XCR0).
bool isa_supported(Isa isa);
std::vector<Isa> supported_isas();
// The set in use: QUICKSILVER_ISA where it is set (an unknown or unsupported one throws std::runtime_error), else the
// widest supported one.
Isa current_isa();
// Throws std::invalid_argument if this machine can't run it. Not to be called while a kernel runs.
void set_isa(Isa isa);

// The persistent pool. Its size counts the calling thread. It is made at first use, of the size that was said first, or
// else of a thread for each core that the process may use. A forked child makes one of its own.
int threads();
// Resizes it. Throws std::invalid_argument for count < 1.
void set_threads(int count);
// Says the size where there is no pool yet and nobody has said one; otherwise it does nothing.
void start_threads(int count);

// Runs body(context, share, shares) for every share, as many as the pool has threads, and returns when all have
// returned. A thread takes a share when it gets there, so one may run several and another none. Calls from several host
// threads are serialised. Not reentrant.
void parallel(void (*body)(void* context, int share, int shares), void* context);

// What the kernels did since reset_counters(): plain sums, kept by the calling thread of each kernel.
struct Counters {
  int64_t gemm_macs = 0;                   // multiply-adds of GEMMs, over rows that were really computed
  int64_t attention_pairs = 0;             // (query head, visible entry) pairs, each 2 * head_size multiply-adds
  int64_t weight_bytes_read = 0;           // bytes of planes, scales and biases, once per GEMM call
  int64_t kv_bytes_read = 0;               // bytes of keys and values of visible entries
  int64_t attention_nanoseconds = 0;       // inside compacted_attention
  int64_t step_nanoseconds = 0;            // inside decode_step
  int64_t step_attention_nanoseconds = 0;  // inside both
};
Counters counters();
void reset_counters();

}  // namespace quicksilver
