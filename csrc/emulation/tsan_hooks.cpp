// SPDX-License-Identifier: Apache-2.0
// What the compiler calls on every memory access under -fsanitize=thread. Kernel sources are
// compiled so; instead of the sanitizer's library, they are linked with this.
#include "emulation/block.h"
#include "emulation/race.h"

namespace sparse_unified::emulation {
namespace {

void check(const void* pointer, size_t num_bytes, race::Kind kind, const void* code) {
  if (const Block* block = block_of_shared(pointer)) {
    const auto offset = static_cast<const unsigned char*>(pointer) - block->shared;
    if (offset < 0 || offset + static_cast<int64_t>(num_bytes) > cluster.shared_bytes) {
      fail("access to byte %lld of %lld of shared memory at %s", static_cast<long long>(offset),
           static_cast<long long>(cluster.shared_bytes), describe_code(code).c_str());
    }
  }
  race::access(current->idx, pointer, static_cast<int>(num_bytes), kind, code);
}

// To the compiler, its callers cannot throw.
void on_access(const void* pointer, size_t num_bytes, race::Kind kind, const void* code) {
  if (!is_in_kernel || Fiber::owns(pointer)) return;
  const InEmulator in_emulator;
  std::string message;
  try {
    check(pointer, num_bytes, kind, code);
    return;
  } catch (const Error& error) {
    message = error.what();
  }
  abandon(std::move(message));
}

}  // namespace
}  // namespace sparse_unified::emulation

using sparse_unified::emulation::on_access;
using sparse_unified::emulation::race::Kind;

#define SPARSE_UNIFIED_HOOK(name, num_bytes, kind) \
  void name(void* pointer) { on_access(pointer, num_bytes, kind, __builtin_return_address(0)); }
#define SPARSE_UNIFIED_HOOKS(num_bytes)                                                  \
  SPARSE_UNIFIED_HOOK(__tsan_read##num_bytes, num_bytes, Kind::kRead)                    \
  SPARSE_UNIFIED_HOOK(__tsan_write##num_bytes, num_bytes, Kind::kWrite)                  \
  SPARSE_UNIFIED_HOOK(__tsan_unaligned_read##num_bytes, num_bytes, Kind::kRead)          \
  SPARSE_UNIFIED_HOOK(__tsan_unaligned_write##num_bytes, num_bytes, Kind::kWrite)        \
  SPARSE_UNIFIED_HOOK(__tsan_volatile_read##num_bytes, num_bytes, Kind::kRead)           \
  SPARSE_UNIFIED_HOOK(__tsan_volatile_write##num_bytes, num_bytes, Kind::kWrite)         \
  SPARSE_UNIFIED_HOOK(__tsan_unaligned_volatile_read##num_bytes, num_bytes, Kind::kRead) \
  SPARSE_UNIFIED_HOOK(__tsan_unaligned_volatile_write##num_bytes, num_bytes, Kind::kWrite)

extern "C" {
SPARSE_UNIFIED_HOOKS(1)
SPARSE_UNIFIED_HOOKS(2)
SPARSE_UNIFIED_HOOKS(4)
SPARSE_UNIFIED_HOOKS(8)
SPARSE_UNIFIED_HOOKS(16)

void __tsan_read_range(void* pointer, size_t num_bytes) {
  on_access(pointer, num_bytes, Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* pointer, size_t num_bytes) {
  on_access(pointer, num_bytes, Kind::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
