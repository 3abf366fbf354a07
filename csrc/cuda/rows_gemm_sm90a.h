// SPDX-License-Identifier: Apache-2.0
// A grouped GEMM on Hopper whose rows of A lie in padded groups: out = sum over operands of A B,
// [R, N] from A [rows, h] and weights B with h contracted. grouped_ffn has two:
//   down-projection  y = hidden down^T                    B is [N, K] in memory (Major::kK)
//   input gradient   grad_gate gate + grad_up up          B is [K, N] in memory (Major::kMN)
//
// A block stays on its multiprocessor and takes every gridDim.x-th tile of 128 rows and n columns,
// 256 (3584 = 14 * 256) or 128. Three warpgroups:
//   producer   one lane has TMA bring 128 rows of A and n columns' weights of this step of 64 k,
//              both in the swizzle that wgmma reads: B [N, K] as one box, B [K, N] as boxes of 64
//              columns. Where a step's neurons lie in the weights, NeuronGroups says, one step
//              ahead
//   consumers  64 rows each: m64nNk16, n / 2 accumulators a thread
// through a ring of stages (48 KB each, 32 KB with 128 columns). The last step of an expert may
// reach into the neurons of the next one (1184 = 18.5 * 64): it multiplies only the 16-wide slices
// that are its own. `out` has no padding, so a tile leaves through shared memory by stores of 16
// bytes that stop at the end of the group.
//
// Two blocks may share the weights: a cluster takes two neighbouring tiles of rows, and each block
// has TMA bring half of the columns' weights to both. Where a group has no second tile, that block
// loads no rows and multiplies nothing.
//
// Bytes: A is read N / n times and the weights once for 16 row tiles (tile_scheduler.h), both
// mostly from L2, the weights for every tile of rows or for two; out is written once. FLOPs:
// 2 R N h for each operand.
// Preconditions: N % 8 == 0, h % 16 == 0, rows of the weights on 16-byte boundaries; of a list of
// blocks, block size and h multiples of 64.
#pragma once

#include "cuda/grouped_ffn_neurons.h"
#include "cuda/grouped_ffn_sm90a.h"
#include "device/launch.h"
#include "device/mainloop_sm90a.h"
#include "device/tensor_copy.h"
#include "device/tile_scheduler.h"
#include "device/vector.h"
#include "device/warpgroup.h"

namespace sparse_unified::rows_gemm_sm90a {

constexpr int kTileRows = kSm90aTileRows;
constexpr int kTileK = kStageK;
static_assert(kTileK == kSm90aTileK);
constexpr int kNumConsumers = 2;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupSize;
constexpr int kConsumerRows = kTileRows / kNumConsumers;
static_assert(kConsumerRows == 64, "the M of wgmma");

// 40 and 232 registers for 128 and 256 threads are all but 1024 of the 65536.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

// B [K, N] comes in boxes of 64 columns, one after the other.
constexpr int kBoxColumns = 64;
constexpr int kBoxBytes = kTileK * kSwizzleRowBytes;

// A consumer's rows of `out` leave 128 columns at a time; a pitch of 4 words more than 32 k
// puts the 8 rows and 4 words that a warp stores at a time on 32 different banks.
constexpr int kOutColumns = 128;
constexpr int kOutPitchBytes = kOutColumns * 2 + kVectorBytes;
constexpr int kOutBytes = kConsumerRows * kOutPitchBytes;
constexpr int kOutVectors = kOutColumns * 2 / kVectorBytes;  // of a row
constexpr int kOutRowStep = kWarpgroupSize / kOutVectors;

constexpr int kFullArrivals = 1;
constexpr int kConsumerWarps = kNumConsumers * kWarpgroupSize / kWarpSize;

template <int kN, int kNumStages, int kNumBlocks>
struct RowsTile {
  static constexpr int kBlocks = kNumBlocks;  // of a cluster
  static constexpr int kColumns = kN;
  static constexpr int kStages = kNumStages;
  static constexpr int kAccumulators = kColumns / 2;  // of a thread: 64 n / 128
  static_assert(kColumns % kOutColumns == 0 && kColumns % kBoxColumns == 0);

  static constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;   // of A, a stage
  static constexpr int kWeightBytes = kColumns * kSwizzleRowBytes;  // of B
  static constexpr int kStageBytes = kRowsBytes + kWeightBytes;
  static_assert(kColumns / kBoxColumns * kBoxBytes == kWeightBytes);

  // What a block of the cluster brings of the weights to all of them.
  static constexpr int kPartColumns = kColumns / kBlocks;
  static constexpr int kPartBytes = kWeightBytes / kBlocks;
  static_assert(kPartColumns % kBoxColumns == 0 && kPartBytes % kSwizzleAtomBytes == 0);

  // Shared memory: stages of {A, B}, parts of tiles of out, barriers.
  static constexpr int kOutOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kOutOffset + kNumConsumers * kOutBytes;
  using Ring = RingBarriers<kStages, kBlocks>;
  static constexpr int kSharedBytes = kBarrierOffset + Ring::kBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <typename T, int kOperands>
struct Params {
  TensorMap rows[kOperands];      // A [padded rows, h], boxes [128, 64]
  TensorMap weights[kOperands];   // B, boxes [n / blocks, 64] or [64, 64]
  NeuronGroups neurons;           // columns or rows of B
  const int32_t* expert_offsets;  // [E + 1], or null
  T* out;                         // [R, N]
  int num_rows;                   // R
  int num_columns;                // N
  int num_experts;                // E
  int expert_width;               // h
  int num_n;                      // tiles of columns
  int num_k;                      // stages of one operand
};

// One block's part of the weights, to all blocks of the cluster.
template <class Tile, Major kMajorB>
SPARSE_UNIFIED_DEVICE void load_weights(const TensorMap* weights, uint32_t shared, int column,
                                        int neuron, uint32_t barrier) {
  if constexpr (kMajorB == Major::kK) {
    load_box_to_all<Tile::kBlocks>(shared, weights, column, neuron, barrier);
  } else {
#pragma unroll
    for (int box = 0; box < Tile::kPartColumns / kBoxColumns; ++box) {
      load_box_to_all<Tile::kBlocks>(shared + box * kBoxBytes, weights, neuron,
                                     column + box * kBoxColumns, barrier);
    }
  }
}

template <typename T, class Tile, int kOperands, Major kMajorB>
SPARSE_UNIFIED_DEVICE void produce(const Params<T, kOperands>& params, uint32_t shared,
                                   const typename Tile::Ring& ring) {
  // NOTE: the other lanes do not even wait: nothing would keep them from falling two phases behind,
  // and a wait names the parity of its phase alone.
  const bool copies_boxes = elect_lane();
  RingPosition<Tile::kStages> at;
  RowTile tile;
  wait_for_previous_kernel();  // of which this one reads the rows
  const int part = Tile::kBlocks == 1 ? 0 : cluster_rank();
  for (int idx = first_tile<Tile::kBlocks>(); find_row_tile<kTileRows, Tile::kBlocks>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += tile_step<Tile::kBlocks>()) {
    const NeuronMap neurons = params.neurons.of(tile.group);
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) {
      NeuronMap::Pending pending{};
      if (copies_boxes) pending = neurons.look_up(0);
      for (int k = 0; k < params.num_k; ++k, at.advance()) {
        if (!copies_boxes) continue;
        const int neuron = neurons.resolve(pending, k * kTileK);
        if (k + 1 < params.num_k) pending = neurons.look_up((k + 1) * kTileK);
        ring.wait_empty(at);
        const uint32_t stage = shared + at.stage * Tile::kStageBytes;
        const uint32_t full = ring.full(at.stage);
        if (Tile::kBlocks == 1 || tile.has_rows()) {
          barrier_arrive_expect_bytes(full, Tile::kStageBytes);
          load_box(stage, &params.rows[operand], tile.slot * kTileRows, k * kTileK, full);
        } else {
          barrier_arrive_expect_bytes(full, Tile::kWeightBytes);
        }
        load_weights<Tile, kMajorB>(
            &params.weights[operand], stage + Tile::kRowsBytes + part * Tile::kPartBytes,
            tile.n * Tile::kColumns + part * Tile::kPartColumns, neuron, full);
      }
    }
  }
}

template <typename T, class Tile, int kOperands>
SPARSE_UNIFIED_DEVICE void store_tile(const Params<T, kOperands>& params, const RowTile& tile,
                                      const float (&d)[Tile::kAccumulators], int consumer) {
  const int upper = warp_idx() % 4 * 16 + lane_idx() / 4;
  const int pair = lane_idx() % 4 * 2;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupSize;
  unsigned char* out = dynamic_shared_memory() + Tile::kOutOffset + consumer * kOutBytes;
#pragma unroll
  for (int part = 0; part < Tile::kColumns / kOutColumns; ++part) {
    sync_named(1 + consumer, kWarpgroupSize);  // the part before has been read
#pragma unroll
    for (int j = 0; j < kOutColumns / 8; ++j) {
      const float* pairs = d + 4 * (part * kOutColumns / 8 + j);
      auto* word = reinterpret_cast<uint32_t*>(out + upper * kOutPitchBytes + (8 * j + pair) * 2);
      word[0] = pack<T>(pairs[0], pairs[1]);
      word[8 * kOutPitchBytes / 4] = pack<T>(pairs[2], pairs[3]);
    }
    sync_named(1 + consumer, kWarpgroupSize);
    const int vector = thread % kOutVectors;
    const int column = tile.n * Tile::kColumns + part * kOutColumns + vector * kVectorElements<T>;
    const int first_row = tile.first_row + consumer * kConsumerRows;
    if (column >= params.num_columns) continue;
    for (int row = thread / kOutVectors; row < kConsumerRows; row += kOutRowStep) {
      if (first_row + row >= tile.end_row) break;
      store_vector(params.out + static_cast<int64_t>(first_row + row) * params.num_columns + column,
                   load_vector(out + row * kOutPitchBytes + vector * kVectorBytes));
    }
  }
}

template <typename T, class Tile, int kOperands, Major kMajorB>
SPARSE_UNIFIED_DEVICE void consume(const Params<T, kOperands>& params, uint32_t shared,
                                   const typename Tile::Ring& ring) {
  const int consumer = warp_idx() / 4 - 1;
  const int own_rows = consumer * kConsumerRows * kSwizzleRowBytes;
  RingPosition<Tile::kStages> at;
  RowTile tile;
  for (int idx = first_tile<Tile::kBlocks>(); find_row_tile<kTileRows, Tile::kBlocks, false>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += tile_step<Tile::kBlocks>()) {
    if (Tile::kBlocks > 1 && !tile.has_rows()) {
      skip_stages(kOperands * params.num_k, ring, at);
      continue;
    }
    float d[Tile::kAccumulators];
    multiply_stages<T, Tile::kColumns, Major::kK, kMajorB, false>(
        d, kOperands * params.num_k, ring, at,
        [&](int idx) -> StageOperands {
          const uint32_t stage = shared + idx * Tile::kStageBytes;
          return {operand_descriptor(stage + own_rows, Major::kK),
                  operand_descriptor(stage + Tile::kRowsBytes, kMajorB, kBoxBytes)};
        },
        [&](int k) { return (params.expert_width - k % params.num_k * kTileK) / kStepK; });
    store_tile<T, Tile>(params, tile, d, consumer);
  }
}

template <typename T, int kN, int kNumStages, int kOperands, Major kMajorB, int kNumBlocks>
__global__ void __launch_bounds__(kNumThreads, 1)
    kernel(const __grid_constant__ Params<T, kOperands> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SPARSE_UNIFIED_EMULATION)
  using Tile = RowsTile<kN, kNumStages, kNumBlocks>;
  const uint32_t shared = shared_address(dynamic_shared_memory());
  const typename Tile::Ring ring{shared + Tile::kBarrierOffset};
  if (threadIdx.x == 0) {
    ring.init(kFullArrivals, kConsumerWarps);
    for (int operand = 0; operand < kOperands; ++operand) {
      prefetch_tensor_map(&params.rows[operand]);
      prefetch_tensor_map(&params.weights[operand]);
    }
  }
  sync_blocks<kNumBlocks>();
  if (warp_idx() < kWarpgroupSize / kWarpSize) {
    decrease_registers<kProducerRegisters>();
    if (warp_idx() == 0) produce<T, Tile, kOperands, kMajorB>(params, shared, ring);
  } else {
    increase_registers<kConsumerRegisters>();
    consume<T, Tile, kOperands, kMajorB>(params, shared, ring);
  }
  if constexpr (kNumBlocks > 1) sync_cluster();
#else
  device_check(false);
#endif
}

// One operand of the sum.
struct Operand {
  const void* rows;        // A [padded rows, h]
  const void* weights;     // B of all experts
  int64_t weights_stride;  // elements between its rows
};

template <typename T, GroupedFfnSm90aDownTile kId, int kOperands, Major kMajorB, int kBlocks = 1>
cudaError_t run(const GroupedFfnCudaParams& ffn, const DeviceInfo& device,
                const Operand (&operands)[kOperands], T* out, bool overlaps_previous,
                cudaStream_t stream) {
  constexpr GroupedFfnSm90aTile kTile = kGroupedFfnSm90aDownTiles[static_cast<int>(kId)];
  using Tile = RowsTile<kTile.n, kTile.num_stages, kBlocks>;
  Params<T, kOperands> params{};
  params.neurons = neuron_groups(ffn);
  params.expert_offsets = ffn.expert_offsets;
  params.out = out;
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.num_columns = static_cast<int>(ffn.hidden_size);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.num_n = ceil_div(params.num_columns, Tile::kColumns);
  params.num_k = ceil_div(params.expert_width, kTileK);
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(ffn.num_rows, ffn.num_experts);
  const int64_t width = weights_width(ffn);
  for (int i = 0; i < kOperands; ++i) {
    cudaError_t error =
        make_tensor_map(&params.rows[i], ffn.dtype, operands[i].rows, padded_rows, ffn.expert_width,
                        ffn.expert_width, kTileRows, kTileK, true);
    if (error != cudaSuccess) return error;
    error =
        kMajorB == Major::kK
            ? make_tensor_map(&params.weights[i], ffn.dtype, operands[i].weights, ffn.hidden_size,
                              width, operands[i].weights_stride, Tile::kPartColumns, kTileK, true)
            : make_tensor_map(&params.weights[i], ffn.dtype, operands[i].weights, width,
                              ffn.hidden_size, operands[i].weights_stride, kTileK, kBoxColumns,
                              true);
    if (error != cudaSuccess) return error;
  }

  const int64_t most_tiles =
      max_row_tiles(ffn.num_rows, ffn.num_experts, kBlocks * kTileRows) * params.num_n;
  LaunchConfig config{};
  config.grid = dim3(num_persistent_blocks(most_tiles, device.num_multiprocessors, kBlocks));
  config.cluster_blocks = kBlocks;
  config.num_threads = kNumThreads;
  config.shared_bytes = Tile::kSharedBytes;
  config.stream = stream;
  config.overlaps_previous = overlaps_previous;
  return launch(kernel<T, kTile.n, kTile.num_stages, kOperands, kMajorB, kBlocks>, config, params);
}

}  // namespace sparse_unified::rows_gemm_sm90a
