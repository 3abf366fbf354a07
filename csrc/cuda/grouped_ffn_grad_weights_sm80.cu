// SPDX-License-Identifier: Apache-2.0
// grouped_ffn backward, weight gradients of every expert, sums over its rows r:
//   gate and up:  [grad_gate_proj; grad_up_proj][m, n] = sum_r grad_gate_up[r, m] x[row_token[r],
//   n] down:         grad_down_proj[m, n] = sum_r grad_y[r, m] hidden[r, n]
//
// A GEMM of M = 2h, N = D or M = D, N = h, and K = the expert's rows, both operands contiguous in M
// and N; one kernel, two launches. 4 R h D and 2 R h D FLOP. An expert without rows has K = 0 and
// gets zeros. With kept blocks only their neurons are written.
// Preconditions: D and h multiples of 8, pointers aligned to 16 bytes, strides multiples of 8.
#include "cuda/grouped_ffn_sm80.h"
#include "device/epilogue.h"

namespace sparse_unified {
namespace {

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_ffn_grad_weights_kernel(const GroupedFfnGradWeightsKernelParams params) {
  using Loop = Mainloop<T, Shape, Major::kMN, Major::kMN>;
  const GroupedFfnBackwardCudaParams& backward = params.backward.ffn;
  const GroupedFfnCudaParams& ffn = backward.forward;
  const int hidden_size = static_cast<int>(ffn.x.columns);
  const int width = static_cast<int>(ffn.expert_width);
  const int num_m = params.is_down ? hidden_size : 2 * width;
  const int num_n = params.is_down ? width : hidden_size;

  const int tiles_m = ceil_div(num_m, Shape::kM);
  const int tiles_n = ceil_div(num_n, Shape::kN);
  const int block = static_cast<int>(blockIdx.x);
  const int group = block / (tiles_m * tiles_n);
  const TileCoordinates at = rasterize(block % (tiles_m * tiles_n), tiles_m, tiles_n);
  const int first_m = at.m * Shape::kM;
  const int first_n = at.n * Shape::kN;
  const RowRange rows = group_rows(ffn.expert_offsets, group, static_cast<int>(ffn.num_rows));
  const int num_rows = rows.end - rows.begin;

  using RowsA = MatrixRows<T, LinearIndex>;
  using LoaderA = MnContiguousLoader<T, typename Loop::TileA, Shape::kThreads, RowsA>;
  const auto* a =
      static_cast<const T*>(params.is_down ? backward.grad_y : params.backward.grad_gate_up);
  const int column_a = min(first_m + LoaderA::column(), num_m - kChunkElements);
  LoaderA loader_a(RowsA{a + static_cast<int64_t>(rows.begin) * num_m + column_a, num_m, {}},
                   num_rows);

  using RowsB = MatrixRows<T, GatheredIndex>;
  using LoaderB = MnContiguousLoader<T, typename Loop::TileB, Shape::kThreads, RowsB>;
  const auto* b = static_cast<const T*>(params.is_down ? params.backward.hidden : ffn.x.data);
  const int column_b = min(first_n + LoaderB::column(), num_n - kChunkElements);
  const int limit = static_cast<int>(params.is_down ? ffn.num_rows : ffn.x.rows);
  const GatheredIndex index_b{params.is_down ? nullptr : ffn.row_token, rows.begin, limit};
  LoaderB loader_b(RowsB{b + column_b, params.is_down ? num_n : ffn.x.stride, index_b}, num_rows);

  WarpTile<Shape> tile;
  const bool is_active = first_m + tile.first_row < num_m && first_n + tile.first_column < num_n;
  Loop::run(tile, loader_a, loader_b, ceil_div(num_rows, Shape::kK),
            shared_address(dynamic_shared_memory()), is_active);

  auto* grad_gate_proj = static_cast<T*>(backward.grad_gate_proj);  // [I, D] or null
  auto* grad_up_proj = static_cast<T*>(backward.grad_up_proj);      // [I, D] or null
  auto* grad_down_proj = static_cast<T*>(backward.grad_down_proj);  // [D, I]
  // The gradients of experts adjoin whatever lies between the weights.
  const NeuronMap neurons =
      (params.is_down ? neuron_columns(ffn) : neuron_groups(ffn, width)).of(group);
  const int64_t down_columns = ffn.down_proj.columns;  // I, or h of [E, D, h]
  const int64_t first_down = ffn.spacing.down_rows == 0 ? 0 : int64_t{group} * hidden_size;
  store_rounded<T>(tile, [&](int tile_row, int tile_column, const Vector16& vector) {
    const int m = first_m + tile_row;
    const int n = first_n + tile_column;
    if (m >= num_m || n >= num_n) return;
    if (params.is_down) {
      store_vector(grad_down_proj + (first_down + m) * down_columns + neurons(n), vector);
    } else {
      const int neuron = neurons(m < width ? m : m - width);
      T* out = m < width ? grad_gate_proj : grad_up_proj;
      if (out == nullptr) return;
      store_vector(out + static_cast<int64_t>(neuron) * hidden_size + n, vector);
    }
  });
}

}  // namespace

cudaError_t grouped_ffn_grad_weights_sm80(GroupedFfnTileId id,
                                          const GroupedFfnGradWeightsKernelParams& params,
                                          cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.backward.ffn.forward;
  const int64_t num_m = params.is_down ? ffn.x.columns : 2 * ffn.expert_width;
  const int64_t num_n = params.is_down ? ffn.expert_width : ffn.x.columns;
  return dispatch_tile(ffn.dtype, id, [&]<typename T, GroupedFfnTileId kId>() {
    return launch_tiles<kId>(grouped_ffn_grad_weights_kernel<T, TileShapeOf<kId>>, params,
                             ffn.num_experts * ceil_div<int64_t>(num_m, grouped_ffn_tile(kId).m) *
                                 ceil_div<int64_t>(num_n, grouped_ffn_tile(kId).n),
                             stream);
  });
}

}  // namespace sparse_unified
