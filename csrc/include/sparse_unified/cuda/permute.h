// SPDX-License-Identifier: Apache-2.0
// permute on CUDA: gathers the token of each row.
#pragma once

#include <cstdint>

#include "sparse_unified/cuda/cuda_types.h"

namespace sparse_unified {

struct PermuteCudaParams {
  const void* x;             // [T, D], rows x_stride_bytes apart
  int64_t x_stride_bytes;    //
  const int32_t* row_token;  // [R]
  void* y;                   // [R, D]
  int64_t row_bytes;         // D * element size
  int64_t num_rows;          // R
  int64_t num_tokens;        // T
};

// y[r] = x[row_token[r]], any alignment; a token outside [0, T) ends the kernel with an error.
cudaError_t permute_cuda(const PermuteCudaParams& params, cudaStream_t stream);

}  // namespace sparse_unified
