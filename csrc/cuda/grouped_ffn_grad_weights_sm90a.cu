// SPDX-License-Identifier: Apache-2.0
// Weight gradients of grouped_ffn on Hopper, each a sum over the rows of an expert:
//   grad_gate_proj = grad_gate^T x
//   grad_up_proj = grad_up^T x
//   grad_down_proj = grad_y^T hidden
//
// One kernel for all: neurons are the M of the product and the contracted index is the row, so both
// operands have it as their slow index (Major::kMN). The neurons' side (grad_gate, grad_up, hidden)
// lies in buffers padded to whole tiles with zeros in padding rows; the other side (x by row_token,
// or grad_y) is gathered, with zeros for rows beyond the group. Persistent kernel
// (persistent_gemm_sm90a.h), one CTA per SM, grid-stride over tiles of 64 neurons a consumer x 256
// columns of D.
//
// Warp roles: 1 producer warpgroup (cp.async gathers 64 rows of 256 columns, a warp a row, into
// four swizzled tiles of 64 columns; one elected lane issues TMA for 64 rows of 64 neurons for each
// consumer), 2 consumer warpgroups (m64n256k16, 128 accumulators a thread). With kIsDown both have
// neurons of hidden, 64 apart, and store transposed, since down_proj is [D, I]; otherwise one has
// grad_gate and the other grad_up, for the same neurons. 4 pipeline stages of 64 rows, 48 KB each.
// An expert without rows gets zeros.
//
// Bytes: the gathered side is read h / 64 times (h / 128 with kIsDown), the neurons' side D / 256
// times, mostly from L2; gradients are written once. FLOPs: 4 R D h, and 2 R D h with kIsDown.
// Preconditions: D % 8 == 0, h % 16 == 0, I % 8 == 0, rows on 16-byte boundaries.
#include <algorithm>

#include "cuda/persistent_gemm_sm90a.h"
#include "device/async_copy.h"
#include "device/tensor_copy.h"
#include "device/vector.h"
#include "device/warp.h"

namespace sparse_unified {
namespace {

constexpr int kNumColumns = 256;  // of a tile
static_assert(kSm90aTileRows % kTileK == 0, "padding reaches to the end of the last stage");
constexpr int kNeuronsBytes = kNumConsumers * kBoxBytes;  // of a stage: 64 neurons a consumer

// A gathered row is one warp's: lane l copies 16 bytes at column 8 l, to tile l / 8, chunk l % 8.
constexpr int kNumProducerWarps = kWarpgroupSize / kWarpSize;
constexpr int kRowsOfWarp = kTileK / kNumProducerWarps;
static_assert(kRowsOfWarp <= kWarpSize);
constexpr int kBoxChunks = kSwizzleRowBytes / kVectorBytes;
static_assert(kNumColumns * 2 == kWarpSize * kVectorBytes);

// Results leave through shared memory in parts. As they are: rows of 128 columns. Transposed: rows
// of 64 neurons, for 64 columns. Pitches are 4 words more than a multiple of 32.
template <bool kIsDown>
struct Out {
  static constexpr int kPartColumns = kIsDown ? 64 : 128;
  static constexpr int kRows = kIsDown ? kPartColumns : kBoxElements;
  static constexpr int kRowElements = kIsDown ? kBoxElements : kPartColumns;
  static constexpr int kPitchBytes = kRowElements * 2 + kVectorBytes;
  static constexpr int kBytes = kRows * kPitchBytes;  // of a consumer
  static constexpr int kVectors = kRowElements * 2 / kVectorBytes;
  static constexpr int kRowStep = kWarpgroupSize / kVectors;
};

template <typename T>
struct GradWeightsParams {
  TensorMap neurons[kNumConsumers];  // [padded rows, h], boxes [64, 64]
  const T* columns;                  // [., D], rows columns_stride elements apart
  int64_t columns_stride;            //
  const int32_t* row_token;          // [R]: row of `columns` of each row; null: the row itself
  const int32_t* expert_offsets;     // [E + 1], or null
  T* out[kNumConsumers];             // [I, D], with kIsDown [D, I] or [E, D, h]; null: not wanted
  bool is_apart;                     // [E, D, h]
  int num_sources;                   // rows of `columns`
  int num_rows;                      // R
  int hidden_size;                   // D
  int num_experts;                   // E
  int expert_width;                  // h
  int num_m;                         // tiles of neurons of an expert
  int num_n;                         // tiles of columns
};

// One tile: its expert, where the expert's rows begin in both sides, where its results go.
struct GradWeightsTile {
  RowRange rows;
  int group;
  int padded_row;  // first row of the group in the padded buffers
  int neuron;      // first of the tile within the expert, of consumer 0
  int column;      // first of the tile
};

template <typename T_, bool kIsDown>
struct GradWeightsGemm {
  using T = T_;
  using Params = GradWeightsParams<T>;
  using Tile = GradWeightsTile;
  using Ring = RingBarriers<4>;
  static constexpr int kBlocks = 1;
  static constexpr int kStages = 4;
  static constexpr int kColumns = kNumColumns;
  static constexpr Major kMajorA = Major::kMN;
  static constexpr Major kMajorB = Major::kMN;
  static constexpr bool kFences = true;
  static constexpr bool kFindsAhead = true;
  static constexpr bool kMayBeEmpty = true;  // an expert without rows gets zeros
  static constexpr bool kAllowsNextKernel = false;
  // 72 and 216 registers for 128 and 256 threads are all but 1024 of the 65536.
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;
  static constexpr int kProducerWarps = kNumProducerWarps;
  // Every thread of the producer arrives for its copies, and the one with the boxes once more.
  static constexpr int kFullArrivals = kWarpgroupSize + 1;
  static constexpr int kStageBytes = kNeuronsBytes + kColumns / kBoxElements * kBoxBytes;
  static constexpr int kOutBytes = kNumConsumers * std::max(Out<false>::kBytes, Out<true>::kBytes);
  static constexpr int kTileNeurons = kIsDown ? kNumConsumers * kBoxElements : kBoxElements;

  // All lanes of a warp call it.
  template <bool kIsProducer>
  static SPARSE_UNIFIED_DEVICE bool find(const Params& params, int idx, Tile& tile) {
    const int tiles_of_group = params.num_m * params.num_n;
    tile.group = idx / tiles_of_group;
    if (tile.group >= params.num_experts) return false;
    const TileCoordinates at = rasterize(idx % tiles_of_group, params.num_m, params.num_n);
    tile.rows = group_rows(params.expert_offsets, tile.group, params.num_rows);
    tile.padded_row = kSm90aTileRows * count_tiles_before<kSm90aTileRows>(
                                           params.expert_offsets, tile.group, params.num_rows);
    tile.neuron = at.m * kTileNeurons;
    tile.column = at.n * kColumns;
    return true;
  }
  static SPARSE_UNIFIED_DEVICE int num_stages(const Params&, const Tile& tile) {
    return ceil_div(tile.rows.end - tile.rows.begin, kTileK);
  }

  static SPARSE_UNIFIED_DEVICE void prefetch(const Params& params) {
    for (const TensorMap& map : params.neurons) prefetch_tensor_map(&map);
  }

  static SPARSE_UNIFIED_DEVICE void produce(const Params& params, uint32_t shared,
                                            const Ring& ring) {
    const bool copies_boxes = warp_idx() == 0 && elect_lane();
    const int box = lane_idx() / kBoxChunks;
    const int chunk = lane_idx() % kBoxChunks;
    RingPosition<kStages> at;
    for_each_tile<GradWeightsGemm, true>(params, [&](const Tile& tile) {
      const int column = tile.column + lane_idx() * kVectorElements<T>;
      const int num_rows = tile.rows.end - tile.rows.begin;
      for (int first = 0; first < num_rows; first += kTileK, at.advance()) {
        // Lane i looks up the warp's i-th row of the stage, while the stage is still in use.
        const int looked_up = tile.rows.begin + first + warp_idx() + lane_idx() * kNumProducerWarps;
        int source = 0;
        if (lane_idx() < kRowsOfWarp && looked_up < tile.rows.end) {
          source = params.row_token == nullptr ? looked_up : params.row_token[looked_up];
          device_check(0 <= source && source < params.num_sources);
        }
        ring.wait_empty(at);
        const uint32_t stage = shared + at.stage * kStageBytes;
        const uint32_t full = ring.full(at.stage);
        if (copies_boxes) {
          barrier_arrive_expect_bytes(full, kNeuronsBytes);
#pragma unroll
          for (int consumer = 0; consumer < kNumConsumers; ++consumer) {
            load_box(stage + consumer * kBoxBytes, &params.neurons[consumer],
                     tile.padded_row + first, tile.neuron + (kIsDown ? consumer * kBoxElements : 0),
                     full);
          }
        }
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
          const int row = warp_idx() + i * kNumProducerWarps;
          const bool is_inside =
              tile.rows.begin + first + row < tile.rows.end && column < params.hidden_size;
          const int64_t offset = shuffle(source, i) * params.columns_stride + column;
          copy_async_16(stage + kNeuronsBytes + box * kBoxBytes + swizzled_offset(row, chunk),
                        params.columns + (is_inside ? offset : 0), is_inside ? kVectorBytes : 0);
        }
        barrier_arrive_after_copies(full);
      }
    });
  }

  static SPARSE_UNIFIED_DEVICE StageOperands operands(uint32_t stage, int consumer) {
    return {operand_descriptor(stage + consumer * kBoxBytes, kMajorA),
            operand_descriptor(stage + kNeuronsBytes, kMajorB, kBoxBytes)};
  }
  static SPARSE_UNIFIED_DEVICE int steps(const Params&, int) { return kStageSteps; }

  static SPARSE_UNIFIED_DEVICE void store(const Params& params, const Tile& tile,
                                          const float (&d)[kColumns / 2], int consumer) {
    using Part = Out<kIsDown>;
    constexpr int kGroups = Part::kPartColumns / 8;
    const int upper = warp_idx() % 4 * 16 + lane_idx() / 4;
    const int pair = lane_idx() % 4 * 2;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupSize;
    const int first_neuron = tile.neuron + (kIsDown ? consumer * kBoxElements : 0);
    if (params.out[consumer] == nullptr) return;
    unsigned char* out = dynamic_shared_memory() + SharedLayout<GradWeightsGemm>::kOutOffset +
                         consumer * Part::kBytes;
#pragma unroll
    for (int part = 0; part < kColumns / Part::kPartColumns; ++part) {
      sync_named(1 + consumer, kWarpgroupSize);  // the part before has been read
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const float* values = d + 4 * (part * kGroups + j);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = upper + 8 * half;
          const int column = 8 * j + pair;
          const uint32_t word = pack<T>(values[2 * half], values[2 * half + 1]);
          if constexpr (kIsDown) {
            auto* element = reinterpret_cast<uint16_t*>(out + column * Part::kPitchBytes) + row;
            element[0] = static_cast<uint16_t>(word & 0xffffu);
            element[Part::kPitchBytes / 2] = static_cast<uint16_t>(word >> 16);
          } else {
            *reinterpret_cast<uint32_t*>(out + row * Part::kPitchBytes + column * 2) = word;
          }
        }
      }
      sync_named(1 + consumer, kWarpgroupSize);
      const int vector = thread % Part::kVectors;
      constexpr int kThreadRows = Part::kRows / Part::kRowStep;
      Vector16 vectors[kThreadRows];  // all on the way at once
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int row = thread / Part::kVectors + i * Part::kRowStep;
        vectors[i] = load_vector(out + row * Part::kPitchBytes + vector * kVectorBytes);
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int row = thread / Part::kVectors + i * Part::kRowStep;
        const int across = vector * kVectorElements<T>;
        const int neuron = first_neuron + (kIsDown ? across : row);
        const int column = tile.column + part * Part::kPartColumns + (kIsDown ? row : across);
        if (neuron >= params.expert_width || column >= params.hidden_size) continue;
        const int64_t of_all = static_cast<int64_t>(tile.group) * params.expert_width + neuron;
        const int64_t width = static_cast<int64_t>(params.num_experts) * params.expert_width;
        const int64_t offset =
            !kIsDown ? of_all * params.hidden_size + column
            : params.is_apart
                ? (int64_t{tile.group} * params.hidden_size + column) * params.expert_width + neuron
                : column * width + of_all;
        store_vector(params.out[consumer] + offset, vectors[i]);
      }
    }
  }
  static SPARSE_UNIFIED_DEVICE void finish() {}
};

template <typename T, bool kIsDown>
cudaError_t launch_grad_weights(GradWeightsParams<T> params, const GroupedFfnCudaParams& ffn,
                                const DeviceInfo& device, const void* const* neurons,
                                cudaStream_t stream) {
  using Gemm = GradWeightsGemm<T, kIsDown>;
  params.expert_offsets = ffn.expert_offsets;
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.hidden_size = static_cast<int>(ffn.x.columns);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.num_m = ceil_div(params.expert_width, Gemm::kTileNeurons);
  params.num_n = ceil_div(params.hidden_size, kNumColumns);
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(ffn.num_rows, ffn.num_experts);
  for (int i = 0; i < kNumConsumers; ++i) {
    const cudaError_t error =
        make_tensor_map(&params.neurons[i], ffn.dtype, neurons[i], padded_rows, ffn.expert_width,
                        ffn.expert_width, kTileK, kBoxElements, true);
    if (error != cudaSuccess) return error;
  }

  const int64_t num_tiles = ffn.num_experts * params.num_m * params.num_n;
  return launch_persistent_gemm<Gemm>(params, num_tiles, device, stream);
}

template <typename T>
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
        launch_grad_weights<T, false>(gate_and_up, ffn, device, gradients, stream);
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
  return launch_grad_weights<T, true>(down, ffn, device, activations, stream);
}

}  // namespace

cudaError_t grouped_ffn_grad_weights_sm90a(const GroupedFfnBackwardCudaParams& params,
                                           const DeviceInfo& device, const void* grad_gate,
                                           const void* grad_up, const void* hidden,
                                           cudaStream_t stream) {
  return dispatch_half(params.forward.dtype, [&]<typename T>(T) {
    return launch_all<T>(params, device, grad_gate, grad_up, hidden, stream);
  });
}

}  // namespace sparse_unified
