// SPDX-License-Identifier: Apache-2.0
// Small kernels, each with a bug that the emulator must report, and the same kernel without it.
#pragma once

#include <cstdint>
#include <string>

#include "device/launch.h"
#include "emulation/testing.h"

namespace sparse_unified::planted {

// Runs the kernel with its bug or without, and says what is wrong with its output; empty: nothing.
// Throws emulation::Error when the emulator reports something.
using Run = std::string(bool is_planted);

// barriers.cu
Run missing_barrier;        // between writing and reading shared memory
Run missing_warp_sync;      // a ballot in place of sync_warp
Run stage_still_read;       // a buffer filled again before everybody has read it
Run missing_arrival;        // a thread returns before the last barrier
Run different_collectives;  // half of a warp at a shuffle, half at a ballot
Run exited_lanes;           // lanes without work return before a shuffle
// copies.cu
Run read_before_wait;      // of a copy
Run wait_off_by_one;       // one group too many still under way
Run read_without_barrier;  // of a copy that another thread waited for
// bounds.cu
Run shared_past_end;         // one element
Run shared_far_outside;      // a negative offset
Run global_write_past_end;   // one element
Run global_read_past_end;    // one element
Run copy_past_end;           // cp.async reads past its source
Run unwritten_output;        // the ragged tail
Run null_pointer;            //
Run misaligned_copy;         // shared address of cp.async
Run misaligned_vector;       // load_vector
Run misaligned_matrix_row;   // ldmatrix
Run failed_check;            // device_check
Run uninitialised_register;  // a sum that starts anywhere
// order.cu
Run first_warp_first;  // warp 1 reads what warp 0 should have written
Run lanes_in_order;    // the last lane's write should win
Run blocks_in_order;   // a block reads what the block before should have written
Run constant_written;  // load_vector_once of what the kernel writes
// ring.cu: boxes through a ring of stages
Run phase_never_flips;        // the consumer waits for the same parity in every pass
Run phase_flips_early;        // and for that of the next pass
Run too_many_bytes;           // expected by a full barrier: 16 more than come
Run too_few_bytes;            // one box of two
Run more_bytes_at_end;        // expected by a barrier that nobody waits for any more
Run full_not_waited_for;      // the consumer reads at once
Run empty_not_waited_for;     // the producer does not wait for free stages
Run released_before_read;     // the consumer frees a stage, then reads it
Run box_read_unswizzled;      // rows taken as if they lay one after the other
Run lanes_fall_behind;        // lanes that wait without arriving, and nothing holds their warp
Run barrier_not_initialised;  //
Run barrier_used_at_once;     // no sync_threads after barrier_init
Run barrier_not_fenced;       // no fence after it
Run barrier_written_over;     // by a store to shared memory
Run barrier_twice;            // initialised again while in use
Run one_arrival_too_many;     //
// staging.cu: threads write a tile that a box store sends away
Run store_without_fence;         // of the proxies
Run store_without_sync;          // of the writers
Run store_not_waited_for;        // at the end of the kernel
Run store_not_committed;         //
Run staging_overwritten;         // by the next tile, before the store has read it
Run named_barrier_too_wide;      // counts more threads than come
Run named_barrier_too_narrow;    // counts fewer
Run named_barrier_disagreement;  // two counts
// products.cu: gathered rows and a box, multiplied by wgmma
Run rows_unswizzled;               // cp.async writes rows one after the other
Run box_unswizzled;                // the tensor map has no swizzle
Run descriptor_of_other_major;     // K-major tiles read as MN-major
Run descriptor_unswizzled;         //
Run descriptor_of_other_swizzle;   // of 64 bytes for a box of 128
Run products_without_proxy_fence;  // on rows that cp.async has written
Run proxy_fence_before_wait;       // for the stage
Run arrival_before_copies;         // barrier_arrive where it should wait for cp.async
Run accumulators_read_early;       // before wgmma_wait
Run wait_leaves_a_group;           // and the accumulators are read
Run products_not_committed;        //
Run missing_wgmma_fence;           //
Run stage_released_early;          // before wgmma_wait
Run stage_refilled_early;          // the producer does not wait for free stages
Run warps_differ;                  // a warp issues products of its own
Run warp_left_out;                 // a warp issues none
Run narrow_product;                // of fewer columns than are read

// cluster.cu: two blocks that fill each other's stages
Run released_by_own_block;    // a stage is refilled when the consumers of one block have read it
Run released_to_wrong_block;  // both arrivals at the block's own barrier
Run box_to_one_block;         // a block's box is brought to itself alone
Run bytes_of_other_block;     // a full barrier does not expect those of the other block's box
Run block_leaves_early;       // no sync_cluster at the end
Run cluster_used_at_once;     // sync_threads in place of sync_cluster after barrier_init
Run cluster_not_fenced;       // no fence after it
Run block_sits_out;           // a block without rows of its own leaves its part of the boxes out
Run wait_at_other_block;      // at the address of map_to_block

// deferred.cu: results stored while the next tile is multiplied
Run accumulators_stored_late;  // rounded when the next products are under way
Run place_of_next_tile;        // where the next tile's results belong
Run last_tile_left;            // no tile comes after it
Run product_too_narrow;        // for the columns of the last tile
Run exchange_of_some;          // lanes without rows leave out the exchange
// Input, output and length of the kernels.
struct Params {
  const int32_t* in;
  int32_t* out;
  int n;
};

// Calls launch_on(in, out) with in[i] = 3 i + 1 and `n` values out, and compares with
// expected(in, i).
template <typename LaunchOn, typename Expected>
std::string run_on(int n, const LaunchOn& launch_on, const Expected& expected) {
  emulation::DeviceArray<int32_t> in(n);
  emulation::DeviceArray<int32_t> out(n);
  for (int i = 0; i < n; ++i) in[i] = 3 * i + 1;
  launch_on(in, out);
  out.check_guards("out");
  if (const int64_t i = out.first_unwritten(); i >= 0) return "unwritten at " + std::to_string(i);
  for (int i = 0; i < n; ++i) {
    if (out[i] != expected(in, i)) {
      return "out at " + std::to_string(i) + ": got " + std::to_string(out[i]) + ", expected " +
             std::to_string(expected(in, i));
    }
  }
  return "";
}

template <typename Expected>
std::string run(void (*kernel)(Params), const LaunchConfig& config, int n,
                const Expected& expected) {
  const auto launch_on = [&](auto& in, auto& out) {
    launch(kernel, config, Params{in.get(), out.get(), n});
  };
  return run_on(n, launch_on, expected);
}

inline int32_t same(emulation::DeviceArray<int32_t>& in, int i) { return in[i]; }

SPARSE_UNIFIED_DEVICE int32_t* shared_ints() {
  return reinterpret_cast<int32_t*>(dynamic_shared_memory());
}

}  // namespace sparse_unified::planted
