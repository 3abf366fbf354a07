// SPDX-License-Identifier: Apache-2.0
// What the portable GEMMs of grouped_ffn share: their parameters, tile shapes, and launches. Each
// phase is a kernel template in a file of its own.
//
// Why these tiles (bf16, fp32 sums, figures of one multiprocessor and clock). A warp tile of
// 64 x 64 reads 2 * 64 * 16 elements = 4 KB of shared memory per k16 step for 131 kFLOP, the best
// ratio that 255 registers allow: 128 accumulators, twice 32 for fragments, the rest addresses.
//   H100, B200: mma.sync reaches about 62 % of wgmma's 4096 FLOP, so 8 warps need 413 clocks a
//     step; ldmatrix takes 8 * 4 KB / 128 B = 256 clocks and the copies into a 128 x 256 tile
//     12 KB / 128 B = 96: 85 % of shared memory's time. Two tiles of 128 x 128 copy 16 KB: 93 %.
//     Hence 128 x 256, one CTA of 8 warps per SM.
//   A100: 2048 FLOP, 512 clocks a step; 69 % and 75 %. 128 x 256 as well.
//   RTX 30, 40, 50 and their workstation kin: at most 1024 FLOP; shared memory idles two thirds of
//     the time, and an occupancy of two CTAs of 128 x 128 hides their prologue and epilogue.
// 128 x 256 x 32 with 4 stages takes 96 KB, within the 99 KB of the smallest of these devices.
// Three stages in flight are 3 * 826 clocks on H100, more than twice the latency of memory.
//
// L2 and memory: a k32 step reads 24 KB for 2.1 MFLOP, 87 FLOP a byte; 132 CTAs at 500 TFLOP/s
// draw 5.7 TB/s from L2. CTAs that run together share rows and weights (kRasterTiles), so that
// memory sees 1/8 to 1/16 of it.
//
// Not persistent: a static grid of tiles that leave when done. Tiles differ in length (edges,
// experts' last rows), and the hardware hands the next one to whoever is free; a persistent kernel
// would fix that order ahead. What persistence could save is the start of the pipeline, about 1500
// clocks in 92,000 (up, D = 3584) or 30,000 (down, h = 1184), and only with a loader that runs
// ahead into the next tile, whose second set of coordinates the registers do not hold.
//
// Deterministic: one CTA, one warp, one lane sums an element, in the order of k.
#pragma once

#include "cuda/grouped_ffn_neurons.h"
#include "cuda/grouped_ffn_row_weights.h"
#include "device/index_map.h"
#include "device/launch.h"
#include "device/mainloop.h"
#include "device/tile_loader.h"
#include "device/tile_scheduler.h"
#include "sparse_unified/cuda/grouped_ffn.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified {

// Up- and down-projection.
struct GroupedFfnForwardKernelParams {
  GroupedFfnCudaParams ffn;
  void* hidden;  // [R, h], workspace
};

// grad_hidden and grad_rows.
struct GroupedFfnBackwardKernelParams {
  GroupedFfnBackwardCudaParams ffn;
  void* grad_gate_up;  // [R, 2h], workspace: grad_gate and grad_up side by side
  void* hidden;        // [R, h], workspace, times the weights; null without grad_down_proj
  RowFactors factors;
};

// Neurons of a warp in grad_hidden, whose sums over a row are one part.
constexpr int kSm80PartNeurons = 64;

// The weight gradients: is_down false for gate_proj and up_proj together, true for down_proj.
struct GroupedFfnGradWeightsKernelParams {
  GroupedFfnBackwardKernelParams backward;
  bool is_down;
};

// The entry of the table as a type: warps in two rows.
template <GroupedFfnTileId kId, GroupedFfnTile kTile = grouped_ffn_tile(kId)>
using TileShapeOf = TileShape<kTile.m, kTile.n, kTile.k, kTile.num_stages, 2, kTile.num_warps / 2,
                              kTile.num_blocks>;

// Launches kernel(params) with the tile shape kId on num_tiles blocks.
template <GroupedFfnTileId kId, class Params>
cudaError_t launch_tiles(void (*kernel)(Params), const Params& params, int64_t num_tiles,
                         cudaStream_t stream) {
  using Shape = TileShapeOf<kId>;
  static_assert(Shape::kSharedBytes == grouped_ffn_tile(kId).shared_bytes());
  constexpr int64_t kMaxGrid = 0x7fffffff;
  if (num_tiles > kMaxGrid) return cudaErrorInvalidConfiguration;
  return launch(kernel,
                {.grid = dim3(static_cast<unsigned>(num_tiles)),
                 .num_threads = Shape::kThreads,
                 .shared_bytes = Shape::kSharedBytes,
                 .stream = stream},
                params);
}

// Blocks of a GEMM over grouped rows with num_columns columns.
inline int64_t num_row_gemm_tiles(GroupedFfnTileId id, const GroupedFfnCudaParams& ffn,
                                  int64_t num_columns) {
  const GroupedFfnTile& tile = grouped_ffn_tile(id);
  const int64_t num_groups = ffn.expert_offsets == nullptr ? 1 : ffn.num_experts;
  return max_row_tiles(ffn.num_rows, num_groups, tile.m) * ceil_div<int64_t>(num_columns, tile.n);
}

// run.operator()<T, kId>() with the element type (bf16 or fp16) and the tile chosen at run time.
template <class Run>
cudaError_t dispatch_tile(DType dtype, GroupedFfnTileId id, const Run& run) {
  using enum GroupedFfnTileId;
  return dispatch_half(dtype, [&]<typename T>(T) {
    return dispatch_value<kLarge, kMedium, kSmall>(
        id, [&]<GroupedFfnTileId kId>() { return run.template operator()<T, kId>(); });
  });
}

// One launch each.
cudaError_t grouped_ffn_up_sm80(GroupedFfnTileId id, const GroupedFfnForwardKernelParams& params,
                                cudaStream_t stream);
cudaError_t grouped_ffn_down_sm80(GroupedFfnTileId id, const GroupedFfnForwardKernelParams& params,
                                  cudaStream_t stream);
cudaError_t grouped_ffn_grad_hidden_sm80(GroupedFfnTileId id,
                                         const GroupedFfnBackwardKernelParams& params,
                                         cudaStream_t stream);
cudaError_t grouped_ffn_grad_rows_sm80(GroupedFfnTileId id,
                                       const GroupedFfnBackwardKernelParams& params,
                                       cudaStream_t stream);
cudaError_t grouped_ffn_grad_weights_sm80(GroupedFfnTileId id,
                                          const GroupedFfnGradWeightsKernelParams& params,
                                          cudaStream_t stream);

}  // namespace sparse_unified
