// SPDX-License-Identifier: Apache-2.0
// Weight gradients of grouped_ffn on Hopper, each a sum over the rows of an expert:
//   grad_gate_proj = grad_gate^T x
//   grad_up_proj = grad_up^T x
//   grad_down_proj = grad_y^T hidden
//
// One kernel for all, with the row as the contracted index, so that both operands have it as their
// slow index (Major::kMN). The neurons' side (grad_gate, grad_up, hidden) lies in buffers padded to
// whole tiles with zeros in padding rows; the other side (x by row_token, or grad_y) is gathered,
// with zeros for rows beyond the group. Which is M and which is N follows from the gradient, whose
// rows are M, so that results leave as they are:
//   gate, up   M = 64 neurons, one consumer has grad_gate and the other grad_up; N = 256 of D
//   down       M = 128 of D, 64 a consumer; N = 256 neurons, of the last tile of an expert as few
//              as they take in multiples of 32 (592 = 2 * 256 + 80 takes 608, 1184 no more)
// Persistent kernel (persistent_gemm_sm90a.h), one CTA per SM, grid-stride over these tiles.
//
// Warp roles: 1 producer warpgroup (cp.async gathers 64 rows of 256 or 128 columns into swizzled
// tiles of 64 columns; one elected lane issues TMA for boxes of 64 rows of 64 neurons), 2 consumer
// warpgroups (m64n256k16, 128 accumulators a thread). 4 pipeline stages of 64 rows, 48 KB each.
// Results are stored while the next tile is multiplied. An expert without rows gets zeros.
//
// Clusters of two CTAs take neighbouring tiles of D and multicast the neurons, half of the boxes
// each: 8 of 48 KB of a stage less to read for gate and up, 16 for down.
//
// Bytes: the gathered side is read h / 64 times (h / 256 for down), the neurons' side D / 256 times
// (D / 128), mostly from L2; gradients are written once. FLOPs: 4 R D h, and 2 R D h for down.
// Preconditions: D % 8 == 0, h % 16 == 0, I % 8 == 0, rows on 16-byte boundaries.
#include "cuda/persistent_gemm_sm90a.h"
#include "device/async_copy.h"
#include "device/tensor_copy.h"
#include "device/vector.h"
#include "device/warp.h"

namespace sparse_unified {
namespace {

constexpr int kTileN = 256;
static_assert(kSm90aTileRows % kTileK == 0, "padding reaches to the end of the last stage");
constexpr int kNumProducerWarps = kWarpgroupSize / kWarpSize;

template <typename T>
struct GradWeightsParams {
  // [padded rows, h], boxes [64, 64]: of grad_gate and grad_up, or of hidden, and [64, 32] of it
  TensorMap neurons[kNumConsumers];
  const T* columns;               // [., D], rows columns_stride elements apart
  int64_t columns_stride;         //
  const int32_t* row_token;       // [R]: row of `columns` of each row; null: the row itself
  const int32_t* expert_offsets;  // [E + 1], or null
  T* out[kNumConsumers];          // [I, D], with kIsDown [D, I] or [E, D, h]; null: not wanted
  bool is_apart;                  // [E, D, h]
  int num_sources;                // rows of `columns`
  int num_rows;                   // R
  int hidden_size;                // D
  int num_experts;                // E
  int expert_width;               // h
  int num_m;                      // tiles of neurons of an expert
  int num_n;                      // tiles of columns, or pairs of them in clusters
};

// One tile: its expert, where the expert's rows begin in both sides, where its results go.
struct GradWeightsTile {
  RowRange rows;
  int group;
  int padded_row;  // first row of the group in the padded buffers
  int neuron;      // first of the tile within the expert
  int column;      // first of the tile; in a cluster it may lie beyond the last
};

template <typename T_, bool kIsDown, int kNumBlocks>
struct GradWeightsGemm {
  using T = T_;
  using Params = GradWeightsParams<T>;
  using Tile = GradWeightsTile;
  using Ring = RingBarriers<4, kNumBlocks>;
  static constexpr int kBlocks = kNumBlocks;
  static constexpr int kStages = 4;
  static constexpr int kColumns = kTileN;
  static constexpr Major kMajorA = Major::kMN;
  static constexpr Major kMajorB = Major::kMN;
  static constexpr bool kFences = true;
  static constexpr bool kFindsAhead = true;
  static constexpr bool kMaySkip = false;
  static constexpr bool kMayBeEmpty = true;  // an expert without rows gets zeros
  static constexpr bool kDefersStore = true;
  static constexpr bool kAllowsNextKernel = false;
  // 72 and 216 registers for 128 and 256 threads are all but 1024 of the 65536.
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kProducerWarps = kNumProducerWarps;
  // Every thread of the producer arrives for its copies, and the one with the boxes once more.
  static constexpr int kFullArrivals = kWarpgroupSize + 1;
  static constexpr int kTileNeurons = kIsDown ? kTileN : kBoxElements;
  static constexpr int kTileColumns = kIsDown ? kTileRows : kTileN;  // of D

  // A stage: boxes of A, one for each consumer, then those of B.
  static constexpr int kBoxesA = kNumConsumers;
  static constexpr int kBoxesB = kTileN / kBoxElements;
  static constexpr int kStageBytes = (kBoxesA + kBoxesB) * kBoxBytes;
  static constexpr int kOutBytes = 0;
  static constexpr int kGatheredOffset = kIsDown ? 0 : kBoxesA * kBoxBytes;
  static constexpr int kNeuronsOffset = kIsDown ? kBoxesA * kBoxBytes : 0;

  // A gathered row is that of 32 or 16 lanes: lane l of them copies 16 bytes at column 8 l, to box
  // l / 8, chunk l % 8.
  static constexpr int kRowLanes = kTileColumns / kVectorElements<T>;
  static constexpr int kBoxChunks = kSwizzleRowBytes / kVectorBytes;
  static constexpr int kRowsAtOnce = kWarpgroupSize / kRowLanes;
  static constexpr int kCopies = kTileK / kRowsAtOnce;
  static_assert(kCopies <= kWarpSize && kWarpSize % kRowLanes == 0);

  // All lanes of a warp call it.
  template <bool kIsProducer>
  static SPARSE_UNIFIED_DEVICE bool find(const Params& params, int idx, Tile& tile) {
    const int tiles_of_group = params.num_m * params.num_n;
    tile.group = idx / tiles_of_group;
    if (tile.group >= params.num_experts) return false;
    const TileCoordinates at = rasterize(idx % tiles_of_group, params.num_m, params.num_n);
    tile.rows = group_rows(params.expert_offsets, tile.group, params.num_rows);
    if constexpr (kIsProducer) {
      tile.padded_row = kSm90aTileRows * count_tiles_before<kSm90aTileRows>(
                                             params.expert_offsets, tile.group, params.num_rows);
    }
    tile.neuron = at.m * kTileNeurons;
    tile.column = (at.n * kBlocks + (kBlocks == 1 ? 0 : cluster_rank())) * kTileColumns;
    return true;
  }
  static SPARSE_UNIFIED_DEVICE int num_stages(const Params&, const Tile& tile) {
    return ceil_div(tile.rows.end - tile.rows.begin, kTileK);
  }
  // That the product takes.
  static SPARSE_UNIFIED_DEVICE int columns(const Params& params, const Tile& tile)
    requires kIsDown
  {
    return columns_for<kColumns>(params.expert_width - tile.neuron);
  }

  static SPARSE_UNIFIED_DEVICE void prefetch(const Params& params) {
    for (const TensorMap& map : params.neurons) prefetch_tensor_map(&map);
  }

  // Has TMA bring this CTA's boxes of neurons to all CTAs of the cluster.
  static SPARSE_UNIFIED_DEVICE void load_neurons(const Params& params, const Tile& tile, int first,
                                                 uint32_t shared, uint32_t full) {
    ColumnBoxes boxes{kBoxesA, 0, kBoxBytes, false};
    if constexpr (kIsDown) boxes = column_boxes<kColumns>(columns(params, tile));
    barrier_arrive_expect_bytes(full, boxes.num_boxes * boxes.bytes);
    for (int box = kBlocks == 1 ? 0 : cluster_rank(); box < boxes.num_boxes; box += kBlocks) {
      load_box_to_all<kBlocks>(shared + box * boxes.bytes,
                               &params.neurons[kIsDown ? boxes.is_narrow : box],
                               tile.padded_row + first, tile.neuron + box * boxes.elements, full);
    }
  }

  static SPARSE_UNIFIED_DEVICE void produce(const Params& params, uint32_t shared,
                                            const Ring& ring) {
    const bool copies_boxes = warp_idx() == 0 && elect_lane();
    const int thread = static_cast<int>(threadIdx.x);
    const int box = thread % kRowLanes / kBoxChunks;
    const int chunk = thread % kBoxChunks;
    const int first_row = thread / kRowLanes;
    RingPosition<kStages> at;
    for_each_tile<GradWeightsGemm, true>(params, [&](const Tile& tile) {
      const int column = tile.column + thread % kRowLanes * kVectorElements<T>;
      const int num_rows = tile.rows.end - tile.rows.begin;
      for (int first = 0; first < num_rows; first += kTileK, at.advance()) {
        // Lane i looks up the i-th row that its warp copies, while the stage is still in use.
        [[maybe_unused]] int source = 0;
        if constexpr (!kIsDown) {
          static_assert(kIsDown || kRowLanes == kWarpSize);
          const int row = tile.rows.begin + first + warp_idx() + lane_idx() * kRowsAtOnce;
          if (lane_idx() < kCopies && row < tile.rows.end) {
            source = params.row_token == nullptr ? row : params.row_token[row];
            device_check(0 <= source && source < params.num_sources);
          }
        }
        ring.wait_empty(at);
        const uint32_t stage = shared + at.stage * kStageBytes;
        const uint32_t full = ring.full(at.stage);
        if (copies_boxes) load_neurons(params, tile, first, stage + kNeuronsOffset, full);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int row = first_row + i * kRowsAtOnce;
          const bool is_inside = first + row < num_rows && column < params.hidden_size;
          const int64_t from = kIsDown ? tile.rows.begin + first + row : shuffle(source, i);
          copy_async_16(stage + kGatheredOffset + box * kBoxBytes + swizzled_offset(row, chunk),
                        params.columns + (is_inside ? from * params.columns_stride + column : 0),
                        is_inside ? kVectorBytes : 0);
        }
        barrier_arrive_after_copies(full);
      }
    });
  }

  template <int kN>
  static SPARSE_UNIFIED_DEVICE StageOperands operands(uint32_t stage, int consumer, int) {
    return {operand_descriptor(stage + consumer * kBoxBytes, kMajorA),
            column_descriptor<kN, kColumns>(stage + kBoxesA * kBoxBytes)};
  }
  static SPARSE_UNIFIED_DEVICE int steps(const Params&, int) { return kStageSteps; }

  static SPARSE_UNIFIED_DEVICE ResultPlace<T> place(const Params& params, const Tile& tile,
                                                    int consumer) {
    T* out = params.out[consumer];
    const int64_t width = params.expert_width;
    const int64_t first_neuron = tile.group * width + tile.neuron;  // of all
    const int neurons_left = params.expert_width - tile.neuron;
    const int column = tile.column + (kIsDown ? consumer * kConsumerRows : 0);
    const int columns_left = params.hidden_size - column;
    if constexpr (!kIsDown) {
      return {out + first_neuron * params.hidden_size + column, params.hidden_size,
              out == nullptr ? 0 : neurons_left, columns_left};
    } else if (params.is_apart) {
      const int64_t row = int64_t{tile.group} * params.hidden_size + column;
      return {out + row * width + tile.neuron, width, columns_left, neurons_left};
    } else {
      const int64_t all = params.num_experts * width;
      return {out + column * all + first_neuron, all, columns_left, neurons_left};
    }
  }
  static SPARSE_UNIFIED_DEVICE void finish() {}
};

template <typename T, bool kIsDown, int kBlocks>
cudaError_t launch_grad_weights(GradWeightsParams<T> params, const GroupedFfnCudaParams& ffn,
                                const DeviceInfo& device, const void* const* neurons,
                                cudaStream_t stream) {
  using Gemm = GradWeightsGemm<T, kIsDown, kBlocks>;
  params.expert_offsets = ffn.expert_offsets;
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.hidden_size = static_cast<int>(ffn.x.columns);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.num_m = ceil_div(params.expert_width, Gemm::kTileNeurons);
  params.num_n = ceil_div(params.hidden_size, kBlocks * Gemm::kTileColumns);
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(ffn.num_rows, ffn.num_experts);
  for (int i = 0; i < kNumConsumers; ++i) {
    const cudaError_t error = make_tensor_map(
        &params.neurons[i], ffn.dtype, neurons[i], padded_rows, ffn.expert_width, ffn.expert_width,
        kTileK, kIsDown && i == 1 ? kNarrowElements : kBoxElements, true);
    if (error != cudaSuccess) return error;
  }

  const int64_t num_tiles = ffn.num_experts * params.num_m * params.num_n;
  return launch_persistent_gemm<Gemm>(params, num_tiles, device, stream);
}

template <typename T, int kBlocks>
cudaError_t launch_all(const GroupedFfnBackwardCudaParams& backward, const DeviceInfo& device,
                       const void* grad_gate, const void* grad_up, const void* hidden,
                       cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = backward.forward;
  GradWeightsParams<T> gate_and_up{};
  gate_and_up.columns = ffn.x.row<T>(0);
  gate_and_up.columns_stride = ffn.x.stride;
  gate_and_up.row_token = ffn.row_token;
  gate_and_up.num_sources = static_cast<int>(ffn.x.rows);
  gate_and_up.out[0] = static_cast<T*>(backward.grad_gate_proj);
  gate_and_up.out[1] = static_cast<T*>(backward.grad_up_proj);
  const void* const gradients[kNumConsumers] = {grad_gate, grad_up};
  if (backward.grad_gate_proj != nullptr || backward.grad_up_proj != nullptr) {
    const cudaError_t error =
        launch_grad_weights<T, false, kBlocks>(gate_and_up, ffn, device, gradients, stream);
    if (error != cudaSuccess) return error;
  }
  if (backward.grad_down_proj == nullptr) return cudaSuccess;

  GradWeightsParams<T> down{};
  down.columns = static_cast<const T*>(backward.grad_y);
  down.columns_stride = ffn.x.columns;
  down.num_sources = static_cast<int>(ffn.num_rows);
  down.is_apart = ffn.spacing.down_rows != 0;
  down.out[0] = down.out[1] = static_cast<T*>(backward.grad_down_proj);
  const void* const activations[kNumConsumers] = {hidden, hidden};
  return launch_grad_weights<T, true, kBlocks>(down, ffn, device, activations, stream);
}

}  // namespace

cudaError_t grouped_ffn_grad_weights_sm90a(const GroupedFfnBackwardCudaParams& params,
                                           const DeviceInfo& device,
                                           const GroupedFfnSm90aOptions& options,
                                           const void* grad_gate, const void* grad_up,
                                           const void* hidden, cudaStream_t stream) {
  return dispatch_half(params.forward.dtype, [&]<typename T>(T) {
    return dispatch_value<1, 2>(options.multicasts_backward ? 2 : 1, [&]<int kBlocks>() {
      return launch_all<T, kBlocks>(params, device, grad_gate, grad_up, hidden, stream);
    });
  });
}

}  // namespace sparse_unified
