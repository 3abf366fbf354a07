// SPDX-License-Identifier: Apache-2.0
// ffn_importance: what each neuron of a SwiGLU FFN does on some tokens, summed over them.
#pragma once

#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

struct FfnImportanceParams {
  DType dtype;                 // of gate and up
  Matrix gate;                 // [n, m]
  Matrix up;                   // [n, m]
  const float* token_weights;  // [n]; null means all ones
  float threshold;             //
  double* sum_abs;             // [m]
  double* sum_squares;         // [m]
  double* num_fired;           // [m]
};

// With h = silu(gate) * up and weights w, adds for the neurons [begin, end) of m
//   sum_abs += sum_t w[t] |h[t]|,  sum_squares += sum_t w[t] h[t]^2,
//   num_fired += sum_t w[t] [|h[t]| > threshold],
// fp32 in the order of the tokens, in blocks of 32, and the result of the call in fp64. A token of
// weight 0 counts for nothing, whatever its values.
void ffn_importance_cpu(const FfnImportanceParams& params, int64_t begin, int64_t end);

}  // namespace sparse_unified
