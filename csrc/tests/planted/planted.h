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

// Input, output and length of the kernels.
struct Params {
  const int32_t* in;
  int32_t* out;
  int n;
};

// Launches the kernel on in[i] = 3 i + 1 with `n` values out, and compares with
// expected(in, i).
template <typename Expected>
std::string run(void (*kernel)(Params), const LaunchConfig& config, int n, Expected&& expected) {
  emulation::DeviceArray<int32_t> in(n);
  emulation::DeviceArray<int32_t> out(n);
  for (int i = 0; i < n; ++i) in[i] = 3 * i + 1;
  launch(kernel, config, Params{in.get(), out.get(), n});
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

inline int32_t same(emulation::DeviceArray<int32_t>& in, int i) { return in[i]; }

SPARSE_UNIFIED_DEVICE int32_t* shared_ints() {
  return reinterpret_cast<int32_t*>(dynamic_shared_memory());
}

}  // namespace sparse_unified::planted
