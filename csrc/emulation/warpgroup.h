// SPDX-License-Identifier: Apache-2.0
// Twin of device/warpgroup.h. Registers are not counted, and kernels never overlap.
#pragma once

namespace sparse_unified {

template <int kRegisters>
SPARSE_UNIFIED_DEVICE void increase_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
SPARSE_UNIFIED_DEVICE void decrease_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

void sync_named(int id, int num_threads);
void fence_async_proxy();
bool elect_lane();
SPARSE_UNIFIED_DEVICE void wait_for_previous_kernel() {}
SPARSE_UNIFIED_DEVICE void allow_next_kernel() {}

}  // namespace sparse_unified
