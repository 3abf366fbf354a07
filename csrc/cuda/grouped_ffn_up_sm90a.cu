// SPDX-License-Identifier: Apache-2.0
// Up-projection of grouped_ffn on Hopper, each block on its own.
#include "cuda/grouped_ffn_up_sm90a.h"

#include <algorithm>
#include <atomic>

namespace sparse_unified {
namespace {

template <typename T, bool kFencesProducer>
cudaError_t choose_up(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                      GroupedFfnSm90aUpTile tile, void* hidden, cudaStream_t stream) {
  using enum GroupedFfnSm90aUpTile;
  using up_sm90a::run;
  switch (tile) {
    case k240x4:
      return run<T, k240x4, kFencesProducer, 1>(params, device, hidden, stream);
    case k240x3:
      return run<T, k240x3, kFencesProducer, 1>(params, device, hidden, stream);
    case k256x4:
      return run<T, k256x4, kFencesProducer, 1>(params, device, hidden, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t choose_fence(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                         const GroupedFfnSm90aOptions& options, void* hidden, cudaStream_t stream) {
  return options.fences_producer ? choose_up<T, true>(params, device, options.up, hidden, stream)
                                 : choose_up<T, false>(params, device, options.up, hidden, stream);
}

}  // namespace

bool grouped_ffn_sm90a_is_compiled() {
#if defined(SPARSE_UNIFIED_EMULATION)
  return true;
#else
  // NOTE: code for an older architecture, compiled again at load, leaves the bodies empty. Asked on
  // a Hopper device alone; a failure, of memory say, is not remembered.
  static std::atomic<bool> is_compiled{false};
  if (is_compiled) return true;
  cudaFuncAttributes attributes{};
  constexpr GroupedFfnSm90aTile kAny = kGroupedFfnSm90aUpTiles[0];
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, up_sm90a::kernel<BFloat16, kAny.n, kAny.num_stages, false, 1>);
  if (error != cudaSuccess) cudaGetLastError();
  is_compiled = error == cudaSuccess && attributes.ptxVersion >= 90;
  return is_compiled;
#endif
}

int64_t grouped_ffn_sm90a_padded_rows(int64_t num_rows, int64_t num_groups) {
  return std::max<int64_t>(max_row_tiles(num_rows, num_groups, kSm90aTileRows), 1) * kSm90aTileRows;
}

cudaError_t grouped_ffn_up_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                 const GroupedFfnSm90aOptions& options, void* hidden,
                                 cudaStream_t stream) {
  if (options.multicasts_weights) {
    return grouped_ffn_up_sm90a_multicast(params, device, options.up, hidden, stream);
  }
  return params.dtype == DType::kBFloat16
             ? choose_fence<BFloat16>(params, device, options, hidden, stream)
             : choose_fence<Float16>(params, device, options, hidden, stream);
}

}  // namespace sparse_unified
