// SPDX-License-Identifier: Apache-2.0
// grouped_ffn, up-projection: hidden[r] = silu(x[row_token[r]] gate_proj^T) * (x[...] up_proj^T).
//
// A GEMM of M = the rows of an expert, N = 2h, K = D. Columns of N alternate between 8 gate neurons
// and the 8 up neurons of the same index, so that both of a neuron lie in the same lane and
// register position of neighbouring accumulators. 4 R h D FLOP; reads (with L2) x, gate_proj and
// up_proj, writes R h elements, and twice more when gate_rows and up_rows are kept. Preconditions:
// D and h multiples of 8, pointers aligned to 16 bytes, strides multiples of 8.
#include "cuda/grouped_ffn_sm80.h"
#include "device/epilogue.h"
#include "device/math.h"

namespace sparse_unified {
namespace {

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_ffn_up_kernel(const GroupedFfnForwardKernelParams params) {
  using Loop = Mainloop<T, Shape, Major::kK, Major::kK>;
  const GroupedFfnCudaParams& ffn = params.ffn;
  const int hidden_size = static_cast<int>(ffn.x.columns);
  const int width = static_cast<int>(ffn.expert_width);

  RowTile at;
  if (!find_row_tile<Shape::kM>(ffn.expert_offsets, static_cast<int>(ffn.num_experts),
                                static_cast<int>(ffn.num_rows), ceil_div(2 * width, Shape::kN),
                                static_cast<int>(blockIdx.x), at)) {
    return;
  }
  const int first_neuron = at.n * (Shape::kN / 2);

  const auto* x = ffn.x.row<T>(0);  // [T, D]
  const GatheredIndex tokens{ffn.row_token, 0, static_cast<int>(ffn.x.rows)};
  KContiguousLoader<T, typename Loop::TileA, Shape::kThreads, LinearIndex> loader_a(
      [&](int row) {
        const int at_row = at.clamped(row);
        return x + tokens.resolve(tokens.look_up(at_row), at_row) * ffn.x.stride;
      },
      LinearIndex{}, hidden_size);

  const auto* gate_proj = ffn.gate_proj.row<T>(0);  // [I, D]
  const auto* up_proj = ffn.up_proj.row<T>(0);      // [I, D]
  const NeuronMap neurons = neuron_rows(ffn).of(at.group);
  KContiguousLoader<T, typename Loop::TileB, Shape::kThreads, LinearIndex> loader_b(
      [&](int row) {
        const int weight_row = neurons(min(first_neuron + row / 16 * 8 + row % 8, width - 1));
        return row % 16 < 8 ? gate_proj + weight_row * ffn.gate_proj.stride
                            : up_proj + weight_row * ffn.up_proj.stride;
      },
      LinearIndex{}, hidden_size);

  WarpTile<Shape> tile;
  const int warp_neuron = first_neuron + tile.first_column / 2;
  const bool is_active = at.first_row + tile.first_row < at.end_row && warp_neuron < width;
  Loop::run(tile, loader_a, loader_b, ceil_div(hidden_size, Shape::kK),
            shared_address(dynamic_shared_memory()), is_active);

  static_assert(Shape::kWarpN == 64, "a warp has 4 pairs of gate and up, a lane 8 of its neurons");
  const int neuron = warp_neuron + lane_idx() % 4 * 8;
#pragma unroll
  for (int m = 0; m < Shape::kWarpM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vector16 gate_words;
      Vector16 up_words;
      Vector16 hidden_words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* gate = tile.values[m][2 * j] + 2 * half;
        const float* up = tile.values[m][2 * j + 1] + 2 * half;
        gate_words.words[j] = pack<T>(gate[0], gate[1]);
        up_words.words[j] = pack<T>(up[0], up[1]);
        hidden_words.words[j] = pack<T>(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
      }
      const int row = at.first_row + lane_row(tile, m, half);
      const int64_t offset = static_cast<int64_t>(row) * width + neuron;
      const bool exists = row < at.end_row && neuron < width;
      transpose_quad(hidden_words.words);
      if (exists) store_vector(static_cast<T*>(params.hidden) + offset, hidden_words);
      if (ffn.gate_rows != nullptr) {
        transpose_quad(gate_words.words);
        if (exists) store_vector(static_cast<T*>(ffn.gate_rows) + offset, gate_words);
      }
      if (ffn.up_rows != nullptr) {
        transpose_quad(up_words.words);
        if (exists) store_vector(static_cast<T*>(ffn.up_rows) + offset, up_words);
      }
    }
  }
}

}  // namespace

cudaError_t grouped_ffn_up_sm80(GroupedFfnTileId id, const GroupedFfnForwardKernelParams& params,
                                cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = params.ffn;
  return dispatch_tile(ffn.dtype, id, [&]<typename T, GroupedFfnTileId kId>() {
    return launch_tiles<kId>(grouped_ffn_up_kernel<T, TileShapeOf<kId>>, params,
                             num_row_gemm_tiles(kId, ffn, 2 * ffn.expert_width), stream);
  });
}

}  // namespace sparse_unified
