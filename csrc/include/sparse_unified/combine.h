// SPDX-License-Identifier: Apache-2.0
// combine: weighted sum of the rows of each token.
#pragma once

#include <cstdint>

#include "sparse_unified/dtype.h"

namespace sparse_unified {

struct CombineParams {
  DType dtype;                // of y and out
  const void* y;              // [R, D], rows y_stride elements apart
  int64_t y_stride;           //
  const float* weights;       // [T, K]; null means all ones
  const int32_t* token_rows;  // [T, K]
  void* out;                  // [T, D]
  int64_t hidden_size;        // D
  int64_t top_k;              // K
};

// out[t] = sum_k weights[t, k] * y[token_rows[t, k]] for tokens [token_begin, token_end):
// fp32 accumulation in the order of k, one rounding.
void combine_cpu(const CombineParams& params, int64_t token_begin, int64_t token_end);

struct CombineBackwardParams {
  DType dtype;                // of grad_out, y and grad_y
  const void* grad_out;       // [T, D], rows grad_stride elements apart
  int64_t grad_stride;        //
  const void* y;              // [R, D], rows y_stride elements apart
  int64_t y_stride;           //
  const float* weights;       // [T, K]
  const int32_t* token_rows;  // [T, K]
  void* grad_y;               // [R, D]; null when not wanted
  float* grad_weights;        // [T, K]; null when not wanted
  int64_t hidden_size;        // D
  int64_t top_k;              // K
};

// grad_y[token_rows[t, k]] = weights[t, k] * grad_out[t];
// grad_weights[t, k] = <grad_out[t], y[token_rows[t, k]]>; tokens [token_begin, token_end).
void combine_backward_cpu(const CombineBackwardParams& params, int64_t token_begin,
                          int64_t token_end);

}  // namespace sparse_unified
