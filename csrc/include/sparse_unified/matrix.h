// SPDX-License-Identifier: Apache-2.0
// A matrix in memory that its caller owns, as kernels take it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPARSE_UNIFIED_ANYWHERE __host__ __device__
#else
#define SPARSE_UNIFIED_ANYWHERE
#endif

namespace sparse_unified {

struct Matrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // elements from one row to the next

  template <typename T>
  SPARSE_UNIFIED_ANYWHERE const T* row(int64_t idx) const {
    return static_cast<const T*>(data) + idx * stride;
  }
};

}  // namespace sparse_unified
