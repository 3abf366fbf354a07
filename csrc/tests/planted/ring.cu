// SPDX-License-Identifier: Apache-2.0
// Boxes that TMA brings through a ring of stages: phases, expected bytes, stages in use, and the
// barriers themselves.
#include "device/pipeline_sm90a.h"
#include "device/tensor_copy.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kBoxRows = 8;
constexpr int kBoxColumns = 64;  // of 16 bits
constexpr int kBoxBytes = kBoxRows * kSwizzleRowBytes;
constexpr int kBoxes = 2;  // of a stage
constexpr int kStageBytes = kBoxes * kBoxBytes;
constexpr int kStageInts = kStageBytes / 4;
constexpr int kRowInts = kSwizzleRowBytes / 4;
constexpr int kStages = 2;
constexpr int kTiles = 5;
constexpr int kBarrierOffset = kStages * kStageBytes;
constexpr int kSharedBytes = kBarrierOffset + RingBarriers<kStages>::kBytes;
constexpr LaunchConfig kConfig{dim3(1), 2 * kWarpSize, kSharedBytes};

enum class Mistake {
  kNone,
  kPhaseNeverFlips,
  kPhaseFlipsEarly,
  kTooManyBytes,
  kTooFewBytes,
  kMoreBytesAtEnd,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kReleasesBeforeRead,
  kReadsUnswizzled,
  kLanesFallBehind,
  kNoInit,
  kNoSync,
  kNoFence,
  kWritesOver,
  kInitsTwice,
  kArrivesTwice,
};

struct RingParams {
  TensorMap in;  // [kTiles * 16, 64] of 16 bits
  int32_t* out;
};

SPARSE_UNIFIED_DEVICE RingBarriers<kStages> ring_barriers() {
  return {shared_address(dynamic_shared_memory()) + kBarrierOffset};
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void produce(const RingParams& p) {
  constexpr int kExpected = kMistake == Mistake::kTooManyBytes  ? kStageBytes + 16
                            : kMistake == Mistake::kTooFewBytes ? kBoxBytes
                                                                : kStageBytes;
  const RingBarriers<kStages> ring = ring_barriers();
  RingPosition<kStages> at;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    if (kMistake != Mistake::kNoWaitForEmpty) ring.wait_empty(at);
    const uint32_t full = ring.full(at.stage);
    barrier_arrive_expect_bytes(full, kExpected);
    for (int box = 0; box < kBoxes; ++box) {
      const int offset = at.stage * kStageBytes + box * kBoxBytes;
      load_box(shared_address(dynamic_shared_memory()) + static_cast<uint32_t>(offset), &p.in,
               (tile * kBoxes + box) * kBoxRows, 0, full);
    }
  }
  if (kMistake == Mistake::kMoreBytesAtEnd) {
    ring.wait_empty(at);
    barrier_arrive_expect_bytes(ring.full(at.stage), 16);
  }
}

// Integer i of a stage.
template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE int32_t read_stage(int stage, int i) {
  const int row = i / kRowInts;
  const int word = i % kRowInts;
  const int offset =
      kMistake == Mistake::kReadsUnswizzled ? i * 4 : swizzled_offset(row, word / 4) + word % 4 * 4;
  return shared_ints()[(stage * kStageBytes + offset) / 4];
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void consume(const RingParams& p) {
  const RingBarriers<kStages> ring = ring_barriers();
  RingPosition<kStages> at;
  if (kMistake == Mistake::kPhaseFlipsEarly) at.pass = 1;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    if (kMistake == Mistake::kPhaseNeverFlips) at.pass = 0;
    if (kMistake != Mistake::kNoWaitForFull) ring.wait_full(at);
    if (kMistake == Mistake::kReleasesBeforeRead) {
      sync_warp();
      if (lane_idx() == 0) barrier_arrive(ring.empty(at.stage));
    }
    for (int i = lane_idx(); i < kStageInts; i += kWarpSize) {
      p.out[tile * kStageInts + i] = read_stage<kMistake>(at.stage, i);
    }
    sync_warp();
    if (kMistake != Mistake::kReleasesBeforeRead && lane_idx() == 0) {
      barrier_arrive(ring.empty(at.stage));
      if (kMistake == Mistake::kArrivesTwice) barrier_arrive(ring.empty(at.stage));
    }
  }
}

// One lane alone reads the stages; without sync_warp the others may come to their wait late.
template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void consume_by_one_lane(const RingParams& p) {
  const RingBarriers<kStages> ring = ring_barriers();
  RingPosition<kStages> at;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    ring.wait_full(at);
    if (kMistake != Mistake::kLanesFallBehind) sync_warp();
    if (lane_idx() != 0) continue;
    for (int i = 0; i < kStageInts; ++i) {
      p.out[tile * kStageInts + i] = read_stage<kMistake>(at.stage, i);
    }
    barrier_arrive(ring.empty(at.stage));
  }
}

// Warp 0 produces, warp 1 consumes.
template <Mistake kMistake, bool kIsReadByOneLane>
__global__ void ring_kernel(const RingParams p) {
  const RingBarriers<kStages> ring = ring_barriers();
  if (threadIdx.x == 0 && kMistake != Mistake::kNoInit) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(ring.full(stage), 1);
      barrier_init(ring.empty(stage), 1);
    }
    if (kMistake == Mistake::kInitsTwice) barrier_init(ring.full(0), 1);
    if (kMistake == Mistake::kWritesOver) shared_ints()[kBarrierOffset / 4 + 1] = 0;
    if (kMistake != Mistake::kNoFence) fence_barrier_init();
  }
  if (kMistake != Mistake::kNoSync) sync_threads();
  if (warp_idx() == 0) {
    if (elect_lane()) produce<kMistake>(p);
  } else if (kIsReadByOneLane) {
    consume_by_one_lane<kMistake>(p);
  } else {
    consume<kMistake>(p);
  }
}

template <Mistake kMistake, bool kIsReadByOneLane = false>
std::string run_ring(bool is_planted) {
  const auto launch_on = [&](auto& in, auto& out) {
    RingParams params{};
    const int num_rows = kTiles * kBoxes * kBoxRows;
    make_tensor_map(&params.in, DType::kBFloat16, in.get(), num_rows, kBoxColumns, kBoxColumns,
                    kBoxRows, kBoxColumns, true);
    params.out = out.get();
    launch(is_planted ? ring_kernel<kMistake, kIsReadByOneLane>
                      : ring_kernel<Mistake::kNone, kIsReadByOneLane>,
           kConfig, params);
  };
  return run_on(kTiles * kStageInts, launch_on, same);
}

}  // namespace

std::string phase_never_flips(bool is_planted) {
  return run_ring<Mistake::kPhaseNeverFlips>(is_planted);
}
std::string phase_flips_early(bool is_planted) {
  return run_ring<Mistake::kPhaseFlipsEarly>(is_planted);
}
std::string too_many_bytes(bool is_planted) { return run_ring<Mistake::kTooManyBytes>(is_planted); }
std::string too_few_bytes(bool is_planted) { return run_ring<Mistake::kTooFewBytes>(is_planted); }
std::string more_bytes_at_end(bool is_planted) {
  return run_ring<Mistake::kMoreBytesAtEnd>(is_planted);
}
std::string full_not_waited_for(bool is_planted) {
  return run_ring<Mistake::kNoWaitForFull>(is_planted);
}
std::string empty_not_waited_for(bool is_planted) {
  return run_ring<Mistake::kNoWaitForEmpty>(is_planted);
}
std::string released_before_read(bool is_planted) {
  return run_ring<Mistake::kReleasesBeforeRead>(is_planted);
}
std::string box_read_unswizzled(bool is_planted) {
  return run_ring<Mistake::kReadsUnswizzled>(is_planted);
}
std::string lanes_fall_behind(bool is_planted) {
  return run_ring<Mistake::kLanesFallBehind, true>(is_planted);
}
std::string barrier_not_initialised(bool is_planted) {
  return run_ring<Mistake::kNoInit>(is_planted);
}
std::string barrier_used_at_once(bool is_planted) { return run_ring<Mistake::kNoSync>(is_planted); }
std::string barrier_not_fenced(bool is_planted) { return run_ring<Mistake::kNoFence>(is_planted); }
std::string barrier_written_over(bool is_planted) {
  return run_ring<Mistake::kWritesOver>(is_planted);
}
std::string barrier_twice(bool is_planted) { return run_ring<Mistake::kInitsTwice>(is_planted); }
std::string one_arrival_too_many(bool is_planted) {
  return run_ring<Mistake::kArrivesTwice>(is_planted);
}

}  // namespace sparse_unified::planted
