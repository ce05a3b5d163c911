// What AddressSanitizer is told about memory and stacks; nothing where a build goes without it.
//
// Only sanitizer.cpp has to be compiled with -fsanitize=address. The rest of the emulator is several times faster
// without.
#pragma once

#include <cstddef>

namespace quicksilver::emulator {

void poison(const void* memory, size_t bytes);
void unpoison(const void* memory, size_t bytes);

// Around a switch to another stack. fake_stack: where to keep it, null where this stack won't be used again.
void start_switch(void** fake_stack, const void* stack, size_t bytes);
void finish_switch(void* fake_stack, const void** old_stack, size_t* old_bytes);

}  // namespace quicksilver::emulator
