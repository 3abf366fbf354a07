// SPDX-License-Identifier: Apache-2.0
// combine on CUDA: weighted sum of the rows of each token, and its backward.
#pragma once

#include "sparse_unified/combine.h"
#include "sparse_unified/cuda/cuda_types.h"

namespace sparse_unified {

// combine_cpu over all of `num_tokens` tokens: fp32 accumulation in the order of k, one rounding,
// any alignment. A row outside [0, num_rows) ends the kernel with an error.
cudaError_t combine_cuda(const CombineParams& params, int64_t num_tokens, int64_t num_rows,
                         cudaStream_t stream);

cudaError_t combine_backward_cuda(const CombineBackwardParams& params, int64_t num_tokens,
                                  int64_t num_rows, cudaStream_t stream);

}  // namespace sparse_unified
