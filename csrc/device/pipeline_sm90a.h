// SPDX-License-Identifier: Apache-2.0
// The ring of stages between a producer and its consumers: which stage, in which pass over the
// ring, and the two barriers of each.
#pragma once

#include "device/barrier.h"
#include "device/cluster.h"
#include "device/tensor_copy.h"

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

// Barriers of the ring in shared memory: full [kStages], then empty [kStages]. The blocks of a
// cluster of kBlocks fill each other's stages, so a stage is free when the consumers of all of them
// have released it; they go through the same number of stages.
template <int kStages, int kBlocks = 1>
struct RingBarriers {
  static constexpr int kBytes = 2 * kStages * 8;
  uint32_t first;

  SPARSE_UNIFIED_DEVICE uint32_t full(int stage) const { return first + 8 * stage; }
  SPARSE_UNIFIED_DEVICE uint32_t empty(int stage) const { return first + 8 * (kStages + stage); }

  // By one thread; sync_blocks must follow. Each warp of a block's consumers releases each stage.
  SPARSE_UNIFIED_DEVICE void init(int full_arrivals, int consumer_warps) const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), full_arrivals);
      barrier_init(empty(stage), kBlocks * consumer_warps);
    }
    fence_barrier_init();
  }

  // By all lanes of a warp of consumers, when it has done with the stage.
  SPARSE_UNIFIED_DEVICE void release(int stage) const {
    if constexpr (kBlocks == 1) {
      if (lane_idx() == 0) barrier_arrive(empty(stage));
    } else {
      // A lane for each block.
      if (lane_idx() < kBlocks) barrier_arrive_cluster(map_to_block(empty(stage), lane_idx()));
    }
  }

  // Until the producer may overwrite the stage; the first pass finds all of them free.
  SPARSE_UNIFIED_DEVICE void wait_empty(const RingPosition<kStages>& at) const {
    barrier_wait(empty(at.stage), at.pass ^ 1);
  }
  SPARSE_UNIFIED_DEVICE void wait_full(const RingPosition<kStages>& at) const {
    barrier_wait(full(at.stage), at.pass);
  }
};

// By all lanes of a warp of consumers that needs none of the next num_stages stages, but must let
// the other blocks of the cluster go on.
template <int kStages, int kBlocks>
SPARSE_UNIFIED_DEVICE void skip_stages(int num_stages, const RingBarriers<kStages, kBlocks>& ring,
                                       RingPosition<kStages>& at) {
#pragma unroll 1
  for (int k = 0; k < num_stages; ++k, at.advance()) {
    ring.wait_full(at);
    sync_warp();  // or a lane that waits late might miss the phase
    ring.release(at.stage);
  }
}

// All threads of the block, or of the cluster: after the barriers of a ring are initialised, and at
// the end of a kernel whose blocks reach each other's memory.
template <int kBlocks>
SPARSE_UNIFIED_DEVICE void sync_blocks() {
  if constexpr (kBlocks == 1) {
    sync_threads();
  } else {
    sync_cluster();
  }
}

// load_box to the same place in all blocks of a cluster of kBlocks.
template <int kBlocks>
SPARSE_UNIFIED_DEVICE void load_box_to_all(uint32_t shared, const TensorMap* map, int row,
                                           int column, uint32_t barrier) {
  if constexpr (kBlocks == 1) {
    load_box(shared, map, row, column, barrier);
  } else {
    load_box_to_blocks(shared, map, row, column, barrier, (1 << kBlocks) - 1);
  }
}

}  // namespace sparse_unified
