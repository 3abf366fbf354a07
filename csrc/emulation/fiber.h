// SPDX-License-Identifier: Apache-2.0
// Stacks that take turns on one thread of the system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define SPARSE_UNIFIED_EMULATION_UCONTEXT 1
#endif

#if defined(SPARSE_UNIFIED_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace sparse_unified::emulation {

// The context of the caller until `prepare` gives it a stack of its own.
class Fiber {
 public:
  static constexpr int kMaxFibers = 1024;
  static constexpr size_t kStackBytes = 256 * 1024;

  // The next switch here calls `entry`, which must not return. Stack `stack_idx` is used afresh;
  // what ran on it before ended in `entry`, or was abandoned.
  void prepare(int stack_idx, void (*entry)());

  // Functions on other stacks than the caller's will not return.
  static void abandon_stacks();

  // Continues `to`; returns when somebody switches back, which must not happen after `is_last`.
  static void switch_between(Fiber& from, Fiber& to, bool is_last = false);

  // To be called first on a new stack.
  static void arrive();

  // Whether the address lies on a stack made here, or in the guard below one.
  static bool owns(const void* address);
  static bool is_guard(const void* address);

 private:
#if defined(SPARSE_UNIFIED_EMULATION_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void* fake_stack_ = nullptr;          // of the address sanitizer
  const void* stack_bottom_ = nullptr;  //
  size_t stack_bytes_ = 0;
};

}  // namespace sparse_unified::emulation
