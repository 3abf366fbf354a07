// SPDX-License-Identifier: Apache-2.0
// combine: weighted sum of the rows of each token.
#pragma once

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

struct CombineParams {
  DType dtype;                // of y and out
  Matrix y;                   // [R, D]
  const float* weights;       // [T, K]; null means all ones
  const int32_t* token_rows;  // [T, K]
  void* out;                  // [T, D]
  int64_t num_tokens;         // T
  int64_t top_k;              // K
};

// out[t] = sum_k weights[t, k] * y[token_rows[t, k]]: fp32 accumulation in the order of k, one
// rounding. On the CPU for tokens [token_begin, token_end); on CUDA for all, where a row outside
// [0, R) ends the kernel with an error.
void combine_cpu(const CombineParams& params, int64_t token_begin, int64_t token_end);
cudaError_t combine_cuda(const CombineParams& params, cudaStream_t stream);

struct CombineBackwardParams {
  DType dtype;                // of grad_out, y and grad_y
  Matrix grad_out;            // [T, D]
  Matrix y;                   // [R, D]
  const float* weights;       // [T, K]
  const int32_t* token_rows;  // [T, K]
  void* grad_y;               // [R, D]; null when not wanted
  float* grad_weights;        // [T, K]; null when not wanted
  int64_t top_k;              // K
};

// grad_y[token_rows[t, k]] = weights[t, k] * grad_out[t];
// grad_weights[t, k] = <grad_out[t], y[token_rows[t, k]]>.
void combine_backward_cpu(const CombineBackwardParams& params, int64_t token_begin,
                          int64_t token_end);
cudaError_t combine_backward_cuda(const CombineBackwardParams& params, cudaStream_t stream);

}  // namespace sparse_unified
