// SPDX-License-Identifier: Apache-2.0
// The ring of stages between a producer and its consumers: which stage, in which pass over the
// ring, and the two barriers of each.
#pragma once

#include "device/barrier.h"

namespace sparse_unified {

// Position in the ring. A stage is full in phase `pass` of its full barrier, and free again in
// phase `pass` of its empty barrier.
template <int kStages>
struct RingPosition {
  int stage = 0;
  int pass = 0;

  SPARSE_UNIFIED_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      pass ^= 1;
    }
  }
};

// Barriers of the ring in shared memory: full [kStages], then empty [kStages].
template <int kStages>
struct RingBarriers {
  static constexpr int kBytes = 2 * kStages * 8;
  uint32_t first;

  SPARSE_UNIFIED_DEVICE uint32_t full(int stage) const { return first + 8 * stage; }
  SPARSE_UNIFIED_DEVICE uint32_t empty(int stage) const { return first + 8 * (kStages + stage); }

  // By one thread; sync_threads must follow.
  SPARSE_UNIFIED_DEVICE void init(int full_arrivals, int empty_arrivals) const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), full_arrivals);
      barrier_init(empty(stage), empty_arrivals);
    }
    fence_barrier_init();
  }

  // Until the producer may overwrite the stage; the first pass finds all of them free.
  SPARSE_UNIFIED_DEVICE void wait_empty(const RingPosition<kStages>& at) const {
    barrier_wait(empty(at.stage), at.pass ^ 1);
  }
  SPARSE_UNIFIED_DEVICE void wait_full(const RingPosition<kStages>& at) const {
    barrier_wait(full(at.stage), at.pass);
  }
};

}  // namespace sparse_unified
