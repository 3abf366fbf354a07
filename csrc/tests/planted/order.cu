// SPDX-License-Identifier: Apache-2.0
// Kernels that are right only when warps, lanes or blocks happen to run in one order.
#include "device/vector.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

// Warp 0 fills a table that all warps look up.
template <bool kIsPlanted>
__global__ void first_warp_first_kernel(const Params p) {
  if (warp_idx() == 0) shared_ints()[lane_idx()] = p.in[lane_idx()];
  if (!kIsPlanted) sync_threads();
  const int t = static_cast<int>(threadIdx.x);
  p.out[t] = shared_ints()[lane_idx()] + p.in[t] - p.in[lane_idx()];
}

template <bool kIsPlanted>
__global__ void lanes_in_order_kernel(const Params p) {
  const int lane = lane_idx();
  if (kIsPlanted || lane == kWarpSize - 1) shared_ints()[0] = lane;
  sync_warp();
  p.out[lane] = p.in[lane] + shared_ints()[0] - (kWarpSize - 1);
}

template <bool kIsPlanted>
__global__ void blocks_in_order_kernel(const Params p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int before = i - kThreads;
  const bool is_first = blockIdx.x == 0;
  p.out[i] = is_first || !kIsPlanted ? p.in[i] : p.out[before] + p.in[i] - p.in[before];
}

template <bool kIsPlanted>
__global__ void constant_written_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  p.out[t] = p.in[t];
  sync_threads();
  const auto* source = p.out + 4 * (t / 4);
  const Vector16 vector = kIsPlanted ? load_vector_once(source) : load_vector(source);
  sync_threads();
  p.out[t] = static_cast<int32_t>(vector.words[t % 4]);
}

}  // namespace

std::string first_warp_first(bool is_planted) {
  return run(is_planted ? first_warp_first_kernel<true> : first_warp_first_kernel<false>,
             {dim3(1), kThreads, kWarpSize * 4}, kThreads, same);
}
std::string lanes_in_order(bool is_planted) {
  return run(is_planted ? lanes_in_order_kernel<true> : lanes_in_order_kernel<false>,
             {dim3(1), kWarpSize, 4}, kWarpSize, same);
}
std::string blocks_in_order(bool is_planted) {
  return run(is_planted ? blocks_in_order_kernel<true> : blocks_in_order_kernel<false>,
             {dim3(kBlocks), kThreads}, kBlocks * kThreads, same);
}
std::string constant_written(bool is_planted) {
  return run(is_planted ? constant_written_kernel<true> : constant_written_kernel<false>,
             {dim3(1), kThreads}, kThreads, same);
}

}  // namespace sparse_unified::planted
