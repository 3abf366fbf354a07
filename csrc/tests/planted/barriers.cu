// SPDX-License-Identifier: Apache-2.0
// Barriers that are missing, and collectives that not all threads reach.
#include "device/warp.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kThreads = 64;
constexpr LaunchConfig kConfig{dim3(1), kThreads, kThreads * 4};

template <bool kIsPlanted>
__global__ void missing_barrier_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  shared_ints()[t] = p.in[t];
  if (!kIsPlanted) sync_threads();
  p.out[t] = shared_ints()[kThreads - 1 - t];
}

template <bool kIsPlanted>
__global__ void missing_warp_sync_kernel(const Params p) {
  const int lane = lane_idx();
  shared_ints()[lane] = p.in[lane];
  if (kIsPlanted) {
    ballot(true);
  } else {
    sync_warp();
  }
  p.out[lane] = shared_ints()[kWarpSize - 1 - lane];
}

template <bool kIsPlanted>
__global__ void stage_still_read_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  int32_t sum = 0;
  for (int tile = 0; tile < p.n; tile += kThreads) {
    shared_ints()[t] = p.in[tile + t];
    sync_threads();
    sum += shared_ints()[kThreads - 1 - t];
    if (!kIsPlanted) sync_threads();
    p.out[tile + t] = sum;
  }
}

template <bool kIsPlanted>
__global__ void missing_arrival_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  p.out[t] = p.in[t];
  if (kIsPlanted && t == 17) return;
  sync_threads();
}

template <bool kIsPlanted>
__global__ void different_collectives_kernel(const Params p) {
  const int lane = lane_idx();
  int32_t value = p.in[lane];
  if (lane < 16 || !kIsPlanted) {
    value = shuffle_xor(value, 0);
  } else {
    ballot(value != 0);
  }
  p.out[lane] = value;
}

template <bool kIsPlanted>
__global__ void exited_lanes_kernel(const Params p) {
  const int lane = lane_idx();
  if (kIsPlanted && lane >= p.n) return;
  const int32_t value = shuffle(lane < p.n ? p.in[lane] : 0, lane);
  if (lane < p.n) p.out[lane] = value;
}

int32_t reversed(emulation::DeviceArray<int32_t>& in, int i) {
  return in[static_cast<int>(in.size()) - 1 - i];
}

}  // namespace

std::string missing_barrier(bool is_planted) {
  return run(is_planted ? missing_barrier_kernel<true> : missing_barrier_kernel<false>, kConfig,
             kThreads, reversed);
}
std::string missing_warp_sync(bool is_planted) {
  return run(is_planted ? missing_warp_sync_kernel<true> : missing_warp_sync_kernel<false>,
             {dim3(1), kWarpSize, kWarpSize * 4}, kWarpSize, reversed);
}
std::string stage_still_read(bool is_planted) {
  return run(is_planted ? stage_still_read_kernel<true> : stage_still_read_kernel<false>, kConfig,
             3 * kThreads, [](emulation::DeviceArray<int32_t>& in, int i) {
               int32_t sum = 0;
               for (int tile = 0; tile <= i / kThreads; ++tile) {
                 sum += in[tile * kThreads + kThreads - 1 - i % kThreads];
               }
               return sum;
             });
}
std::string missing_arrival(bool is_planted) {
  return run(is_planted ? missing_arrival_kernel<true> : missing_arrival_kernel<false>, kConfig,
             kThreads, same);
}
std::string different_collectives(bool is_planted) {
  return run(is_planted ? different_collectives_kernel<true> : different_collectives_kernel<false>,
             {dim3(1), kWarpSize}, kWarpSize, same);
}
std::string exited_lanes(bool is_planted) {
  return run(is_planted ? exited_lanes_kernel<true> : exited_lanes_kernel<false>,
             {dim3(1), kWarpSize}, 20, same);
}

}  // namespace sparse_unified::planted
