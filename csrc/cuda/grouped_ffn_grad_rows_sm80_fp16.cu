// SPDX-License-Identifier: Apache-2.0
#include "cuda/grouped_ffn_grad_rows_sm80.cuh"

namespace sparse_unified {

template cudaError_t grouped_ffn_grad_rows_sm80<Float16>(GroupedFfnTileId,
                                                         const GroupedFfnBackwardKernelParams&,
                                                         cudaStream_t);

}  // namespace sparse_unified
