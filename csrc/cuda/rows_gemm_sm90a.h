// SPDX-License-Identifier: Apache-2.0
// A grouped GEMM on Hopper whose rows of A lie in padded groups: out = sum over operands of A B,
// [R, N] from A [rows, h] and weights B with h contracted. grouped_ffn has two:
//   down-projection  y = hidden down^T                    B is [N, K] in memory (Major::kK)
//   input gradient   grad_gate gate + grad_up up          B is [K, N] in memory (Major::kMN)
//
// Persistent kernel (persistent_gemm_sm90a.h), one CTA per SM, grid-stride over tiles of 128 rows x
// n columns, 256 (3584 = 14 * 256) or 128.
//
// Warp roles: 1 producer warp (one elected lane issues TMA for 128 rows of A and the weights of n
// columns, both in the swizzle of wgmma: B [N, K] as one box, B [K, N] as boxes of 64 columns;
// NeuronGroups is looked up one k step ahead), 2 consumer warpgroups (64 rows each, m64nNk16, n / 2
// accumulators a thread). Pipeline stages of 64 k, 48 KB each, 32 KB with 128 columns. The last
// stage of an expert may reach into the neurons of the next one (1184 = 18.5 * 64): only the k16
// steps that are its own are multiplied, and weights come as boxes of 32 k where those suffice.
// `out` has no padding, so a tile leaves by stores of 16 bytes that stop at the end of the group,
// while the next one is multiplied.
//
// Clusters of two CTAs take two neighbouring tiles of rows and multicast the weights, half of the
// columns each. Where a group has no second tile, that CTA loads no rows and multiplies nothing.
//
// Bytes: A is read N / n times and the weights once for 16 row tiles (tile_scheduler.h), both
// mostly from L2, the weights for every tile of rows or for two; out is written once. FLOPs:
// 2 R N h for each operand.
// Preconditions: N % 8 == 0, h % 16 == 0, rows of the weights on 16-byte boundaries; of a list of
// blocks, block size and h multiples of 64.
#pragma once

#include <utility>

#include "cuda/grouped_ffn_neurons.h"
#include "cuda/persistent_gemm_sm90a.h"
#include "device/tensor_copy.h"

namespace sparse_unified::rows_gemm_sm90a {

template <typename T, int kOperands>
struct Params {
  TensorMap rows[kOperands];      // A [padded rows, h], boxes [128, 64]
  TensorMap weights[kOperands];   // B, boxes [n / blocks, 64] or [64, 64]
  TensorMap narrow[kOperands];    // B, boxes of half as many k
  NeuronGroups neurons;           // columns or rows of B
  int group_rows;                 // rows of B [N, K] from one group to the next, or 0
  const int32_t* expert_offsets;  // [E + 1], or null
  T* out;                         // [R, N]
  int num_rows;                   // R
  int num_columns;                // N
  int num_experts;                // E
  int expert_width;               // h
  int num_n;                      // tiles of columns
  int num_k;                      // stages of one operand
};

template <typename T_, int kN, int kNumStages, int kOperands, Major kMajorWeights, int kNumBlocks>
struct Gemm : RowTiles<kNumBlocks, true, false> {
  using T = T_;
  using Params = rows_gemm_sm90a::Params<T, kOperands>;
  using Ring = RingBarriers<kNumStages, kNumBlocks>;
  using RowTiles<kNumBlocks, true, false>::kBlocks;
  static constexpr int kStages = kNumStages;
  static constexpr int kColumns = kN;
  static constexpr Major kMajorA = Major::kK;
  static constexpr Major kMajorB = kMajorWeights;
  static constexpr bool kFences = false;
  static constexpr bool kFindsAhead = true;
  static constexpr bool kDefersStore = true;
  static constexpr bool kAllowsNextKernel = false;
  // 40 and 232 registers for 128 and 256 threads are all but 1024 of the 65536.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerWarps = 1;
  static constexpr int kFullArrivals = 1;
  static_assert(kColumns % kBoxElements == 0);

  static constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;   // of A, a stage
  static constexpr int kWeightBytes = kColumns * kSwizzleRowBytes;  // of B
  static constexpr int kStageBytes = kRowsBytes + kWeightBytes;
  static constexpr int kOutBytes = 0;
  static_assert(kColumns / kBoxElements * kBoxBytes == kWeightBytes);

  // What a CTA of the cluster brings of the weights to all of them.
  static constexpr int kPartColumns = kColumns / kBlocks;
  static constexpr int kPartBytes = kWeightBytes / kBlocks;
  static_assert(kPartColumns % kBoxElements == 0 && kPartBytes % kSwizzleAtomBytes == 0);

  static SPARSE_UNIFIED_DEVICE int num_stages(const Params& params, const RowTile&) {
    return kOperands * params.num_k;
  }

  static SPARSE_UNIFIED_DEVICE void prefetch(const Params& params) {
    for (int operand = 0; operand < kOperands; ++operand) {
      prefetch_tensor_map(&params.rows[operand]);
      prefetch_tensor_map(&params.weights[operand]);
      prefetch_tensor_map(&params.narrow[operand]);
    }
  }

  // Whether boxes of 32 k have all that counts of a stage with so many neurons, or with the steps
  // that these are. [N, K] then lies in 64-byte swizzle, [K, N] as ever, with half of the rows.
  static SPARSE_UNIFIED_DEVICE bool is_narrow(int num_neurons) {
    return num_neurons <= kNarrowElements;
  }

  // One CTA's part of the weights, to all CTAs of the cluster.
  static SPARSE_UNIFIED_DEVICE void load_weights(const TensorMap* weights, uint32_t shared,
                                                 int column, int neuron, uint32_t barrier) {
    if constexpr (kMajorB == Major::kK) {
      load_box_to_all<kBlocks>(shared, weights, column, neuron, barrier);
    } else {
#pragma unroll
      for (int box = 0; box < kPartColumns / kBoxElements; ++box) {
        load_box_to_all<kBlocks>(shared + box * kBoxBytes, weights, neuron,
                                 column + box * kBoxElements, barrier);
      }
    }
  }

  static SPARSE_UNIFIED_DEVICE void produce(const Params& params, uint32_t shared,
                                            const Ring& ring) {
    // NOTE: the other lanes do not even wait: nothing would keep them from falling two phases
    // behind, and a wait names the parity of its phase alone.
    const bool copies_boxes = elect_lane();
    RingPosition<kStages> at;
    wait_for_previous_kernel();  // of which this one reads the rows
    const int part = kBlocks == 1 ? 0 : cluster_rank();
    for_each_tile<Gemm, true>(params, [&](const RowTile& tile) {
      const NeuronMap neurons = params.neurons.of(tile.group);
      const int column = tile.group * params.group_rows + tile.n * kColumns + part * kPartColumns;
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) {
        NeuronMap::Pending pending{};
        if (copies_boxes) pending = neurons.look_up(0);
        for (int k = 0; k < params.num_k; ++k, at.advance()) {
          if (!copies_boxes) continue;
          const int neuron = neurons.resolve(pending, k * kTileK);
          if (k + 1 < params.num_k) pending = neurons.look_up((k + 1) * kTileK);
          ring.wait_empty(at);
          const uint32_t stage = shared + at.stage * kStageBytes;
          const uint32_t full = ring.full(at.stage);
          const bool halves = is_narrow(params.expert_width - k * kTileK);
          const int weight_bytes = halves ? kWeightBytes / 2 : kWeightBytes;
          if (kBlocks == 1 || tile.has_rows()) {
            barrier_arrive_expect_bytes(full, kRowsBytes + weight_bytes);
            load_box(stage, &params.rows[operand], tile.slot * kTileRows, k * kTileK, full);
          } else {
            barrier_arrive_expect_bytes(full, weight_bytes);
          }
          const int part_bytes = kMajorB == Major::kK ? weight_bytes / kBlocks : kPartBytes;
          load_weights(halves ? &params.narrow[operand] : &params.weights[operand],
                       stage + kRowsBytes + part * part_bytes, column, neuron, full);
        }
      }
    });
  }

  template <int>
  static SPARSE_UNIFIED_DEVICE StageOperands operands(uint32_t stage, int consumer, int steps) {
    const bool halves = kMajorB == Major::kK && is_narrow(steps * kStepK);
    return {operand_descriptor(stage + consumer * kConsumerRows * kSwizzleRowBytes, kMajorA),
            operand_descriptor(stage + kRowsBytes, kMajorB, kBoxBytes,
                               halves ? kNarrowRowBytes : kSwizzleRowBytes)};
  }
  // The last stage of an expert may reach into the neurons of the next one.
  static SPARSE_UNIFIED_DEVICE int steps(const Params& params, int k) {
    static_assert(kOperands <= 2);
    const int of_operand = k < params.num_k ? k : k - params.num_k;
    return (params.expert_width - of_operand * kTileK) / kStepK;
  }

  static SPARSE_UNIFIED_DEVICE ResultPlace<T> place(const Params& params, const RowTile& tile,
                                                    int consumer) {
    const int row = tile.first_row + consumer * kConsumerRows;
    const int column = tile.n * kColumns;
    return {params.out + static_cast<int64_t>(row) * params.num_columns + column,
            params.num_columns, tile.end_row - row, params.num_columns - column};
  }
  static SPARSE_UNIFIED_DEVICE void finish() {}
};

// One operand of the sum.
struct Operand {
  const void* rows;  // A [padded rows, h]
  Matrix weights;    // B of all experts
};

template <typename T, GroupedFfnSm90aDownTile kId, int kOperands, Major kMajorB, int kBlocks = 1>
cudaError_t run(const GroupedFfnCudaParams& ffn, const DeviceInfo& device,
                const Operand (&operands)[kOperands], T* out, bool overlaps_previous,
                cudaStream_t stream) {
  constexpr GroupedFfnSm90aTile kTile = kGroupedFfnSm90aDownTiles[static_cast<int>(kId)];
  using TheGemm = Gemm<T, kTile.n, kTile.num_stages, kOperands, kMajorB, kBlocks>;
  Params<T, kOperands> params{};
  constexpr bool kIsKMajor = kMajorB == Major::kK;  // down_proj
  params.neurons = kIsKMajor ? neuron_columns(ffn) : neuron_rows(ffn);
  params.group_rows = kIsKMajor ? static_cast<int>(ffn.spacing.down_rows) : 0;
  params.expert_offsets = ffn.expert_offsets;
  params.out = out;
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.num_columns = static_cast<int>(ffn.x.columns);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.num_n = ceil_div(params.num_columns, TheGemm::kColumns);
  params.num_k = ceil_div(params.expert_width, kTileK);
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(ffn.num_rows, ffn.num_experts);
  for (int i = 0; i < kOperands; ++i) {
    cudaError_t error =
        make_tensor_map(&params.rows[i], ffn.dtype, operands[i].rows, padded_rows, ffn.expert_width,
                        ffn.expert_width, kTileRows, kTileK, true);
    if (error != cudaSuccess) return error;
    const Matrix& weights = operands[i].weights;
    for (const auto& [map, box_k] :
         {std::pair{&params.weights[i], kTileK}, {&params.narrow[i], kNarrowElements}}) {
      error = make_tensor_map(map, ffn.dtype, weights.data, weights.rows, weights.columns,
                              weights.stride, kIsKMajor ? TheGemm::kPartColumns : box_k,
                              kIsKMajor ? box_k : kBoxElements, true);
      if (error != cudaSuccess) return error;
    }
  }

  const int64_t most_tiles =
      max_row_tiles(ffn.num_rows, ffn.num_experts, kBlocks * kTileRows) * params.num_n;
  return launch_persistent_gemm<TheGemm>(params, most_tiles, device, stream, overlaps_previous);
}

}  // namespace sparse_unified::rows_gemm_sm90a
