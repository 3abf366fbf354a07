// SPDX-License-Identifier: Apache-2.0
// TMA: boxes of a matrix in global memory, described by a tensor map, to and from shared memory.
#pragma once

#include "device/platform.h"
#include "sparse_unified/dtype.h"

#if !defined(SPARSE_UNIFIED_EMULATION)
#include <cuda.h>
#endif

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/tensor_copy.h"
#else

namespace sparse_unified {

// A matrix of 16-bit elements and the box that one copy moves. Kernels take it as a member of
// their __grid_constant__ parameters.
struct TensorMap {
  CUtensorMap map;
};

// Describes [num_rows, num_columns] with rows `row_stride` elements apart and boxes of
// [box_rows, box_columns]; with `is_swizzled` a box row is 128 bytes and its eight 16-byte chunks
// are XORed with the row index modulo 8 (the box must then start at a multiple of 1024 bytes), or
// 64 bytes and its four chunks with half of the row index modulo 4 (of 512 bytes).
// What lies outside is read as zeros and not written. The base and the row stride in bytes are
// multiples of 16.
cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* base, int64_t num_rows,
                            int64_t num_columns, int64_t row_stride, int box_rows, int box_columns,
                            bool is_swizzled);

// prefetch.tensormap
SPARSE_UNIFIED_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map->map) : "memory");
}

// cp.async.bulk.tensor.2d global to shared: one thread issues the copy of a whole box; its bytes,
// zeros included, count on the barrier.
SPARSE_UNIFIED_DEVICE void load_box(uint32_t shared, const TensorMap* map, int row, int column,
                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(shared),
      "l"(&map->map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// cp.async.bulk.tensor.2d.multicast::cluster: one thread issues the copy of a box to the same place
// in several blocks of the cluster, those whose bits in `blocks` are set; in each of them the bytes
// count on the barrier at that place.
SPARSE_UNIFIED_DEVICE void load_box_to_blocks(uint32_t shared, const TensorMap* map, int row,
                                              int column, uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(&map->map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.2d shared to global, after fence_async_proxy by the writers and a barrier.
SPARSE_UNIFIED_DEVICE void store_box(const TensorMap* map, int row, int column, uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                   &map->map),
               "r"(column), "r"(row), "r"(shared)
               : "memory");
}

// cp.async.bulk.commit_group and wait_group.read: groups of stores of this thread; after the wait
// at most `kPending` still read their shared memory.
SPARSE_UNIFIED_DEVICE void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
SPARSE_UNIFIED_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// cp.async.bulk.wait_group: at most `kPending` groups are not yet written.
template <int kPending>
SPARSE_UNIFIED_DEVICE void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace sparse_unified

#endif
