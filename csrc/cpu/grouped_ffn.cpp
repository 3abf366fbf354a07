// SPDX-License-Identifier: Apache-2.0
// y[i] = down_e(silu(gate_e x) * up_e x), x = x[row_token[i]], for the rows of one expert in fp32:
// 6 n D h operations.
//
// A vector holds 16 tokens, and a panel of 32 (or, at the end, 16) tokens is laid out [D][tokens],
// transposed while gathering. Every product is then a weight, broadcast from where it lies, times
// two vectors of tokens: weights are read in place, never packed, so an expert of 148 neurons costs
// what its share of a dense FFN does. SwiGLU is applied to the accumulators, and the hidden panel
// is already in the layout the down-projection wants. A library GEMM would gather, pack x twice,
// store and load gate, up and hidden, and pack hidden: 15 to 20 % of the time at h = 296.
#include "sparse_unified/grouped_ffn.h"

#include <algorithm>

#include "cpu/vector.h"

namespace sparse_unified {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define SPARSE_UNIFIED_AVX512 __attribute__((target("arch=x86-64-v4")))

namespace {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanelRows = kPanelVectors * kLanes;
// 7 neurons (gate and up) or 14 outputs, times 2 vectors of tokens: 28 of 32 registers accumulate.
constexpr int64_t kTilePairs = 7;
constexpr int64_t kTileRows = 14;
// A sum is cut into blocks, so that fp32 rounding grows with their number and not with D.
constexpr int64_t kSumBlock = 512;
// Gathered rows worked on at once, at most: they, their hidden panels and a tile of weights share 2
// MB of L2. 320 rows of D = 896 are more than half of a block of 512 tokens ever sends to one
// expert.
constexpr int64_t kChunkFloats = 320 * 896;
constexpr int64_t kChunkRows = 320;

int64_t chunk_rows(int64_t hidden_size) {
  const int64_t rows = kChunkFloats / std::max<int64_t>(hidden_size, 1);
  return std::clamp(rows / kPanelRows * kPanelRows, kPanelRows, kChunkRows);
}

// Size of the next tile when `rest` rows remain: equal tiles, none too small to fill the pipelines.
int64_t tile_size(int64_t rest, int64_t largest) {
  const int64_t num_tiles = (rest + largest - 1) / largest;
  return (rest + num_tiles - 1) / num_tiles;
}

// Lanes a panel of `num_rows` rows is laid out with.
int64_t panel_lanes(int64_t num_rows) { return num_rows > kLanes ? kPanelRows : kLanes; }

// How far ahead of a row that is read and written the next lines are asked for.
constexpr int64_t kAheadFloats = 64;

// A tile of weight rows, even rows from `even`, odd rows from `odd`.
struct WeightTile {
  const float* even;
  int64_t even_stride;
  const float* odd;
  int64_t odd_stride;
  int64_t length;

  const float* row(int64_t r) const {
    return r % 2 == 0 ? even + r / 2 * even_stride : odd + r / 2 * odd_stride;
  }
};

// sums[r][v] = sum_k tile.row(r)[k] * panel[k][v].
template <int64_t kRows, int64_t kVectors>
SPARSE_UNIFIED_INLINE void dot_tile(const WeightTile& tile, const float* panel,
                                    Float (&sums)[kRows][kVectors]) {
  for (int64_t block = 0; block < tile.length; block += kSumBlock) {
    const int64_t block_end = std::min(block + kSumBlock, tile.length);
    Float acc[kRows][kVectors] = {};
    for (int64_t k = block; k < block_end; ++k) {
      Float values[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) values[v] = load(panel + (k * kVectors + v) * kLanes);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t v = 0; v < kVectors; ++v) acc[r][v] += tile.row(r)[k] * values[v];
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = block == 0 ? acc[r][v] : sums[r][v] + acc[r][v];
      }
    }
  }
}

// Transposes 16 x 16 in place: in step `width`, rows i and i + width swap their off-diagonal
// blocks.
template <int64_t kWidth>
SPARSE_UNIFIED_INLINE void transpose_step(Float (&rows)[kLanes]) {
  Int low;
  Int high;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const bool is_low = (lane & kWidth) == 0;
    low[lane] = is_low ? lane : lane - kWidth + kLanes;
    high[lane] = is_low ? lane + kWidth : lane + kLanes;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if ((i & kWidth) != 0) continue;
    const Float a = rows[i];
    const Float b = rows[i + kWidth];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kWidth] = __builtin_shuffle(a, b, high);
  }
}

SPARSE_UNIFIED_INLINE void transpose(Float (&rows)[kLanes]) {
  transpose_step<8>(rows);
  transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// panel[d][i] = x[row_token[i]][d]; lanes beyond `count` are zero.
template <int64_t kVectors>
SPARSE_UNIFIED_AVX512 void gather_panel(const GroupedFfnParams& params, const int32_t* row_token,
                                        int64_t count, float* panel) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t lanes = std::min(kLanes, count - v * kLanes);
    const float* sources[kLanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      sources[lane] = params.x + row_token[v * kLanes + lane] * params.x_stride;
    }
    for (int64_t d = 0; d < params.hidden_size; d += kLanes) {
      const int64_t n = std::min(kLanes, params.hidden_size - d);
      Float rows[kLanes] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        rows[lane] = n == kLanes ? load(sources[lane] + d) : load(sources[lane] + d, n);
      }
      transpose(rows);
      for (int64_t i = 0; i < n; ++i) store(panel + ((d + i) * kVectors + v) * kLanes, rows[i]);
    }
  }
}

// hidden[j] = silu(gate_j x) * up_j x for kPairs neurons of one panel; gate rows even, up rows odd.
template <int64_t kPairs, int64_t kVectors>
SPARSE_UNIFIED_AVX512 void hidden_tile(const WeightTile& tile, const float* panel, float* hidden) {
  Float sums[2 * kPairs][kVectors] = {};
  dot_tile(tile, panel, sums);
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const Float gate = sums[2 * pair][v];
      store(hidden + (pair * kVectors + v) * kLanes, gate * sigmoid(gate) * sums[2 * pair + 1][v]);
    }
  }
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

// hidden_tile for 1 to kTilePairs neurons and a panel of `num_rows` rows.
template <int64_t kPairs = kTilePairs>
SPARSE_UNIFIED_AVX512 void run_hidden_tile(int64_t pairs, int64_t num_rows, const WeightTile& tile,
                                           const float* panel, float* hidden) {
  if constexpr (kPairs > 1) {
    if (pairs < kPairs) {
      return run_hidden_tile<kPairs - 1>(pairs, num_rows, tile, panel, hidden);
    }
  }
  if (num_rows > kLanes) {
    hidden_tile<kPairs, 2>(tile, panel, hidden);
  } else {
    hidden_tile<kPairs, 1>(tile, panel, hidden);
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

// Brings y [D][tokens] back to rows: stored, or added with the row's weight.
template <int64_t kVectors>
SPARSE_UNIFIED_AVX512 void scatter_panel(const GroupedFfnRows& rows, int64_t first, int64_t count,
                                         const float* y, int64_t hidden_size) {
  for (int64_t d = 0; d < hidden_size; d += kLanes) {
    const int64_t n = std::min(kLanes, hidden_size - d);
    for (int64_t v = 0; v < kVectors; ++v) {
      Float values[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) values[i] = load(y + ((d + i) * kVectors + v) * kLanes);
      transpose(values);
      const int64_t lanes = std::min(kLanes, count - v * kLanes);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t row = first + v * kLanes + lane;
        const int64_t target = rows.target != nullptr ? rows.target[row] : row;
        float* out = rows.out + target * hidden_size + d;
        __builtin_prefetch(out + kAheadFloats, 1);
        Float value = values[lane];
        if (rows.weights != nullptr) {
          value = (n == kLanes ? load(out) : load(out, n)) + rows.weights[row] * value;
        }
        if (n == kLanes) {
          store(out, value);
        } else {
          store(out, value, n);
        }
      }
    }
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
      gather_panel<2>(params, rows.row_token + first + row, in_panel, panel);
    } else {
      gather_panel<1>(params, rows.row_token + first + row, in_panel, panel);
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
