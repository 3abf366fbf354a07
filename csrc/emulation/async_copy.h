// SPDX-License-Identifier: Apache-2.0
// Twin of device/async_copy.h.
#pragma once

namespace sparse_unified {
namespace emulation {

void wait_for_copies(int num_pending);

}  // namespace emulation

void copy_async_16(uint32_t shared, const void* global, int source_bytes);
void copy_async_commit();

template <int kPending>
SPARSE_UNIFIED_DEVICE void copy_async_wait() {
  emulation::wait_for_copies(kPending);
}

}  // namespace sparse_unified
