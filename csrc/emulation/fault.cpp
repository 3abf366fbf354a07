// SPDX-License-Identifier: Apache-2.0
// An access that the processor refuses becomes a failure of the thread that made it: the signal
// handler returns into a function that reports it, on a stack of its own.
#include <csignal>
#include <iterator>

#include "emulation/block.h"

namespace sparse_unified::emulation {

#if defined(__x86_64__)
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS};
constexpr size_t kStackBytes = 256 * 1024;

struct sigaction previous[std::size(kSignals)];
alignas(64) unsigned char signal_stack[kStackBytes];
alignas(64) unsigned char report_stack[kStackBytes];
stack_t previous_stack;
const void* fault_address;
const void* fault_code;

[[noreturn]] void fail_at_fault() {
  const std::string code = describe_code(fault_code);
  if (Fiber::is_guard(fault_address)) {
    fail("the stack of the thread is full, at %s", code.c_str());
  }
  if (const Block* block = block_of_shared(fault_address)) {
    const auto offset = static_cast<const unsigned char*>(fault_address) - block->shared;
    fail("access to byte %lld of %lld of shared memory at %s", static_cast<long long>(offset),
         static_cast<long long>(cluster.shared_bytes), code.c_str());
  }
  fail("invalid or misaligned access at %s, address %p", code.c_str(), fault_address);
}

[[noreturn]] void report() {
  is_in_kernel = false;
  std::string message;
  try {
    fail_at_fault();
  } catch (const Error& error) {
    message = error.what();
  }
  abandon(std::move(message));
}

void handle(int signal, siginfo_t* info, void* context) {
  if (is_this_thread_launching() && current) {
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    fault_address = info->si_addr;
    fault_code = reinterpret_cast<const void*>(registers[REG_RIP]);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&report);
    registers[REG_RSP] = reinterpret_cast<greg_t>(report_stack + kStackBytes) - 8;
    return;
  }
  // Not a kernel's: whoever handled it before gets it when the access is tried again.
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
  }
}

}  // namespace

FaultHandler::FaultHandler() {
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = kStackBytes;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);
}

FaultHandler::~FaultHandler() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

#else

// The fault ends the process.
FaultHandler::FaultHandler() {}
FaultHandler::~FaultHandler() {}

#endif

}  // namespace sparse_unified::emulation
