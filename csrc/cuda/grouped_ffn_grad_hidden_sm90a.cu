// SPDX-License-Identifier: Apache-2.0
// First GEMM of the backward pass of grouped_ffn on Hopper: grad_hidden = grad_y down, and from it
// and the kept activations the gradients of gate and up, and hidden once more, each times the
// weight of the row; and parts of the gradient of that weight, <hidden, grad_hidden>.
//
// Persistent kernel (persistent_gemm_sm90a.h), one CTA per SM, grid-stride over tiles of 128 rows x
// 256 neurons, the last of an expert as few as its neurons take in multiples of 32 (592 = 2 * 256 +
// 80 takes 608 columns of products, 1184 = 4 * 256 + 160 takes no more).
//
// Warp roles: 1 producer warp (one elected lane issues TMA for 128 rows of grad_y and, in four
// boxes of 64 neurons or up to seven of 32, 64 rows of down, where neurons are contiguous:
// Major::kMN), 2 consumer warpgroups (64 rows each, m64n256k16, 128 accumulators a thread). 4
// pipeline stages of 64 k, 48 KB each. In the epilogue the lanes of a quad exchange their sums, so
// that each reads gate and up of 8 neurons of a row, and writes the three results, in vectors of 16
// bytes; a lane adds hidden times grad_hidden up over its neurons in ascending order, the quad by a
// butterfly. Results go to buffers whose groups are padded to whole tiles; padding rows get zeros,
// which the weight gradients rely on: what the tile holds there are the rows of another expert.
//
// Clusters of two CTAs take two neighbouring tiles of rows and multicast the weights, half of the
// boxes each. Where a group has no second tile, that CTA loads no rows and stores nothing.
//
// Bytes: grad_y is read h / 256 times, down once for 16 row tiles, mostly from L2, where every tile
// of rows or two share its reads; 2 R h elements are read and 3 R h written. FLOPs: 2 R D h.
// Preconditions: D % 8 == 0, h % 16 == 0, rows of down and grad_y on 16-byte boundaries.
#include <utility>

#include "cuda/persistent_gemm_sm90a.h"
#include "device/epilogue.h"
#include "device/math.h"
#include "device/tensor_copy.h"
#include "device/vector.h"

namespace sparse_unified {
namespace {

constexpr int kTileNeurons = kSm90aPartNeurons;
constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;  // of grad_y, a stage
constexpr int kNumBoxes = kTileNeurons / kBoxElements;    // of down

// Vectors of 8 neurons, 32 apart, whose gate and up a thread has on the way at a time.
constexpr int kBatch = kBoxElements / 32;

template <typename T>
struct GradHiddenParams {
  TensorMap grad_y;               // [R, D], boxes [128, 64]
  TensorMap down_proj;            // [D, I], boxes [64, 64]
  TensorMap narrow_down_proj;     // and [64, 32]
  const int32_t* expert_offsets;  // [E + 1], or null
  const T* gate_rows;             // [R, h]
  const T* up_rows;               // [R, h]
  T* grad_gate;                   // [padded rows, h]
  T* grad_up;                     // [padded rows, h]
  T* hidden;                      // [padded rows, h], or null
  RowFactors factors;             //
  int num_rows;                   // R
  int num_experts;                // E
  int expert_width;               // h
  int group_rows;                 // rows of down_proj from one group to the next, or 0
  int group_columns;              // and columns
  int num_n;                      // tiles of neurons
  int num_k;                      // stages of a tile
};

// Gradients of 8 neurons of a row from grad_hidden, of even and odd neurons, and the kept gate and
// up; adds to `sum` what they have of the gradient of the row's weight.
template <typename T>
SPARSE_UNIFIED_DEVICE void store_gradients(const GradHiddenParams<T>& params, int64_t padded,
                                           const float (&even)[4], const float (&odd)[4],
                                           const Vector16& gate_vector, const Vector16& up_vector,
                                           float weight, float& sum) {
  float gate[8], up[8], hidden[8];
  widen<T>(gate_vector, gate);
  widen<T>(up_vector, up);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float grad_hidden = i % 2 == 0 ? even[i / 2] : odd[i / 2];
    const SwigluGradient gradient = swiglu_gradient(weight * grad_hidden, gate[i], up[i]);
    sum = fmaf(gradient.hidden, grad_hidden, sum);
    gate[i] = gradient.gate;
    up[i] = gradient.up;
    hidden[i] = weight * gradient.hidden;
  }
  store_vector(params.grad_gate + padded, narrow<T>(gate));
  store_vector(params.grad_up + padded, narrow<T>(up));
  if (params.hidden != nullptr) store_vector(params.hidden + padded, narrow<T>(hidden));
}

template <typename T_, int kNumBlocks>
struct GradHiddenGemm : RowTiles<kNumBlocks, false, true> {
  using T = T_;
  using Params = GradHiddenParams<T>;
  using Ring = RingBarriers<4, kNumBlocks>;
  using RowTiles<kNumBlocks, false, true>::kBlocks;
  static constexpr int kStages = 4;
  static constexpr int kColumns = kTileNeurons;
  static constexpr Major kMajorA = Major::kK;
  static constexpr Major kMajorB = Major::kMN;
  static constexpr bool kFences = false;
  static constexpr bool kFindsAhead = true;
  static constexpr bool kAllowsNextKernel = false;
  // 40 and 232 registers for 128 and 256 threads are all but 1024 of the 65536.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kProducerWarps = 1;
  static constexpr int kFullArrivals = 1;
  static constexpr int kStageBytes = kRowsBytes + kNumBoxes * kBoxBytes;
  static constexpr int kOutBytes = 0;

  // Neurons of the group from the tile's first on, and the columns that the product takes for them.
  static SPARSE_UNIFIED_DEVICE int neurons(const Params& params, const RowTile& tile) {
    return params.expert_width - tile.n * kTileNeurons;
  }
  static SPARSE_UNIFIED_DEVICE int columns(const Params& params, const RowTile& tile) {
    return columns_for<kColumns>(neurons(params, tile));
  }

  static SPARSE_UNIFIED_DEVICE void prefetch(const Params& params) {
    prefetch_tensor_map(&params.grad_y);
    prefetch_tensor_map(&params.down_proj);
    prefetch_tensor_map(&params.narrow_down_proj);
  }

  static SPARSE_UNIFIED_DEVICE void produce(const Params& params, uint32_t shared,
                                            const Ring& ring) {
    // NOTE: the other lanes do not even wait: nothing would keep them from falling two phases
    // behind, and a wait names the parity of its phase alone.
    const bool copies_boxes = elect_lane();
    RingPosition<kStages> at;
    for_each_tile<GradHiddenGemm, true>(params, [&](const RowTile& tile) {
      const int neuron = tile.group * params.group_columns + tile.n * kTileNeurons;
      const int first_row = tile.group * params.group_rows;
      const ColumnBoxes boxes = column_boxes<kColumns>(columns(params, tile));
      const TensorMap* down = boxes.is_narrow ? &params.narrow_down_proj : &params.down_proj;
      // Those that this CTA brings.
      const int part_boxes = ceil_div(boxes.num_boxes, kBlocks);
      const int first_box = kBlocks == 1 ? 0 : cluster_rank() * part_boxes;
      const int end_box = min(first_box + part_boxes, boxes.num_boxes);
      const int box_bytes = boxes.num_boxes * boxes.bytes;
      for (int k = 0; k < params.num_k; ++k, at.advance()) {
        if (!copies_boxes) continue;
        ring.wait_empty(at);
        const uint32_t stage = shared + at.stage * kStageBytes;
        const uint32_t full = ring.full(at.stage);
        if (kBlocks == 1 || tile.has_rows()) {
          barrier_arrive_expect_bytes(full, kRowsBytes + box_bytes);
          load_box(stage, &params.grad_y, tile.first_row, k * kTileK, full);
        } else {
          barrier_arrive_expect_bytes(full, box_bytes);
        }
        for (int box = first_box; box < end_box; ++box) {
          load_box_to_all<kBlocks>(stage + kRowsBytes + box * boxes.bytes, down,
                                   first_row + k * kTileK, neuron + box * boxes.elements, full);
        }
      }
    });
  }

  template <int kN>
  static SPARSE_UNIFIED_DEVICE StageOperands operands(uint32_t stage, int consumer, int) {
    return {operand_descriptor(stage + consumer * kConsumerRows * kSwizzleRowBytes, kMajorA),
            column_descriptor<kN, kColumns>(stage + kRowsBytes)};
  }
  static SPARSE_UNIFIED_DEVICE int steps(const Params&, int) { return kStageSteps; }

  static SPARSE_UNIFIED_DEVICE void store(const Params& params, const RowTile& tile,
                                          const float (&d)[kColumns / 2], int consumer) {
    const int first_neuron = tile.n * kTileNeurons + lane_idx() % 4 * 8;
    const int num_neurons = neurons(params, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = consumer * kConsumerRows + warp_idx() % 4 * 16 + lane_idx() / 4 + 8 * half;
      const bool is_valid = tile.first_row + row < tile.end_row;
      const int64_t kept =
          static_cast<int64_t>(tile.first_row + row) * params.expert_width + first_neuron;
      const int64_t padded =
          static_cast<int64_t>(tile.slot * kTileRows + row) * params.expert_width + first_neuron;
      const RowFactors& factors = params.factors;
      const float weight =
          is_valid && factors.weights != nullptr ? factors.weights[tile.first_row + row] : 1.0f;
      float sum = 0.0f;
#pragma unroll
      for (int first = 0; first < kTileNeurons / 32; first += kBatch) {
        if (32 * first >= num_neurons) break;  // nor are there products
        // NOTE: all loads of a batch before its stores, which the compiler may not let them pass.
        Vector16 gate[kBatch], up[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int offset = 32 * (first + i);
          const bool is_kept = is_valid && first_neuron + offset < params.expert_width;
          gate[i] = is_kept ? load_vector(params.gate_rows + kept + offset) : Vector16{};
          up[i] = is_kept ? load_vector(params.up_rows + kept + offset) : Vector16{};
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          float even[4], odd[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* pair = d + 4 * (4 * (first + i) + j) + 2 * half;
            even[j] = is_valid ? pair[0] : 0.0f;
            odd[j] = is_valid ? pair[1] : 0.0f;
          }
          transpose_quad(even);
          transpose_quad(odd);
          const int offset = 32 * (first + i);
          if (first_neuron + offset >= params.expert_width) continue;
          store_gradients(params, padded + offset, even, odd, gate[i], up[i], weight, sum);
        }
      }
      if (factors.parts == nullptr) continue;
      sum = warp_sum<4>(sum);
      if (is_valid && lane_idx() % 4 == 0) {
        const int64_t part = static_cast<int64_t>(tile.n) * params.num_rows;
        factors.parts[part + tile.first_row + row] = sum;
      }
    }
  }
  static SPARSE_UNIFIED_DEVICE void finish() {}
};

template <typename T, int kBlocks>
cudaError_t launch_grad_hidden(const GroupedFfnBackwardCudaParams& backward,
                               const DeviceInfo& device, void* grad_gate, void* grad_up,
                               void* hidden, const RowFactors& factors, cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = backward.forward;
  if (ffn.num_rows == 0) return cudaSuccess;  // a tensor map has rows
  GradHiddenParams<T> params{};
  params.expert_offsets = ffn.expert_offsets;
  params.gate_rows = static_cast<const T*>(ffn.gate_rows);
  params.up_rows = static_cast<const T*>(ffn.up_rows);
  params.grad_gate = static_cast<T*>(grad_gate);
  params.grad_up = static_cast<T*>(grad_up);
  params.hidden = static_cast<T*>(hidden);
  params.factors = factors;
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.group_rows = static_cast<int>(ffn.spacing.down_rows);
  params.group_columns = params.group_rows == 0 ? params.expert_width : 0;
  params.num_n = ceil_div(params.expert_width, kTileNeurons);
  params.num_k = ceil_div(static_cast<int>(ffn.x.columns), kTileK);
  cudaError_t error = make_tensor_map(&params.grad_y, ffn.dtype, backward.grad_y, ffn.num_rows,
                                      ffn.x.columns, ffn.x.columns, kTileRows, kTileK, true);
  if (error != cudaSuccess) return error;
  const Matrix& down = ffn.down_proj;
  for (const auto& [map, box_columns] :
       {std::pair{&params.down_proj, kBoxElements}, {&params.narrow_down_proj, kNarrowElements}}) {
    error = make_tensor_map(map, ffn.dtype, down.data, down.rows, down.columns, down.stride, kTileK,
                            box_columns, true);
    if (error != cudaSuccess) return error;
  }

  const int64_t most_tiles =
      max_row_tiles(ffn.num_rows, ffn.num_experts, kBlocks * kTileRows) * params.num_n;
  return launch_persistent_gemm<GradHiddenGemm<T, kBlocks>>(params, most_tiles, device, stream);
}

}  // namespace

cudaError_t grouped_ffn_grad_hidden_sm90a(const GroupedFfnBackwardCudaParams& params,
                                          const DeviceInfo& device,
                                          const GroupedFfnSm90aOptions& options, void* grad_gate,
                                          void* grad_up, void* hidden, const RowFactors& factors,
                                          cudaStream_t stream) {
  return dispatch_half(params.forward.dtype, [&]<typename T>(T) {
    return dispatch_value<1, 2>(options.multicasts_backward ? 2 : 1, [&]<int kBlocks>() {
      return launch_grad_hidden<T, kBlocks>(params, device, grad_gate, grad_up, hidden, factors,
                                            stream);
    });
  });
}

}  // namespace sparse_unified
