// SPDX-License-Identifier: Apache-2.0
// Down-projection of grouped_ffn on Hopper: y = hidden down^T, experts as column views of down.
#include "cuda/rows_gemm_sm90a.h"

namespace sparse_unified {

namespace {

template <typename T, int kBlocks>
cudaError_t choose_down(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                        const GroupedFfnSm90aOptions& options, const void* hidden,
                        cudaStream_t stream) {
  using enum GroupedFfnSm90aDownTile;
  using rows_gemm_sm90a::run;
  const rows_gemm_sm90a::Operand operands[1] = {{hidden, params.down_proj, params.down_stride}};
  T* y = static_cast<T*>(params.y);
  const bool overlaps = options.overlaps_kernels;
  switch (options.down) {
    case k256x4:
      return run<T, k256x4, 1, Major::kK, kBlocks>(params, device, operands, y, overlaps, stream);
    case k256x3:
      return run<T, k256x3, 1, Major::kK, kBlocks>(params, device, operands, y, overlaps, stream);
    case k128x6:
      return run<T, k128x6, 1, Major::kK, kBlocks>(params, device, operands, y, overlaps, stream);
  }
  return cudaErrorInvalidValue;
}

template <int kBlocks>
cudaError_t choose_type(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                        const GroupedFfnSm90aOptions& options, const void* hidden,
                        cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? choose_down<BFloat16, kBlocks>(params, device, options, hidden, stream)
             : choose_down<Float16, kBlocks>(params, device, options, hidden, stream);
}

}  // namespace

cudaError_t grouped_ffn_down_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                   const GroupedFfnSm90aOptions& options, const void* hidden,
                                   cudaStream_t stream) {
  return options.multicasts_weights ? choose_type<2>(params, device, options, hidden, stream)
                                    : choose_type<1>(params, device, options, hidden, stream);
}

}  // namespace sparse_unified
