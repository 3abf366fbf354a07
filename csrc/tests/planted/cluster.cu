// SPDX-License-Identifier: Apache-2.0
// Two blocks that fill each other's stages: each brings one box of a stage to both of them.
#include "device/cluster.h"

#include "device/pipeline_sm90a.h"
#include "device/tensor_copy.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kBlocks = 2;
constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 64;  // of 16 bits
constexpr int kBoxBytes = kBoxRows * kSwizzleRowBytes;
constexpr int kStageBytes = kBlocks * kBoxBytes;
constexpr int kStageInts = kStageBytes / 4;
constexpr int kRowInts = kSwizzleRowBytes / 4;
constexpr int kStages = 2;
constexpr int kTiles = 5;
constexpr int kBarrierOffset = kStages * kStageBytes;
using Ring = RingBarriers<kStages, kBlocks>;

enum class Mistake {
  kNone,
  kReleasesOwnAlone,
  kReleasesOwnTwice,
  kBringsToOneAlone,
  kExpectsOwnAlone,
  kLeavesAtOnce,
  kUsesAtOnce,
  kNoFence,
  kSitsOut,
  kWaitsAtOther,
};

struct ClusterParams {
  TensorMap in;  // [kTiles * 16, 64] of 16 bits
  int32_t* out;  // [kBlocks, kTiles, kStageInts]
};

SPARSE_UNIFIED_DEVICE Ring cluster_ring() {
  return {shared_address(dynamic_shared_memory()) + kBarrierOffset};
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void produce(const ClusterParams& p) {
  const Ring ring = cluster_ring();
  const int rank = cluster_rank();
  constexpr int kExpected = kMistake == Mistake::kExpectsOwnAlone ? kBoxBytes : kStageBytes;
  const bool brings_to_one = kMistake == Mistake::kBringsToOneAlone && rank == 1;
  const auto blocks = static_cast<uint16_t>(brings_to_one ? 0b10 : 0b11);
  RingPosition<kStages> at;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    ring.wait_empty(at);
    const uint32_t full = ring.full(at.stage);
    barrier_arrive_expect_bytes(full, kExpected);
    const int offset = at.stage * kStageBytes + rank * kBoxBytes;
    load_box_to_blocks(shared_address(dynamic_shared_memory()) + static_cast<uint32_t>(offset),
                       &p.in, (tile * kBlocks + rank) * kBoxRows, 0, full, blocks);
  }
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void release(const Ring& ring, int stage) {
  if (kMistake == Mistake::kReleasesOwnAlone) {
    if (lane_idx() == 0) barrier_arrive(ring.empty(stage));
  } else if (kMistake == Mistake::kReleasesOwnTwice) {
    if (lane_idx() < kBlocks) {
      barrier_arrive_cluster(map_to_block(ring.empty(stage), cluster_rank()));
    }
  } else {
    ring.release(stage);
  }
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void consume(const ClusterParams& p) {
  const Ring ring = cluster_ring();
  int32_t* out = p.out + cluster_rank() * kTiles * kStageInts;
  RingPosition<kStages> at;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    if (kMistake == Mistake::kWaitsAtOther) {
      barrier_wait(map_to_block(ring.full(at.stage), cluster_rank() ^ 1), at.pass);
    } else {
      ring.wait_full(at);
    }
    for (int i = lane_idx(); i < kStageInts; i += kWarpSize) {
      const int word = i % kRowInts;
      const int offset =
          at.stage * kStageBytes + swizzled_offset(i / kRowInts, word / 4) + word % 4 * 4;
      out[tile * kStageInts + i] = shared_ints()[offset / 4];
    }
    sync_warp();
    release<kMistake>(ring, at.stage);
  }
}

// Warp 0 produces, warp 1 consumes.
template <Mistake kMistake>
__global__ void cluster_kernel(const ClusterParams p) {
  const Ring ring = cluster_ring();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), kMistake == Mistake::kReleasesOwnAlone ? 1 : kBlocks);
    }
    if (kMistake != Mistake::kNoFence) fence_barrier_init();
  }
  if (kMistake == Mistake::kUsesAtOnce) {
    sync_threads();
  } else {
    sync_cluster();
  }
  const bool takes_part = kMistake != Mistake::kSitsOut || cluster_rank() == 0;
  if (warp_idx() == 1) {
    if (takes_part) consume<kMistake>(p);
  } else if (elect_lane()) {
    if (takes_part) produce<kMistake>(p);
  }
  if (kMistake != Mistake::kLeavesAtOnce) sync_cluster();
}

template <Mistake kMistake>
std::string run_cluster(bool is_planted) {
  constexpr int kInts = kTiles * kStageInts;
  const auto launch_on = [&](auto& in, auto& out) {
    ClusterParams params{};
    make_tensor_map(&params.in, DType::kBFloat16, in.get(), kTiles * kBlocks * kBoxRows,
                    kBoxColumns, kBoxColumns, kBoxRows, kBoxColumns, true);
    params.out = out.get();
    LaunchConfig config{dim3(kBlocks), 2 * kWarpSize, kBarrierOffset + Ring::kBytes};
    config.cluster_blocks = kBlocks;
    launch(is_planted ? cluster_kernel<kMistake> : cluster_kernel<Mistake::kNone>, config, params);
  };
  return run_on(kBlocks * kInts, launch_on, [](auto& in, int i) { return in[i % kInts]; });
}

}  // namespace

std::string released_by_own_block(bool is_planted) {
  return run_cluster<Mistake::kReleasesOwnAlone>(is_planted);
}
std::string released_to_wrong_block(bool is_planted) {
  return run_cluster<Mistake::kReleasesOwnTwice>(is_planted);
}
std::string box_to_one_block(bool is_planted) {
  return run_cluster<Mistake::kBringsToOneAlone>(is_planted);
}
std::string bytes_of_other_block(bool is_planted) {
  return run_cluster<Mistake::kExpectsOwnAlone>(is_planted);
}
std::string block_leaves_early(bool is_planted) {
  return run_cluster<Mistake::kLeavesAtOnce>(is_planted);
}
std::string cluster_used_at_once(bool is_planted) {
  return run_cluster<Mistake::kUsesAtOnce>(is_planted);
}
std::string cluster_not_fenced(bool is_planted) {
  return run_cluster<Mistake::kNoFence>(is_planted);
}
std::string block_sits_out(bool is_planted) { return run_cluster<Mistake::kSitsOut>(is_planted); }
std::string wait_at_other_block(bool is_planted) {
  return run_cluster<Mistake::kWaitsAtOther>(is_planted);
}

}  // namespace sparse_unified::planted
