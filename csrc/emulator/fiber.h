// Stacks, and the switch from one to another: what the compiler keeps in callee-saved registers, and nothing else.
#pragma once

#include <cstddef>
#include <vector>

namespace quicksilver::emulator {

// Where a thread of execution was left.
struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // its bounds and `fake_stack` are for AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

constexpr size_t kStackBytes = 128 * 1024;

// The lowest address of a stack, below which a page faults. Stacks are kept for later use.
std::vector<void*> take_stacks(size_t count);
void give_stacks(std::vector<void*> stacks);

// A context that runs `entry` when it is switched to. entry calls arrived() first and must not return.
Context start_context(void* stack, void (*entry)());
void arrived();
void switch_context(Context& from, const Context& to, bool ends = false);

}  // namespace quicksilver::emulator
