// SPDX-License-Identifier: Apache-2.0
// The shared memory of the blocks that run: filled with NaN, with memory that faults close before
// and behind it, and a checked margin where alignment leaves a gap to that.
#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "device/cluster.h"
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
// What map_to_block gives has the number of the block, plus one, above these bits.
constexpr int kRankShift = 24;

// Where the memory of a block of the cluster lies, between guards that it shares with the next.
constexpr size_t kArenaStride = kGuardBytes + kArenaBytes;

unsigned char* arena(int rank) {
  static unsigned char* const region = [] {
    void* memory = mmap(nullptr, kMaxClusterBlocks * kArenaStride + kGuardBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory) + kGuardBytes;
  }();
  return region + static_cast<size_t>(rank) * kArenaStride;
}

unsigned char* margin_begin(int rank) {
  unsigned char* shared = cluster.blocks[rank].shared;
  return shared - (shared - arena(rank)) % kPageBytes;
}
unsigned char* margin_end(int rank) { return arena(rank) + kArenaBytes; }

void prepare(int rank) {
  const size_t bytes =
      (static_cast<size_t>(cluster.shared_bytes) + kAlignment - 1) / kAlignment * kAlignment;
  cluster.blocks[rank].shared = margin_end(rank) - bytes;
  unsigned char* begin = margin_begin(rank);
  static size_t accessible_bytes[kMaxClusterBlocks] = {};
  unsigned char* accessible = margin_end(rank) - accessible_bytes[rank];
  if (begin < accessible) {
    mprotect(begin, static_cast<size_t>(accessible - begin), PROT_READ | PROT_WRITE);
  } else if (begin > accessible) {
    mprotect(accessible, static_cast<size_t>(begin - accessible), PROT_NONE);
  }
  accessible_bytes[rank] = static_cast<size_t>(margin_end(rank) - begin);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(begin, static_cast<size_t>(margin_end(rank) - begin));
#endif
  std::memset(begin, kFill, static_cast<size_t>(margin_end(rank) - begin));
#if defined(__SANITIZE_ADDRESS__)
  unsigned char* shared = cluster.blocks[rank].shared;
  unsigned char* end = shared + cluster.shared_bytes;
  __asan_poison_memory_region(begin, static_cast<size_t>(shared - begin));
  __asan_poison_memory_region(end, static_cast<size_t>(margin_end(rank) - end));
#endif
}

}  // namespace

void prepare_shared_memory() {
  for (int rank = 0; rank < cluster.num_blocks; ++rank) prepare(rank);
}

std::string find_write_beside_shared_memory() {
#if !defined(__SANITIZE_ADDRESS__)
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    const unsigned char* shared = cluster.blocks[rank].shared;
    const unsigned char* end = shared + cluster.shared_bytes;
    for (const unsigned char* at = margin_begin(rank); at < margin_end(rank); ++at) {
      if (at == shared) at = end;
      if (at == margin_end(rank) || *at == kFill) continue;
      return "a write to byte " + std::to_string(at - shared) + " of " +
             std::to_string(cluster.shared_bytes) + " of shared memory";
    }
  }
#endif
  return "";
}

const Block* block_of_shared(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  const unsigned char* begin = arena(0) - kGuardBytes;
  if (at < begin || at >= margin_end(kMaxClusterBlocks - 1) + kGuardBytes) return nullptr;
  // What lies between two belongs to the nearer.
  const auto offset = static_cast<size_t>(at - begin);
  const size_t rank = offset < kGuardBytes / 2 ? 0 : (offset - kGuardBytes / 2) / kArenaStride;
  return &cluster.blocks[std::min(rank, static_cast<size_t>(cluster.num_blocks) - 1)];
}

void* shared_pointer(const char* instruction, int rank, uint32_t address, int num_bytes,
                     int alignment) {
  if (const int other = static_cast<int>(address >> kRankShift);
      other > 0 && other <= cluster.num_blocks) {
    fail("%s: takes no address of another block, of map_to_block", instruction);
  }
  const int64_t offset = static_cast<int64_t>(address) - kFirstAddress;
  if (offset < 0 || offset + num_bytes > cluster.shared_bytes) {
    fail("%s: %d bytes at byte %lld of %lld of shared memory", instruction, num_bytes,
         static_cast<long long>(offset), static_cast<long long>(cluster.shared_bytes));
  }
  if (offset % alignment != 0) {
    fail("%s: byte %lld of shared memory is not a multiple of %d", instruction,
         static_cast<long long>(offset), alignment);
  }
  return cluster.blocks[rank].shared + offset;
}

void check_has_not_exited(const char* instruction, int rank) {
  if (cluster.blocks[rank].num_running > 0) return;
  fail("%s: block %d of the cluster has ended", instruction, rank);
}

ClusterAddress cluster_address(const char* instruction, uint32_t address) {
  const int rank = static_cast<int>(address >> kRankShift) - 1;
  // An address of the block itself is one of the cluster too.
  if (rank < 0 || rank >= cluster.num_blocks) return {current->rank, address};
  check_has_not_exited(instruction, rank);
  return {rank, address & ((1u << kRankShift) - 1)};
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

unsigned char* dynamic_shared_memory() { return emulation::own_block().shared; }

uint32_t shared_address(const void* pointer) {
  using namespace emulation;
  const InEmulator in_emulator;
  const auto offset = static_cast<const unsigned char*>(pointer) - own_block().shared;
  if (offset < 0 || offset > cluster.shared_bytes) {
    fail("shared_address of %p, which is not in shared memory", pointer);
  }
  return static_cast<uint32_t>(offset) + kFirstAddress;
}

int cluster_rank() { return emulation::current->rank; }

uint32_t map_to_block(uint32_t shared, int rank) {
  using namespace emulation;
  const InEmulator in_emulator;
  if (rank < 0 || rank >= cluster.num_blocks) {
    fail("map_to_block: block %d of a cluster of %d", rank, cluster.num_blocks);
  }
  shared_pointer("map_to_block", shared, 0, 1);
  return static_cast<uint32_t>(rank + 1) << kRankShift | shared;
}

}  // namespace sparse_unified
