#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>

#include "sanitizer.h"

// void(void** from, void* to): leaves the stack pointer at *from, with the callee-saved registers below it, and goes on
// where `to` was left.
asm(R"(
.text
.globl quicksilver_switch_stack
.hidden quicksilver_switch_stack
.type quicksilver_switch_stack, @function
quicksilver_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size quicksilver_switch_stack, .-quicksilver_switch_stack
)");
extern "C" __attribute__((visibility("hidden"))) void quicksilver_switch_stack(void** from, void* to);

namespace quicksilver::emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr int kSavedRegisters = 6;

struct Pool {
  std::mutex mutex;
  std::vector<void*> stacks;
  ~Pool() {
    for (void* stack : stacks) munmap(static_cast<char*>(stack) - kPage, kStackBytes + kPage);
  }
};
Pool pool;

void* map_stack() {
  void* memory =
      mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stacks of so many threads");
  if (mprotect(memory, kPage, PROT_NONE) != 0) {
    munmap(memory, kStackBytes + kPage);
    throw std::runtime_error("emulator: no memory mappings for the stacks of so many threads");
  }
  return static_cast<char*>(memory) + kPage;
}

thread_local Context* switched_from = nullptr;

}  // namespace

std::vector<void*> take_stacks(size_t count) {
  const std::lock_guard lock(pool.mutex);
  while (pool.stacks.size() < count) pool.stacks.push_back(map_stack());
  std::vector<void*> taken(pool.stacks.end() - static_cast<std::ptrdiff_t>(count), pool.stacks.end());
  pool.stacks.resize(pool.stacks.size() - count);
  return taken;
}

void give_stacks(std::vector<void*> stacks) {
  const std::lock_guard lock(pool.mutex);
  pool.stacks.insert(pool.stacks.end(), stacks.begin(), stacks.end());
}

Context start_context(void* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes);
  // A function starts 8 bytes past a multiple of 16, above it its return address: none.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  return {top, stack, kStackBytes, nullptr};
}

void arrived() { finish_switch(nullptr, &switched_from->stack, &switched_from->stack_bytes); }

void switch_context(Context& from, const Context& to, bool ends) {
  switched_from = &from;
  start_switch(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  quicksilver_switch_stack(&from.stack_pointer, to.stack_pointer);
  finish_switch(from.fake_stack, nullptr, nullptr);
}

}  // namespace quicksilver::emulator
