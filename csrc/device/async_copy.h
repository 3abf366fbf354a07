// SPDX-License-Identifier: Apache-2.0
// cp.async: copies from global to shared memory that the issuing thread waits for by group.
#pragma once

#include "device/platform.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/async_copy.h"
#else

namespace sparse_unified {

// cp.async.cg.shared.global 16 bytes: the first `source_bytes` (0 to 16) are read, the rest is
// filled with zeros. Both addresses aligned to 16; with 0 the global address is not read. L2
// fetches 128 bytes: a tile of 32 k reads half of a line, and the next step the other half.
SPARSE_UNIFIED_DEVICE void copy_async_16(uint32_t shared, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// cp.async.commit_group: what this thread issued since the last commit becomes a group.
SPARSE_UNIFIED_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: until at most `kPending` of this thread's newest groups are under way. Other
// threads see the data after a barrier.
template <int kPending>
SPARSE_UNIFIED_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sparse_unified

#endif
