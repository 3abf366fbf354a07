// SPDX-License-Identifier: Apache-2.0
// permute: copies every token to its rows, y[r] = x[row_token[r]], and y[token_rows[t, k]] = x[t].
#pragma once

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

struct PermuteParams {
  Matrix x;                   // [T, D], of bytes: columns and stride count them
  const int32_t* row_token;   // [R]; not read by permute_cpu
  const int32_t* token_rows;  // [T, K]; read by permute_cpu alone
  void* y;                    // [R, D]
  int64_t num_rows;           // R
  int64_t top_k;              // K
};

// Goes by token, for tokens [token_begin, token_end).
void permute_cpu(const PermuteParams& params, int64_t token_begin, int64_t token_end);

// Goes by row, any alignment; a token outside [0, T) ends the kernel with an error.
cudaError_t permute_cuda(const PermuteParams& params, cudaStream_t stream);

// Goes by row: the same copy for a few adjacent rows, of one expert say.
void gather_rows_cpu(const PermuteParams& params);

}  // namespace sparse_unified
