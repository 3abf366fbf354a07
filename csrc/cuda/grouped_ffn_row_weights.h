// SPDX-License-Identifier: Apache-2.0
// The weights of the rows on their way to grad_hidden, and the gradients that it makes of them.
#pragma once

#include "sparse_unified/cuda/grouped_ffn.h"

namespace sparse_unified {

// With G = grad_y down, the gradient of hidden is w G, and that of w the sum over a row of hidden
// G.
struct RowFactors {
  const float* weights;  // w [R]; null: ones
  float* parts;          // [parts, R], each the sum over some neurons; null when not wanted
};

// row_weights[token_rows[t, k]] = offset + weights[t, k]; a row outside [0, R) ends the kernel with
// an error.
cudaError_t spread_row_weights(const RowWeights& weights, int64_t num_rows, float* row_weights,
                               cudaStream_t stream);

// grad_weights[t, k] = the sum over the parts, in order, of row token_rows[t, k].
cudaError_t sum_row_parts(const RowWeights& weights, int64_t num_rows, const float* parts,
                          int64_t num_parts, cudaStream_t stream);

}  // namespace sparse_unified
