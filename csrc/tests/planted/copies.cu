// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies that are read too early.
#include "device/async_copy.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kThreads = 32;
constexpr int kCopyInts = 4;                 // of one copy
constexpr int kTile = kThreads * kCopyInts;  // ints that a block copies at once
constexpr int kTiles = 5;
constexpr int kStages = 3;

SPARSE_UNIFIED_DEVICE void copy_tile(const Params& p, int tile, int stage) {
  const int first = static_cast<int>(threadIdx.x) * kCopyInts;
  copy_async_16(shared_address(shared_ints() + stage * kTile + first), p.in + tile * kTile + first,
                16);
}

SPARSE_UNIFIED_DEVICE void store_tile(const Params& p, int tile, int stage, int turn) {
  const int first = (static_cast<int>(threadIdx.x) + turn) % kThreads * kCopyInts;
  for (int i = 0; i < kCopyInts; ++i) {
    p.out[tile * kTile + first + i] = shared_ints()[stage * kTile + first + i];
  }
}

template <bool kIsPlanted>
__global__ void read_before_wait_kernel(const Params p) {
  copy_tile(p, 0, 0);
  copy_async_commit();
  if (!kIsPlanted) copy_async_wait<0>();
  store_tile(p, 0, 0, 0);
  copy_async_wait<0>();
}

// Tile t lies in stage t % kStages; kStages - 1 groups are under way before tile t is waited for.
template <bool kIsPlanted>
__global__ void wait_off_by_one_kernel(const Params p) {
  for (int tile = 0; tile < kStages - 1; ++tile) {
    copy_tile(p, tile, tile);
    copy_async_commit();
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    copy_async_wait<kIsPlanted ? kStages - 1 : kStages - 2>();
    sync_threads();
    const int next = tile + kStages - 1;
    if (next < kTiles) copy_tile(p, next, next % kStages);
    copy_async_commit();
    store_tile(p, tile, tile % kStages, 1);
  }
}

template <bool kIsPlanted>
__global__ void read_without_barrier_kernel(const Params p) {
  copy_tile(p, 0, 0);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kIsPlanted) sync_threads();
  store_tile(p, 0, 0, 1);
}

constexpr LaunchConfig kConfig{dim3(1), kThreads, kStages * kTile * 4};

}  // namespace

std::string read_before_wait(bool is_planted) {
  return run(is_planted ? read_before_wait_kernel<true> : read_before_wait_kernel<false>, kConfig,
             kTile, same);
}
std::string wait_off_by_one(bool is_planted) {
  return run(is_planted ? wait_off_by_one_kernel<true> : wait_off_by_one_kernel<false>, kConfig,
             kTiles * kTile, same);
}
std::string read_without_barrier(bool is_planted) {
  return run(is_planted ? read_without_barrier_kernel<true> : read_without_barrier_kernel<false>,
             kConfig, kTile, same);
}

}  // namespace sparse_unified::planted
