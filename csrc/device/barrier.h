// SPDX-License-Identifier: Apache-2.0
// mbarrier: a phase ends when the expected arrivals and the expected bytes have come in; who waits
// names the parity of the phase it waits for. A barrier is 8 bytes of shared memory.
#pragma once

#include "device/platform.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/barrier.h"
#else

namespace sparse_unified {

// mbarrier.init.shared::cta.b64: phases of `num_arrivals` arrivals. One thread initialises.
SPARSE_UNIFIED_DEVICE void barrier_init(uint32_t barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
               : "memory");
}

// fence.mbarrier_init: makes initialised barriers visible to the asynchronous proxy and to the
// cluster; a barrier of the block, or of the cluster, must follow before other threads use them.
SPARSE_UNIFIED_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive.shared::cta.b64
SPARSE_UNIFIED_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.shared::cluster.b64: at a barrier of any block of the cluster, by the address
// that map_to_block gives. What wgmma has read and TMA has written is done with where this arrives;
// what this thread wrote otherwise is visible to its own block alone. NOTE: release.cluster would
// add a fence of the whole device to each arrival.
SPARSE_UNIFIED_DEVICE void barrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and lets the phase wait for `num_bytes` more from copies.
SPARSE_UNIFIED_DEVICE void barrier_arrive_expect_bytes(uint32_t barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}

// cp.async.mbarrier.arrive.noinc: this thread arrives when all cp.async it issued so far are done.
SPARSE_UNIFIED_DEVICE void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// mbarrier.try_wait.parity in a loop: returns when the phase of this parity has ended.
SPARSE_UNIFIED_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace sparse_unified

#endif
