// SPDX-License-Identifier: Apache-2.0
// grouped_ffn, down-projection: y[r] = hidden[r] down_proj[:, expert's neurons]^T.
//
// A GEMM of M = the rows of an expert, N = D, K = h, the last read as a column view of down_proj
// (kept blocks: 8 neurons of a chunk are neighbours). 2 R h D FLOP; reads hidden and down_proj,
// writes R D elements.
// Preconditions: D and h multiples of 8, pointers aligned to 16 bytes, strides multiples of 8.
#include "cuda/grouped_ffn_sm80.h"
#include "device/epilogue.h"

namespace sparse_unified {
namespace {

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_ffn_down_kernel(const GroupedFfnForwardKernelParams params) {
  using Loop = Mainloop<T, Shape, Major::kK, Major::kK>;
  const GroupedFfnCudaParams& ffn = params.ffn;
  const int hidden_size = static_cast<int>(ffn.x.columns);
  const int width = static_cast<int>(ffn.expert_width);

  RowTile at;
  if (!find_row_tile<Shape::kM>(ffn.expert_offsets, static_cast<int>(ffn.num_experts),
                                static_cast<int>(ffn.num_rows), ceil_div(hidden_size, Shape::kN),
                                static_cast<int>(blockIdx.x), at)) {
    return;
  }
  const int first_column = at.n * Shape::kN;

  const auto* hidden = static_cast<const T*>(params.hidden);  // [R, h]
  KContiguousLoader<T, typename Loop::TileA, Shape::kThreads, LinearIndex> loader_a(
      [&](int row) { return hidden + static_cast<int64_t>(at.clamped(row)) * width; },
      LinearIndex{}, width);

  const auto* down_proj = ffn.down_proj.row<T>(at.group * ffn.spacing.down_rows);  // [D, I]
  KContiguousLoader<T, typename Loop::TileB, Shape::kThreads, NeuronMap> loader_b(
      [&](int row) {
        return down_proj + min(first_column + row, hidden_size - 1) * ffn.down_proj.stride;
      },
      neuron_columns(ffn).of(at.group), width);

  WarpTile<Shape> tile;
  const bool is_active =
      at.first_row + tile.first_row < at.end_row && first_column + tile.first_column < hidden_size;
  Loop::run(tile, loader_a, loader_b, ceil_div(width, Shape::kK),
            shared_address(dynamic_shared_memory()), is_active);

  auto* y = static_cast<T*>(ffn.y);  // [R, D]
  store_rounded<T>(tile, [&](int tile_row, int tile_column, const Vector16& vector) {
    const int row = at.first_row + tile_row;
    const int column = first_column + tile_column;
    if (row < at.end_row && column < hidden_size) {
      store_vector(y + static_cast<int64_t>(row) * hidden_size + column, vector);
    }
  });
}

}  // namespace

cudaError_t grouped_ffn_down_sm80(GroupedFfnTileId id, const GroupedFfnForwardKernelParams& params,
                                  cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.ffn;
  return dispatch_tile(ffn.dtype, id, [&]<typename T, GroupedFfnTileId kId>() {
    return launch_tiles<kId>(grouped_ffn_down_kernel<T, TileShapeOf<kId>>, params,
                             num_row_gemm_tiles(kId, ffn, ffn.x.columns), stream);
  });
}

}  // namespace sparse_unified
