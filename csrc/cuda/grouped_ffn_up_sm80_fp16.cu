// SPDX-License-Identifier: Apache-2.0
#include "cuda/grouped_ffn_up_sm80.cuh"

namespace sparse_unified {

template cudaError_t grouped_ffn_up_sm80<Float16>(GroupedFfnTileId,
                                                  const GroupedFfnForwardKernelParams&,
                                                  cudaStream_t);

}  // namespace sparse_unified
