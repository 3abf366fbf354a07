// SPDX-License-Identifier: Apache-2.0
// y[i] = down_e(silu(gate_e x) * up_e x), x = x[row_token[i]], for the rows of one expert in fp32:
// 6 n D h operations.
//
// Panels of tokens (see ffn_tiles.h) are transposed while gathering. Every product is then a
// weight, broadcast from where it lies, times two vectors of tokens: weights are read in place,
// never packed, so an expert of 148 neurons costs what its share of a dense FFN does. SwiGLU is
// applied to the accumulators, and the hidden panel is already in the layout the down-projection
// wants. A library GEMM would gather, pack x twice, store and load gate, up and hidden, and pack
// hidden: 15 to 20 % of the time at h = 296.
#include "sparse_unified/grouped_ffn.h"

#include <algorithm>

#include "cpu/ffn_tiles.h"

namespace sparse_unified {

#ifdef SPARSE_UNIFIED_AVX512

namespace {

// Gathered rows worked on at once, at most: they, their hidden panels and a tile of weights share 2
// MB of L2. 320 rows of D = 896 are more than half of a block of 512 tokens ever sends to one
// expert.
constexpr int64_t kChunkFloats = 320 * 896;
constexpr int64_t kChunkRows = 320;

int64_t chunk_rows(int64_t hidden_size) {
  const int64_t rows = kChunkFloats / std::max<int64_t>(hidden_size, 1);
  return std::clamp(rows / kPanelRows * kPanelRows, kPanelRows, kChunkRows);
}

// y[d] = sum_j down[d][j] * hidden[j] for kRows outputs of one panel.
template <int64_t kRows, int64_t kVectors>
SPARSE_UNIFIED_AVX512 void output_tile(const WeightTile& tile, const float* hidden, float* y) {
  Float sums[kRows][kVectors] = {};
  dot_tile(tile, hidden, sums);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) store(y + (r * kVectors + v) * kLanes, sums[r][v]);
  }
}

// output_tile for 1 to kTileRows outputs and a panel of `num_rows` rows.
template <int64_t kRows = kTileRows>
SPARSE_UNIFIED_AVX512 void run_output_tile(int64_t rows, int64_t num_rows, const WeightTile& tile,
                                           const float* hidden, float* y) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return run_output_tile<kRows - 1>(rows, num_rows, tile, hidden, y);
    }
  }
  if (num_rows > kLanes) {
    output_tile<kRows, 2>(tile, hidden, y);
  } else {
    output_tile<kRows, 1>(tile, hidden, y);
  }
}

// Rows [first, first + count) through all three products; panels is [count / 32][D][32].
SPARSE_UNIFIED_AVX512 void run_chunk(const GroupedFfnParams& params, const GroupedFfnRows& rows,
                                     int64_t first, int64_t count, float* workspace) {
  const int64_t width = params.expert_width;
  const int64_t max_rows = chunk_rows(params.hidden_size);
  float* panels = workspace;
  float* hidden = panels + max_rows * params.hidden_size;

  for (int64_t row = 0; row < count; row += kPanelRows) {
    const int64_t in_panel = std::min(kPanelRows, count - row);
    float* panel = panels + row * params.hidden_size;
    if (in_panel > kLanes) {
      gather_panel<2>(params.x, params.x_stride, rows.row_token + first + row, in_panel,
                      params.hidden_size, panel);
    } else {
      gather_panel<1>(params.x, params.x_stride, rows.row_token + first + row, in_panel,
                      params.hidden_size, panel);
    }
  }

  // A tile of weights stays in the cache while every panel passes by.
  for (int64_t j = 0, pairs; j < width; j += pairs) {
    pairs = tile_size(width - j, kTilePairs);
    const WeightTile tile{params.gate_proj + (rows.expert * width + j) * params.gate_stride,
                          params.gate_stride,
                          params.up_proj + (rows.expert * width + j) * params.up_stride,
                          params.up_stride, params.hidden_size};
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const int64_t num_rows = std::min(kPanelRows, count - row);
      run_hidden_tile(pairs, num_rows, tile, panels + row * params.hidden_size,
                      hidden + row * width + j * panel_lanes(num_rows));
    }
  }

  // Same again for the outputs, which take the place of the gathered rows.
  for (int64_t d = 0, outputs; d < params.hidden_size; d += outputs) {
    outputs = tile_size(params.hidden_size - d, kTileRows);
    const float* down = params.down_proj + rows.expert * width + d * params.down_stride;
    const WeightTile tile{down, 2 * params.down_stride, down + params.down_stride,
                          2 * params.down_stride, width};
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const int64_t num_rows = std::min(kPanelRows, count - row);
      run_output_tile(outputs, num_rows, tile, hidden + row * width,
                      panels + row * params.hidden_size + d * panel_lanes(num_rows));
    }
  }

  for (int64_t row = 0; row < count; row += kPanelRows) {
    const int64_t in_panel = std::min(kPanelRows, count - row);
    const float* y = panels + row * params.hidden_size;
    if (in_panel > kLanes) {
      scatter_panel<2>(rows, first + row, in_panel, y, params.hidden_size);
    } else {
      scatter_panel<1>(rows, first + row, in_panel, y, params.hidden_size);
    }
  }
}

}  // namespace

bool grouped_ffn_cpu_supported() { return __builtin_cpu_supports("x86-64-v4"); }

void grouped_ffn_cpu(const GroupedFfnParams& params, const GroupedFfnRows& rows, float* workspace) {
  const int64_t max_rows = chunk_rows(params.hidden_size);
  const int64_t num_chunks = (rows.count + max_rows - 1) / max_rows;
  for (int64_t chunk = 0, first = 0; chunk < num_chunks; ++chunk) {
    // Equal shares in whole panels; only the last panel of all may be short.
    const int64_t share = (rows.count - first + num_chunks - chunk - 1) / (num_chunks - chunk);
    const int64_t whole = (share + kPanelRows - 1) / kPanelRows * kPanelRows;
    const int64_t count = std::min(whole, rows.count - first);
    run_chunk(params, rows, first, count, workspace);
    first += count;
  }
}

int64_t grouped_ffn_workspace_floats(int64_t hidden_size, int64_t expert_width) {
  return chunk_rows(hidden_size) * (hidden_size + expert_width);
}

#else

bool grouped_ffn_cpu_supported() { return false; }

int64_t grouped_ffn_workspace_floats(int64_t, int64_t) { return 0; }

void grouped_ffn_cpu(const GroupedFfnParams&, const GroupedFfnRows&, float*) {}

#endif

}  // namespace sparse_unified
