// SPDX-License-Identifier: Apache-2.0
#include "emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sparse_unified::emulation {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr int kStackColours = 16;
constexpr size_t kColourBytes = 1088;
[[maybe_unused]] constexpr size_t kEntryBytes = 4096 + kStackColours * kColourBytes;

// The fiber that switched away last: a new stack learns from it where it came from.
Fiber* previous = nullptr;

char* stacks() {
  static char* const region = [] {
    void* memory = mmap(nullptr, Fiber::kMaxFibers * Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < Fiber::kMaxFibers; ++i) {
      mprotect(static_cast<char*>(memory) + i * Fiber::kStackBytes, kGuardBytes, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return region;
}

}  // namespace

#if !defined(SPARSE_UNIFIED_EMULATION_UCONTEXT)
// Saves what a function must preserve on the stack it leaves, and takes it from the other.
extern "C" void sparse_unified_switch_stack(void** save, void* stack_pointer);
asm(R"(
.text
.type sparse_unified_switch_stack, @function
sparse_unified_switch_stack:
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
  retq
.size sparse_unified_switch_stack, . - sparse_unified_switch_stack
)");
#endif

void Fiber::prepare(int stack_idx, void (*entry)()) {
  char* bottom = stacks() + static_cast<size_t>(stack_idx) * kStackBytes + kGuardBytes;
  stack_bottom_ = bottom;
  stack_bytes_ = kStackBytes - kGuardBytes;
#if defined(__SANITIZE_ADDRESS__)
  // The frame of `entry` itself, which has not returned.
  __asan_unpoison_memory_region(bottom + stack_bytes_ - kEntryBytes, kEntryBytes);
#endif
#if defined(SPARSE_UNIFIED_EMULATION_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Tops differ in their low bits, or all stacks would share few sets of the cache.
  auto top = reinterpret_cast<uintptr_t>(bottom + stack_bytes_) -
             static_cast<uintptr_t>(stack_idx % kStackColours) * kColourBytes;
  top &= ~uintptr_t{63};
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // the return address of `entry`: none
  *--slot = reinterpret_cast<void*>(entry);
  constexpr int kSavedRegisters = 6;
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  stack_pointer_ = slot;
#endif
}

void Fiber::switch_between(Fiber& from, Fiber& to, [[maybe_unused]] bool is_last) {
  previous = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.fake_stack_, to.stack_bottom_,
                                 to.stack_bytes_);
#endif
#if defined(SPARSE_UNIFIED_EMULATION_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  sparse_unified_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, &previous->stack_bottom_,
                                  &previous->stack_bytes_);
#endif
}

void Fiber::arrive() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &previous->stack_bottom_, &previous->stack_bytes_);
#endif
}

void Fiber::abandon_stacks() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks(), kMaxFibers * kStackBytes);
#endif
}

bool Fiber::owns(const void* address) {
  const auto* begin = stacks();
  const auto* at = static_cast<const char*>(address);
  return at >= begin && at < begin + kMaxFibers * kStackBytes;
}

bool Fiber::is_guard(const void* address) {
  return owns(address) &&
         static_cast<size_t>(static_cast<const char*>(address) - stacks()) % kStackBytes <
             kGuardBytes;
}

}  // namespace sparse_unified::emulation
