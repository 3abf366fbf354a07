// SPDX-License-Identifier: Apache-2.0
// A small copy of the Hopper kernels: a warpgroup gathers rows by cp.async and has TMA bring the
// other operand, a second one multiplies them by wgmma.
#include "device/async_copy.h"
#include "device/pipeline_sm90a.h"
#include "device/tensor_copy.h"
#include "device/vector.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kRows = 64;     // M
constexpr int kColumns = 16;  // N
constexpr int kTileK = 64;    // of a stage
constexpr int kTiles = 4;     //
constexpr int kK = kTiles * kTileK;
constexpr int kStages = 2;
constexpr int kRowsBytes = kRows * kSwizzleRowBytes;
constexpr int kBoxBytes = kColumns * kSwizzleRowBytes;
constexpr int kStageBytes = kRowsBytes + kBoxBytes;
constexpr int kBarrierOffset = kStages * kStageBytes;
constexpr int kSharedBytes = kBarrierOffset + RingBarriers<kStages>::kBytes;
constexpr LaunchConfig kConfig{dim3(1), 2 * kWarpgroupSize, kSharedBytes};
constexpr int kRowChunks = kSwizzleRowBytes / kVectorBytes;
constexpr int kAccumulators = kColumns / 2;  // of a thread

enum class Mistake {
  kNone,
  kRowsUnswizzled,
  kBoxUnswizzled,
  kOtherMajor,
  kDescriptorUnswizzled,
  kDescriptorNarrow,
  kNoProxyFence,
  kProxyFenceBeforeWait,
  kArrivesBeforeCopies,
  kReadsBeforeWait,
  kWaitLeavesAGroup,
  kNoCommit,
  kNoWgmmaFence,
  kReleasesBeforeWait,
  kNoWaitForEmpty,
  kWarpsDiffer,
  kWarpLeftOut,
  kNarrowProduct,
};

struct ProductParams {
  const BFloat16* rows;  // [64, 256]
  TensorMap columns;     // [16, 256]
  float* out;            // [64, 16]
};

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void produce(const ProductParams& p, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % kRowChunks;
  RingPosition<kStages> at;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    if (kMistake != Mistake::kNoWaitForEmpty) ring.wait_empty(at);
    const uint32_t stage = shared + static_cast<uint32_t>(at.stage * kStageBytes);
    const uint32_t full = ring.full(at.stage);
    if (thread == 0) {
      barrier_arrive_expect_bytes(full, kBoxBytes);
      load_box(stage + kRowsBytes, &p.columns, 0, tile * kTileK, full);
    }
    for (int row = thread / kRowChunks; row < kRows; row += kWarpgroupSize / kRowChunks) {
      const int offset = kMistake == Mistake::kRowsUnswizzled
                             ? row * kSwizzleRowBytes + chunk * kVectorBytes
                             : swizzled_offset(row, chunk);
      copy_async_16(stage + static_cast<uint32_t>(offset),
                    p.rows + row * kK + tile * kTileK + chunk * kVectorElements<BFloat16>,
                    kVectorBytes);
    }
    if (kMistake == Mistake::kArrivesBeforeCopies) {
      copy_async_commit();
      barrier_arrive(full);
    } else {
      barrier_arrive_after_copies(full);
    }
  }
  if (kMistake == Mistake::kArrivesBeforeCopies) copy_async_wait<0>();
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void multiply_stage(float (&d)[kAccumulators], uint32_t stage,
                                          bool is_first) {
  constexpr Major kMajor = kMistake == Mistake::kOtherMajor ? Major::kMN : Major::kK;
  uint64_t rows = operand_descriptor(stage, Major::kK);
  const uint64_t columns = operand_descriptor(
      stage + kRowsBytes, Major::kK, 16,
      kMistake == Mistake::kDescriptorNarrow ? kNarrowRowBytes : kSwizzleRowBytes);
  if (kMistake == Mistake::kDescriptorUnswizzled) rows &= ~(uint64_t{3} << 62);
  if (kMistake == Mistake::kWarpsDiffer && warp_idx() % 4 == 2) rows = columns;
  if (kMistake == Mistake::kWarpLeftOut && warp_idx() % 4 == 2) return;
  if (kMistake != Mistake::kNoWgmmaFence) wgmma_fence();
  for (int step = 0; step < kTileK / 16; ++step) {
    constexpr int kN = kMistake == Mistake::kNarrowProduct ? kColumns / 2 : kColumns;
    wgmma<BFloat16, kN, kMajor>(d, rows + step * kDescriptorStepK,
                                columns + step * kDescriptorStepK, !is_first || step > 0);
  }
  if (kMistake != Mistake::kNoCommit) wgmma_commit();
}

template <Mistake kMistake>
SPARSE_UNIFIED_DEVICE void consume(const ProductParams& p, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  float d[kAccumulators] = {};
  RingPosition<kStages> at;
  int previous_stage = 0;
  for (int tile = 0; tile < kTiles; ++tile, at.advance()) {
    if (kMistake == Mistake::kProxyFenceBeforeWait) fence_async_proxy();
    ring.wait_full(at);
    if (kMistake != Mistake::kNoProxyFence && kMistake != Mistake::kProxyFenceBeforeWait) {
      fence_async_proxy();
    }
    multiply_stage<kMistake>(d, shared + static_cast<uint32_t>(at.stage * kStageBytes), tile == 0);
    const bool is_first_lane = lane_idx() == 0;
    if (kMistake == Mistake::kReleasesBeforeWait) {
      if (is_first_lane) barrier_arrive(ring.empty(at.stage));
      wgmma_wait<1>();
    } else {
      wgmma_wait<1>();
      if (is_first_lane && tile > 0) barrier_arrive(ring.empty(previous_stage));
    }
    previous_stage = at.stage;
  }
  const auto store = [&] {
    const int warp = warp_idx() % 4;
    for (int i = 0; i < kAccumulators; ++i) {
      const int row = 16 * warp + lane_idx() / 4 + 8 * (i / 2 % 2);
      p.out[row * kColumns + 8 * (i / 4) + 2 * (lane_idx() % 4) + i % 2] = d[i];
    }
  };
  if (kMistake == Mistake::kReadsBeforeWait) store();
  if (kMistake == Mistake::kWaitLeavesAGroup) {
    wgmma_wait<1>();
  } else {
    wgmma_finish(d);
  }
  if (kMistake != Mistake::kReadsBeforeWait) store();
}

template <Mistake kMistake>
__global__ void products_kernel(const ProductParams p) {
  const uint32_t shared = shared_address(dynamic_shared_memory());
  const RingBarriers<kStages> ring{shared + kBarrierOffset};
  if (threadIdx.x == 0) ring.init(kWarpgroupSize + 1, kWarpgroupSize / kWarpSize);
  sync_threads();
  if (warp_idx() < kWarpgroupSize / kWarpSize) {
    produce<kMistake>(p, shared, ring);
  } else {
    consume<kMistake>(p, shared, ring);
  }
}

// Small integers, so that every sum is exact.
float row_value(int m, int k) { return static_cast<float>((5 * m + 3 * k) % 7 - 3); }
float column_value(int n, int k) { return static_cast<float>((2 * n + k) % 5 - 2); }

template <Mistake kMistake>
std::string run_products(bool is_planted) {
  emulation::DeviceArray<BFloat16> rows(kRows * kK);
  emulation::DeviceArray<BFloat16> columns(kColumns * kK);
  emulation::DeviceArray<float> out(kRows * kColumns);
  for (int k = 0; k < kK; ++k) {
    for (int m = 0; m < kRows; ++m) rows[m * kK + k] = from_float<BFloat16>(row_value(m, k));
    for (int n = 0; n < kColumns; ++n) {
      columns[n * kK + k] = from_float<BFloat16>(column_value(n, k));
    }
  }
  ProductParams params{rows.get(), {}, out.get()};
  const bool is_swizzled = !is_planted || kMistake != Mistake::kBoxUnswizzled;
  make_tensor_map(&params.columns, DType::kBFloat16, columns.get(), kColumns, kK, kK, kColumns,
                  kTileK, is_swizzled);
  launch(is_planted ? products_kernel<kMistake> : products_kernel<Mistake::kNone>, kConfig, params);
  out.check_guards("out");
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      float expected = 0;
      for (int k = 0; k < kK; ++k) expected += row_value(m, k) * column_value(n, k);
      const float got = out[m * kColumns + n];
      if (got == expected) continue;
      return "out at " + std::to_string(m * kColumns + n) + ": got " + std::to_string(got) +
             ", expected " + std::to_string(expected);
    }
  }
  return "";
}

}  // namespace

std::string rows_unswizzled(bool is_planted) {
  return run_products<Mistake::kRowsUnswizzled>(is_planted);
}
std::string box_unswizzled(bool is_planted) {
  return run_products<Mistake::kBoxUnswizzled>(is_planted);
}
std::string descriptor_of_other_major(bool is_planted) {
  return run_products<Mistake::kOtherMajor>(is_planted);
}
std::string descriptor_unswizzled(bool is_planted) {
  return run_products<Mistake::kDescriptorUnswizzled>(is_planted);
}
std::string descriptor_of_other_swizzle(bool is_planted) {
  return run_products<Mistake::kDescriptorNarrow>(is_planted);
}
std::string products_without_proxy_fence(bool is_planted) {
  return run_products<Mistake::kNoProxyFence>(is_planted);
}
std::string proxy_fence_before_wait(bool is_planted) {
  return run_products<Mistake::kProxyFenceBeforeWait>(is_planted);
}
std::string arrival_before_copies(bool is_planted) {
  return run_products<Mistake::kArrivesBeforeCopies>(is_planted);
}
std::string accumulators_read_early(bool is_planted) {
  return run_products<Mistake::kReadsBeforeWait>(is_planted);
}
std::string wait_leaves_a_group(bool is_planted) {
  return run_products<Mistake::kWaitLeavesAGroup>(is_planted);
}
std::string products_not_committed(bool is_planted) {
  return run_products<Mistake::kNoCommit>(is_planted);
}
std::string missing_wgmma_fence(bool is_planted) {
  return run_products<Mistake::kNoWgmmaFence>(is_planted);
}
std::string stage_released_early(bool is_planted) {
  return run_products<Mistake::kReleasesBeforeWait>(is_planted);
}
std::string stage_refilled_early(bool is_planted) {
  return run_products<Mistake::kNoWaitForEmpty>(is_planted);
}
std::string warps_differ(bool is_planted) {
  return run_products<Mistake::kWarpsDiffer>(is_planted);
}
std::string warp_left_out(bool is_planted) {
  return run_products<Mistake::kWarpLeftOut>(is_planted);
}
std::string narrow_product(bool is_planted) {
  return run_products<Mistake::kNarrowProduct>(is_planted);
}

}  // namespace sparse_unified::planted
