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

// Where the parts of the experts lie in matrices of weights. Zeros: one behind the other, as rows
// of gate_proj and up_proj [E * h, D] and as columns of down_proj [D, E * h].
struct ExpertSpacing {
  int64_t neuron_gap;  // rows of gate_proj and up_proj between two experts
  int64_t down_rows;   // rows of down_proj from one expert to the next, such as D of [E * D, h]
};

}  // namespace sparse_unified
