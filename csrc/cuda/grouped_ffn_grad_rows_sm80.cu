// SPDX-License-Identifier: Apache-2.0
// grouped_ffn backward, gradient of the input rows:
//   grad_rows[r] = grad_gate[r] gate_proj + grad_up[r] up_proj
//
// One GEMM of M = the rows of an expert, N = D, K = 2h: the rows of the workspace hold grad_gate
// and grad_up side by side, and row k of B is a gate neuron for k < h, an up neuron after that. 4 R
// h D FLOP, one fp32 sum, one rounding; writes R D elements. Preconditions: D and h multiples of 8,
// pointers aligned to 16 bytes, strides multiples of 8.
#include "cuda/grouped_ffn_sm80.h"
#include "device/epilogue.h"

namespace sparse_unified {
namespace {

// Rows of gate_proj, then of up_proj, as MnContiguousLoader takes them.
template <typename T>
struct GateUpRows {
  const T* gate_proj;  // at the column of this thread
  const T* up_proj;    // likewise
  int64_t gate_stride;
  int64_t up_stride;
  NeuronMap neurons;
  int width;  // h
  using Pending = NeuronMap::Pending;
  SPARSE_UNIFIED_DEVICE Pending look_up(int k) const {
    return neurons.look_up(k < width ? k : k - width);
  }
  SPARSE_UNIFIED_DEVICE const T* pointer(Pending pending, int k) const {
    const int row = neurons.resolve(pending, k);
    return k < width ? gate_proj + row * gate_stride : up_proj + row * up_stride;
  }
};

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_ffn_grad_rows_kernel(const GroupedFfnBackwardKernelParams params) {
  using Loop = Mainloop<T, Shape, Major::kK, Major::kMN>;
  const GroupedFfnCudaParams& ffn = params.ffn.forward;
  const int hidden_size = static_cast<int>(ffn.x.columns);
  const int width = static_cast<int>(ffn.expert_width);

  RowTile at;
  if (!find_row_tile<Shape::kM>(ffn.expert_offsets, static_cast<int>(ffn.num_experts),
                                static_cast<int>(ffn.num_rows), ceil_div(hidden_size, Shape::kN),
                                static_cast<int>(blockIdx.x), at)) {
    return;
  }
  const int first_column = at.n * Shape::kN;

  const auto* grad_gate_up = static_cast<const T*>(params.grad_gate_up);  // [R, 2h]
  KContiguousLoader<T, typename Loop::TileA, Shape::kThreads, LinearIndex> loader_a(
      [&](int row) { return grad_gate_up + static_cast<int64_t>(at.clamped(row)) * 2 * width; },
      LinearIndex{}, 2 * width);

  using LoaderB = MnContiguousLoader<T, typename Loop::TileB, Shape::kThreads, GateUpRows<T>>;
  const int column = min(first_column + LoaderB::column(), hidden_size - kChunkElements);
  const GateUpRows<T> rows_b{ffn.gate_proj.row<T>(0) + column,  // [I, D]
                             ffn.up_proj.row<T>(0) + column,    // [I, D]
                             ffn.gate_proj.stride,
                             ffn.up_proj.stride,
                             neuron_rows(ffn).of(at.group),
                             width};
  LoaderB loader_b(rows_b, 2 * width);

  WarpTile<Shape> tile;
  const bool is_active =
      at.first_row + tile.first_row < at.end_row && first_column + tile.first_column < hidden_size;
  Loop::run(tile, loader_a, loader_b, ceil_div(2 * width, Shape::kK),
            shared_address(dynamic_shared_memory()), is_active);

  auto* grad_rows = static_cast<T*>(params.ffn.grad_rows);  // [R, D]
  store_rounded<T>(tile, [&](int tile_row, int tile_column, const Vector16& vector) {
    const int row = at.first_row + tile_row;
    const int grad_column = first_column + tile_column;
    if (row < at.end_row && grad_column < hidden_size) {
      store_vector(grad_rows + static_cast<int64_t>(row) * hidden_size + grad_column, vector);
    }
  });
}

}  // namespace

cudaError_t grouped_ffn_grad_rows_sm80(GroupedFfnTileId id,
                                       const GroupedFfnBackwardKernelParams& params,
                                       cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.ffn.forward;
  return dispatch_tile(ffn.dtype, id, [&]<typename T, GroupedFfnTileId kId>() {
    return launch_tiles<kId>(grouped_ffn_grad_rows_kernel<T, TileShapeOf<kId>>, params,
                             num_row_gemm_tiles(kId, ffn, ffn.x.columns), stream);
  });
}

}  // namespace sparse_unified
