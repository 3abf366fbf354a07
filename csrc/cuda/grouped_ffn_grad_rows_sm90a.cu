// SPDX-License-Identifier: Apache-2.0
// Input gradient of grouped_ffn on Hopper: grad_rows = grad_gate gate_proj + grad_up up_proj.
#include "cuda/rows_gemm_sm90a.h"

namespace sparse_unified {

cudaError_t grouped_ffn_grad_rows_sm90a(const GroupedFfnBackwardCudaParams& params,
                                        const DeviceInfo& device,
                                        const GroupedFfnSm90aOptions& options,
                                        const void* grad_gate, const void* grad_up,
                                        cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.forward;
  const rows_gemm_sm90a::Operand operands[2] = {{grad_gate, ffn.gate_proj}, {grad_up, ffn.up_proj}};
  constexpr auto kTile = GroupedFfnSm90aDownTile::k256x4;
  return dispatch_half(ffn.dtype, [&]<typename T>(T) {
    return dispatch_value<1, 2>(options.multicasts_backward ? 2 : 1, [&]<int kBlocks>() {
      return rows_gemm_sm90a::run<T, kTile, 2, Major::kMN, kBlocks>(
          ffn, device, operands, static_cast<T*>(params.grad_rows), false, stream);
    });
  });
}

}  // namespace sparse_unified
