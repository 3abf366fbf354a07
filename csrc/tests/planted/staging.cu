// SPDX-License-Identifier: Apache-2.0
// Tiles that threads write into shared memory and TMA stores from there; barriers of a part of the
// block.
#include "device/tensor_copy.h"
#include "device/warpgroup.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kThreads = 64;
constexpr int kTileRows = 2;
constexpr int kTileColumns = 64;  // of 16 bits
constexpr int kTileInts = kTileRows * kTileColumns / 2;
constexpr int kTiles = 3;
constexpr LaunchConfig kConfig{dim3(1), kThreads, kTileInts * 4};
static_assert(kTileInts == kThreads);

enum class Mistake {
  kNone,
  kNoFence,
  kNoSync,
  kNoWait,
  kNoCommit,
  kNoWaitForRead,
  kCountsTooMany,
  kCountsTooFew,
  kCountsDisagree,
};

struct StagingParams {
  const int32_t* in;
  TensorMap out;  // [kTiles * 2, 64] of 16 bits
};

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void sync_writers() {
  const int num_threads = kMistake == Mistake::kCountsTooMany    ? 2 * kThreads
                          : kMistake == Mistake::kCountsTooFew   ? kWarpSize
                          : kMistake == Mistake::kCountsDisagree ? kThreads + warp_idx() * kWarpSize
                                                                 : kThreads;
  sync_named(1, num_threads);
}

template <Mistake kMistake>
__global__ void staging_kernel(const StagingParams p) {
  const int t = static_cast<int>(threadIdx.x);
  for (int tile = 0; tile < kTiles; ++tile) {
    if (t == 0 && kMistake != Mistake::kNoWaitForRead) store_wait_read<0>();
    sync_writers<kMistake>();
    // In another order than that of the warps, so that each half needs both of them.
    shared_ints()[(t + kWarpSize / 2) % kThreads] =
        p.in[tile * kTileInts + (t + kWarpSize / 2) % kThreads];
    if (kMistake != Mistake::kNoFence) fence_async_proxy();
    if (kMistake != Mistake::kNoSync) sync_writers<kMistake>();
    if (t == 0) {
      store_box(&p.out, tile * kTileRows, 0, shared_address(shared_ints()));
      if (kMistake != Mistake::kNoCommit) store_commit();
    }
  }
  if (t == 0 && kMistake != Mistake::kNoWait) store_wait<0>();
}

template <Mistake kMistake>
std::string run_staging(bool is_planted) {
  const auto launch_on = [&](auto& in, auto& out) {
    StagingParams params{};
    params.in = in.get();
    make_tensor_map(&params.out, DType::kBFloat16, out.get(), kTiles * kTileRows, kTileColumns,
                    kTileColumns, kTileRows, kTileColumns, false);
    launch(is_planted ? staging_kernel<kMistake> : staging_kernel<Mistake::kNone>, kConfig, params);
  };
  return run_on(kTiles * kTileInts, launch_on, same);
}

}  // namespace

std::string store_without_fence(bool is_planted) {
  return run_staging<Mistake::kNoFence>(is_planted);
}
std::string store_without_sync(bool is_planted) {
  return run_staging<Mistake::kNoSync>(is_planted);
}
std::string store_not_waited_for(bool is_planted) {
  return run_staging<Mistake::kNoWait>(is_planted);
}
std::string store_not_committed(bool is_planted) {
  return run_staging<Mistake::kNoCommit>(is_planted);
}
std::string staging_overwritten(bool is_planted) {
  return run_staging<Mistake::kNoWaitForRead>(is_planted);
}
std::string named_barrier_too_wide(bool is_planted) {
  return run_staging<Mistake::kCountsTooMany>(is_planted);
}
std::string named_barrier_too_narrow(bool is_planted) {
  return run_staging<Mistake::kCountsTooFew>(is_planted);
}
std::string named_barrier_disagreement(bool is_planted) {
  return run_staging<Mistake::kCountsDisagree>(is_planted);
}

}  // namespace sparse_unified::planted
