// SPDX-License-Identifier: Apache-2.0
// Twin of device/tensor_copy.h.
#pragma once

namespace sparse_unified {

// As large as the driver's.
struct alignas(64) TensorMap {
  const void* base;
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;  // elements
  int32_t box_rows;
  int32_t box_columns;
  bool is_swizzled;
  unsigned char unused[83];
};
static_assert(sizeof(TensorMap) == 128);

// The rules of cuTensorMapEncodeTiled that a map can break here.
cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* base, int64_t num_rows,
                            int64_t num_columns, int64_t row_stride, int box_rows, int box_columns,
                            bool is_swizzled);

void prefetch_tensor_map(const TensorMap* map);
void load_box(uint32_t shared, const TensorMap* map, int row, int column, uint32_t barrier);
void load_box_to_blocks(uint32_t shared, const TensorMap* map, int row, int column,
                        uint32_t barrier, uint16_t blocks);
void store_box(const TensorMap* map, int row, int column, uint32_t shared);
void store_commit();

namespace emulation {
void wait_for_stores(int num_pending);
}

// Stores have read their source and written their target at the same time here.
template <int kPending>
SPARSE_UNIFIED_DEVICE void store_wait_read() {
  emulation::wait_for_stores(kPending);
}
template <int kPending>
SPARSE_UNIFIED_DEVICE void store_wait() {
  emulation::wait_for_stores(kPending);
}

}  // namespace sparse_unified
