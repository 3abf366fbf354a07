// SPDX-License-Identifier: Apache-2.0
#include "cuda/grouped_ffn_grad_weights_sm80.cuh"

namespace sparse_unified {

template cudaError_t grouped_ffn_grad_weights_sm80<BFloat16>(
    GroupedFfnTileId, const GroupedFfnGradWeightsKernelParams&, cudaStream_t);

}  // namespace sparse_unified
