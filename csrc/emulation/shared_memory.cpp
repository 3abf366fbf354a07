// SPDX-License-Identifier: Apache-2.0
// The shared memory of the running block: filled with NaN, with memory that faults close before and
// behind it, and a checked margin where alignment leaves a gap to that.
#include <sys/mman.h>

#include <new>

#include "emulation/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sparse_unified {
namespace emulation {
namespace {

constexpr size_t kArenaBytes = 256 * 1024;
constexpr size_t kGuardBytes = 16 << 20;
constexpr size_t kPageBytes = 4096;
constexpr size_t kAlignment = 1024;  // of dynamic_shared_memory()
constexpr int kFill = 0xff;
// Address of the block's first byte for instructions: not 0, which no pointer of a kernel is.
constexpr uint32_t kFirstAddress = 1024;

unsigned char* arena() {
  static unsigned char* const region = [] {
    void* memory = mmap(nullptr, kArenaBytes + 2 * kGuardBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory) + kGuardBytes;
  }();
  return region;
}

unsigned char* margin_begin() { return block.shared - (block.shared - arena()) % kPageBytes; }
unsigned char* margin_end() { return arena() + kArenaBytes; }

}  // namespace

void prepare_shared_memory() {
  const size_t bytes =
      (static_cast<size_t>(block.shared_bytes) + kAlignment - 1) / kAlignment * kAlignment;
  block.shared = margin_end() - bytes;
  unsigned char* begin = margin_begin();
  static unsigned char* accessible = margin_end();
  if (begin < accessible) {
    mprotect(begin, static_cast<size_t>(accessible - begin), PROT_READ | PROT_WRITE);
  } else if (begin > accessible) {
    mprotect(accessible, static_cast<size_t>(begin - accessible), PROT_NONE);
  }
  accessible = begin;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, static_cast<size_t>(margin_end() - begin));
#endif
  std::memset(begin, kFill, static_cast<size_t>(margin_end() - begin));
#if defined(__SANITIZE_ADDRESS__)
  unsigned char* end = block.shared + block.shared_bytes;
  __asan_poison_memory_region(begin, static_cast<size_t>(block.shared - begin));
  __asan_poison_memory_region(end, static_cast<size_t>(margin_end() - end));
#endif
}

std::string find_write_beside_shared_memory() {
#if !defined(__SANITIZE_ADDRESS__)
  const unsigned char* end = block.shared + block.shared_bytes;
  for (const unsigned char* at = margin_begin(); at < margin_end(); ++at) {
    if (at == block.shared) at = end;
    if (at == margin_end() || *at == kFill) continue;
    return "a write to byte " + std::to_string(at - block.shared) + " of " +
           std::to_string(block.shared_bytes) + " of shared memory";
  }
#endif
  return "";
}

bool is_shared_arena(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  return at >= arena() - kGuardBytes && at < margin_end() + kGuardBytes;
}

void* shared_pointer(const char* instruction, uint32_t address, int num_bytes, int alignment) {
  const int64_t offset = static_cast<int64_t>(address) - kFirstAddress;
  if (offset < 0 || offset + num_bytes > block.shared_bytes) {
    fail("%s: %d bytes at byte %lld of %lld of shared memory", instruction, num_bytes,
         static_cast<long long>(offset), static_cast<long long>(block.shared_bytes));
  }
  if (offset % alignment != 0) {
    fail("%s: byte %lld of shared memory is not a multiple of %d", instruction,
         static_cast<long long>(offset), alignment);
  }
  return block.shared + offset;
}

void check_global([[maybe_unused]] const char* instruction, [[maybe_unused]] const void* pointer,
                  [[maybe_unused]] int num_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  if (__asan_region_is_poisoned(const_cast<void*>(pointer), static_cast<size_t>(num_bytes))) {
    fail("%s: %d bytes at %p that are not all allocated", instruction, num_bytes, pointer);
  }
#endif
}

}  // namespace emulation

unsigned char* dynamic_shared_memory() { return emulation::block.shared; }

uint32_t shared_address(const void* pointer) {
  using emulation::block;
  const emulation::InEmulator in_emulator;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || offset > block.shared_bytes) {
    emulation::fail("shared_address of %p, which is not in shared memory", pointer);
  }
  return static_cast<uint32_t>(offset) + emulation::kFirstAddress;
}

}  // namespace sparse_unified
