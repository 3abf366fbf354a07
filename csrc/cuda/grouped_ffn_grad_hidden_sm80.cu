// SPDX-License-Identifier: Apache-2.0
// grouped_ffn backward, first GEMM: the gradient before SwiGLU,
//   grad_hidden[r] = grad_y[r] down_proj[:, expert's neurons]
//   grad_gate_up[r] = [grad_hidden up s (1 + gate (1 - s)), grad_hidden gate s], s = sigmoid(gate)
//   hidden[r] = gate s up, once more, when the gradient of down_proj needs it,
// each times the weight of the row; and the gradient of that weight, the sum over a row of hidden
// grad_hidden, in parts: a lane sums its columns in ascending order, a quad its lanes by a
// butterfly.
//
// A GEMM of M = the rows of an expert, N = h, K = D, where down_proj is N-contiguous. grad_hidden
// stays fp32 and leaves only as the gradients made of it. 2 R h D FLOP; reads grad_y, down_proj,
// gate_rows, up_rows, writes 2 R h elements, or 3 R h.
// Preconditions: D and h multiples of 8, pointers aligned to 16 bytes, strides multiples of 8.
#include "cuda/grouped_ffn_sm80.h"
#include "device/epilogue.h"
#include "device/math.h"

namespace sparse_unified {
namespace {

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_ffn_grad_hidden_kernel(const GroupedFfnBackwardKernelParams params) {
  using Loop = Mainloop<T, Shape, Major::kK, Major::kMN>;
  const GroupedFfnCudaParams& ffn = params.ffn.forward;
  const int hidden_size = static_cast<int>(ffn.x.columns);
  const int width = static_cast<int>(ffn.expert_width);

  RowTile at;
  if (!find_row_tile<Shape::kM>(ffn.expert_offsets, static_cast<int>(ffn.num_experts),
                                static_cast<int>(ffn.num_rows), ceil_div(width, Shape::kN),
                                static_cast<int>(blockIdx.x), at)) {
    return;
  }
  const int first_neuron = at.n * Shape::kN;

  const auto* grad_y = static_cast<const T*>(params.ffn.grad_y);  // [R, D]
  KContiguousLoader<T, typename Loop::TileA, Shape::kThreads, LinearIndex> loader_a(
      [&](int row) { return grad_y + static_cast<int64_t>(at.clamped(row)) * hidden_size; },
      LinearIndex{}, hidden_size);

  using RowsB = MatrixRows<T, LinearIndex>;
  using LoaderB = MnContiguousLoader<T, typename Loop::TileB, Shape::kThreads, RowsB>;
  const auto* down_proj = ffn.down_proj.row<T>(at.group * ffn.spacing.down_rows);  // [D, I]
  const int copied_neuron = min(first_neuron + LoaderB::column(), width - kChunkElements);
  const int column = neuron_columns(ffn).of(at.group)(copied_neuron);
  LoaderB loader_b(RowsB{down_proj + column, ffn.down_proj.stride, {}}, hidden_size);

  WarpTile<Shape> tile;
  const bool is_active =
      at.first_row + tile.first_row < at.end_row && first_neuron + tile.first_column < width;
  Loop::run(tile, loader_a, loader_b, ceil_div(hidden_size, Shape::kK),
            shared_address(dynamic_shared_memory()), is_active);

  const auto* gate_rows = static_cast<const T*>(ffn.gate_rows);  // [R, h]
  const auto* up_rows = static_cast<const T*>(ffn.up_rows);      // [R, h]
  auto* grad_gate_up = static_cast<T*>(params.grad_gate_up);     // [R, 2h]
  auto* hidden_rows = static_cast<T*>(params.hidden);            // [R, h] or null
  const RowFactors& factors = params.factors;
  static_assert(Shape::kWarpN == kSm80PartNeurons);
  const int part = (first_neuron + tile.first_column) / kSm80PartNeurons;
#pragma unroll
  for (int m = 0; m < Shape::kWarpM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = at.first_row + lane_row(tile, m, half);
      const bool is_valid = row < at.end_row;
      const float weight = is_valid && factors.weights != nullptr ? factors.weights[row] : 1.0f;
      float sum = 0.0f;
#pragma unroll
      for (int group = 0; group < Shape::kWarpN / 32; ++group) {
        float even[4];  // columns
        float odd[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* d = tile.values[m][group * 4 + j] + 2 * half;
          even[j] = d[0];
          odd[j] = d[1];
        }
        transpose_quad(even);
        transpose_quad(odd);

        const int neuron = first_neuron + tile.first_column + group * 32 + lane_idx() % 4 * 8;
        if (!is_valid || neuron >= width) continue;
        const int64_t offset = static_cast<int64_t>(row) * width + neuron;
        float gate[8];
        float up[8];
        widen<T>(load_vector(gate_rows + offset), gate);
        widen<T>(load_vector(up_rows + offset), up);
        float hidden[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float grad_hidden = i % 2 == 0 ? even[i / 2] : odd[i / 2];
          const SwigluGradient gradient = swiglu_gradient(weight * grad_hidden, gate[i], up[i]);
          sum = fmaf(gradient.hidden, grad_hidden, sum);
          gate[i] = gradient.gate;
          up[i] = gradient.up;
          hidden[i] = weight * gradient.hidden;
        }
        T* grad_row = grad_gate_up + static_cast<int64_t>(row) * 2 * width + neuron;
        store_vector(grad_row, narrow<T>(gate));
        store_vector(grad_row + width, narrow<T>(up));
        if (hidden_rows != nullptr) store_vector(hidden_rows + offset, narrow<T>(hidden));
      }
      if (factors.parts == nullptr) continue;
      sum = warp_sum<4>(sum);
      if (is_valid && lane_idx() % 4 == 0 && part * kSm80PartNeurons < width) {
        factors.parts[static_cast<int64_t>(part) * ffn.num_rows + row] = sum;
      }
    }
  }
}

}  // namespace

cudaError_t grouped_ffn_grad_hidden_sm80(GroupedFfnTileId id,
                                         const GroupedFfnBackwardKernelParams& params,
                                         cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.ffn.forward;
  return dispatch_tile(ffn.dtype, id, [&]<typename T, GroupedFfnTileId kId>() {
    return launch_tiles<kId>(grouped_ffn_grad_hidden_kernel<T, TileShapeOf<kId>>, params,
                             num_row_gemm_tiles(kId, ffn, ffn.expert_width), stream);
  });
}

}  // namespace sparse_unified
