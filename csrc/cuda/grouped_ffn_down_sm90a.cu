// SPDX-License-Identifier: Apache-2.0
// Down-projection of grouped_ffn on Hopper: y = hidden down^T, experts as column views of down.
#include "cuda/rows_gemm_sm90a.h"

namespace sparse_unified {

cudaError_t grouped_ffn_down_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                   const GroupedFfnSm90aOptions& options, const void* hidden,
                                   cudaStream_t stream) {
  const rows_gemm_sm90a::Operand operands[1] = {{hidden, params.down_proj, params.down_stride}};
  const bool overlaps = options.overlaps_kernels;
  return params.dtype == DType::kBFloat16
             ? rows_gemm_sm90a::run<BFloat16, 1, Major::kK>(
                   params, device, operands, static_cast<BFloat16*>(params.y), overlaps, stream)
             : rows_gemm_sm90a::run<Float16, 1, Major::kK>(
                   params, device, operands, static_cast<Float16*>(params.y), overlaps, stream);
}

}  // namespace sparse_unified
