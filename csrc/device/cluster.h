// SPDX-License-Identifier: Apache-2.0
// Blocks that run at the same time, next to each other, and reach each other's shared memory: a
// cluster (LaunchConfig::cluster_blocks). A block must not end before the others have done with its
// memory.
#pragma once

#include "device/platform.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/cluster.h"
#else

namespace sparse_unified {

// %cluster_ctarank: index of this block in its cluster.
SPARSE_UNIFIED_DEVICE int cluster_rank() {
  uint32_t rank = 0;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// mapa.shared::cluster: the address in block `rank` of the cluster that corresponds to an address
// of this one; the instructions named *_cluster take it.
SPARSE_UNIFIED_DEVICE uint32_t map_to_block(uint32_t shared, int rank) {
  uint32_t address = 0;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// barrier.cluster.arrive.release and wait.acquire: all threads of the cluster that have not ended;
// orders their memory accesses.
SPARSE_UNIFIED_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;\n" ::
          : "memory");
}

}  // namespace sparse_unified

#endif
