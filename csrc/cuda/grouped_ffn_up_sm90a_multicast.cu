// SPDX-License-Identifier: Apache-2.0
// Up-projection of grouped_ffn on Hopper, two blocks sharing the weights.
#include "cuda/grouped_ffn_up_sm90a.h"

namespace sparse_unified {
namespace {

template <typename T>
cudaError_t choose_up(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                      GroupedFfnSm90aUpTile tile, void* hidden, cudaStream_t stream) {
  using enum GroupedFfnSm90aUpTile;
  using up_sm90a::run;
  switch (tile) {
    case k240x4:
      return run<T, k240x4, false, 2>(params, device, hidden, stream);
    case k240x3:
      return run<T, k240x3, false, 2>(params, device, hidden, stream);
    case k256x4:
      return run<T, k256x4, false, 2>(params, device, hidden, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t grouped_ffn_up_sm90a_multicast(const GroupedFfnCudaParams& params,
                                           const DeviceInfo& device, GroupedFfnSm90aUpTile tile,
                                           void* hidden, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? choose_up<BFloat16>(params, device, tile, hidden, stream)
             : choose_up<Float16>(params, device, tile, hidden, stream);
}

}  // namespace sparse_unified
