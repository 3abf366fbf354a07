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
  float weight_offset;        // added to each of them
  const int32_t* token_rows;  // [T, K]
  void* out;                  // [T, D]
  int64_t num_tokens;         // T
  int64_t top_k;              // K
};

// out[t] = sum_k (weight_offset + weights[t, k]) * y[token_rows[t, k]]: fp32 accumulation in the
// order of k, one rounding. On the CPU for tokens [token_begin, token_end); on CUDA for all, where
// a row outside [0, R) ends the kernel with an error.
void combine_cpu(const CombineParams& params, int64_t token_begin, int64_t token_end);
cudaError_t combine_cuda(const CombineParams& params, cudaStream_t stream);

struct CombineBackwardParams {
  DType dtype;               // of grad_out, y and grad_y
  Matrix grad_out;           // [T, D]
  const int32_t* row_token;  // [n]
  const float* weights;      // [n]
  void* grad_y;              // [n, D]; null when not wanted
  const void* y;             // [n, D]; read for grad_weights alone
  float* grad_weights;       // [n]; null when not wanted
  int64_t num_rows;          // n
};

// For n adjacent rows, of one expert say:
// grad_y[r] = weights[r] * grad_out[row_token[r]];  grad_weights[r] = <grad_out[row_token[r]],
// y[r]>.
void combine_backward_cpu(const CombineBackwardParams& params);

}  // namespace sparse_unified
