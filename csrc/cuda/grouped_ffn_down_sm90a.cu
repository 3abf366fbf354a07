// SPDX-License-Identifier: Apache-2.0
// Down-projection of grouped_ffn on Hopper: y = hidden down^T, experts as column views of down.
#include "cuda/rows_gemm_sm90a.h"

namespace sparse_unified {

cudaError_t grouped_ffn_down_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                   const GroupedFfnSm90aOptions& options, const void* hidden,
                                   cudaStream_t stream) {
  using enum GroupedFfnSm90aDownTile;
  const rows_gemm_sm90a::Operand operands[1] = {{hidden, params.down_proj}};
  const int num_blocks = options.multicasts_weights ? 2 : 1;
  return dispatch_half(params.dtype, [&]<typename T>(T) {
    return dispatch_value<k256x4, k256x3, k128x6>(
        options.down, [&]<GroupedFfnSm90aDownTile kTile>() {
          return dispatch_value<1, 2>(num_blocks, [&]<int kBlocks>() {
            return rows_gemm_sm90a::run<T, kTile, 1, Major::kK, kBlocks>(
                params, device, operands, static_cast<T*>(params.y), options.overlaps_kernels,
                stream);
          });
        });
  });
}

}  // namespace sparse_unified
