// SPDX-License-Identifier: Apache-2.0
// cp.async: a copy reads its source and writes its target when it lands. To the race detector it
// writes twice, at its issue and at the wait, so that nobody else may touch the target in between.
#include "device/async_copy.h"

#include "device/vector.h"
#include "emulation/block.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

constexpr int kCopyBytes = 16;

void land(PendingCopy& copy) {
  if (copy.has_landed) return;
  unsigned char bytes[kCopyBytes] = {};
  std::memcpy(bytes, copy.source, static_cast<size_t>(copy.num_bytes));
  std::memcpy(copy.target, bytes, kCopyBytes);
  copy.has_landed = true;
}

}  // namespace

void land_copy(int thread_idx, PendingCopy copy) {
  land(copy);
  race::access(thread_idx, copy.target, kCopyBytes, race::Kind::kWrite, copy.code);
}

void land_copies_by_chance(Thread& thread) {
  if (cluster.schedule.copies != Copies::kRandom) return;
  for (PendingCopy& copy : thread.copies) {
    if (one_in(4)) land(copy);
  }
}

void wait_for_copies(int num_pending) {
  const InEmulator in_emulator;
  const int end_group = current->copy_group - num_pending;
  std::erase_if(current->copies, [&](PendingCopy& copy) {
    if (copy.group >= end_group) return false;
    land_copy(current->idx, copy);
    return true;
  });
  maybe_yield();
}

}  // namespace emulation

void copy_async_16(uint32_t shared, const void* global, int source_bytes) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "copy_async_16";
  PendingCopy copy{};
  copy.target = shared_pointer(name, shared, kCopyBytes, kCopyBytes);
  copy.source = global;
  copy.num_bytes = source_bytes;
  copy.group = current->copy_group;
  copy.code = __builtin_return_address(0);
  if (source_bytes < 0 || source_bytes > kCopyBytes) {
    fail("%s: source_bytes must be 0 to 16, got %d", name, source_bytes);
  }
  check_aligned(name, global, kCopyBytes);
  check_global(name, global, source_bytes);
  race::access(current->idx, copy.target, kCopyBytes, race::Kind::kWrite, copy.code);
  race::access(current->idx, global, source_bytes, race::Kind::kRead, copy.code);
  if (cluster.schedule.copies == Copies::kEager) land(copy);
  current->copies.push_back(copy);
  land_copies_by_chance(*current);
}

void copy_async_commit() {
  ++emulation::current->copy_group;
  const emulation::InEmulator in_emulator;
  emulation::maybe_yield();
}

}  // namespace sparse_unified
