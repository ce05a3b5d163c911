#include "sanitizer.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace quicksilver::emulator {

#ifdef __SANITIZE_ADDRESS__
void poison(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void unpoison(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
void start_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void finish_switch(void* fake_stack, const void** old_stack, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
}
#else
void poison(const void*, size_t) {}
void unpoison(const void*, size_t) {}
void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace quicksilver::emulator
