// SPDX-License-Identifier: Apache-2.0
// y[i] = down_e(silu(gate_e x) * up_e x), x = x[row_token[i]], for the rows of one expert: 6 n D h
// operations in fp32.
//
// Panels of tokens (see ffn_tiles.h) are transposed while gathering. Every product is then a
// weight, broadcast from where it lies, times two vectors of tokens: weights are read in place,
// never packed, so an expert of 148 neurons costs what its share of a dense FFN does. SwiGLU is
// applied to the accumulators, and the hidden panel is already in the layout the down-projection
// wants. Its results go from the accumulators, transposed back, to the rows they belong to, whose
// cache lines are asked for while half of the products are still to come. A library GEMM would
// gather, pack x twice, store and load gate, up and hidden, and pack hidden: 15 to 20 % of the time
// at h = 296.
//
// Included once for each instruction set, as ffn_tiles.h says.
#pragma once

#include <algorithm>

#include "cpu/ffn_tiles.h"
#include "sparse_unified/grouped_ffn.h"

#ifdef SPARSE_UNIFIED_TARGET

namespace sparse_unified::SPARSE_UNIFIED_TILES {
namespace {

// Gathered rows worked on at once, at most: they, their hidden panels and a tile of weights share 2
// MB of L2 on AVX-512 and 512 KB on AVX2. 320 rows of D = 896 are more than half of a block of 512
// tokens ever sends to one expert.
#if SPARSE_UNIFIED_LEVEL == 4
constexpr int64_t kChunkFloats = 320 * 896;
constexpr int64_t kChunkRows = 320;
#else
constexpr int64_t kChunkFloats = 64 * 3584;
constexpr int64_t kChunkRows = 96;
#endif
// Outputs worked on at once, in parts whose accumulators fit the registers: a cache line of a row,
// so that rows are added to in whole lines.
constexpr int64_t kOutputs = 16;
constexpr int64_t kOutputPart = kRegisterLanes == 16 ? 8 : 6;
static_assert(kTileRows <= kOutputs);  // whose rows the working memory for widened weights holds

int64_t chunk_rows(int64_t hidden_size) {
  return rows_of_chunk(hidden_size, kChunkRows, kChunkFloats);
}

// Where the rows of a panel go.
struct PanelTargets {
  float* out[kPanelRows];
  const float* weights;  // [count]; null means stored, not added
  int64_t count;
};

PanelTargets panel_targets(const GroupedFfnRows& rows, int64_t first, int64_t count,
                           int64_t hidden_size) {
  PanelTargets targets{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = rows.target != nullptr ? rows.target[first + i] : first + i;
    targets.out[i] = rows.out + target * hidden_size;
  }
  targets.weights = rows.weights != nullptr ? rows.weights + first : nullptr;
  targets.count = count;
  return targets;
}

#if SPARSE_UNIFIED_LEVEL == 4

// Brings outputs y [16][kVectors] of one panel, of which the first `num_columns` count, to columns
// d and up of the targets.
template <int64_t kVectors>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put_outputs(const PanelTargets& targets, int64_t d,
                                                             int64_t num_columns,
                                                             const Sums<kOutputs, kVectors>& y) {
  static_assert(kOutputs == kLanes);
#pragma GCC unroll 2
  for (int64_t v = 0; v < kVectors; ++v) {
    Float values[kLanes];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanes; ++r) values[r] = vector_of(y[r], v);
    transpose(values);

    float* const* out = targets.out + v * kLanes;
    const bool adds = targets.weights != nullptr;
    const float* weights = adds ? targets.weights + v * kLanes : nullptr;
    const int64_t count = std::min(kLanes, targets.count - v * kLanes);
    if (adds && count == kLanes && num_columns == kLanes) {
      // The common case is unrolled and whole, so that the values stay in registers.
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        store(out[i] + d, load(out[i] + d) + weights[i] * values[i]);
      }
      continue;
    }
    const auto columns = static_cast<__mmask16>((1u << num_columns) - 1);
    for (int64_t i = 0; i < count; ++i) {
      Float value = values[i];
      if (adds) {
        value = bit_cast<Float>(_mm512_maskz_loadu_ps(columns, out[i] + d)) + weights[i] * value;
      }
      _mm512_mask_storeu_ps(out[i] + d, columns, bit_cast<__m512>(value));
    }
  }
}

#else

template <int64_t kVectors>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put_outputs(const PanelTargets& targets, int64_t d,
                                                             int64_t num_columns,
                                                             const Sums<kOutputs, kVectors>& y) {
  static_assert(kVectors == 1);
  float columns[kOutputs * kLanes];
  std::memcpy(columns, y, sizeof(columns));
  put_rows(columns, num_columns, targets.count, targets.out, d, targets.weights);
}

#endif

// y[r] = sum_j tile.row(r)[j] * hidden[j] for kRows rows of one panel, from row kDone on. When the
// first part is in hand, the lines that the results go to are asked for.
template <int64_t kRows, int64_t kVectors, int64_t kDone = 0>
SPARSE_UNIFIED_INLINE void dot_rows(const WeightTile& tile, const float* hidden,
                                    const PanelTargets& targets, int64_t d,
                                    Sums<kOutputs, kVectors>& y) {
  constexpr int64_t kPart = std::min(kRows - kDone, kOutputPart);
  const WeightTile part{tile.even + kDone / 2 * tile.even_stride, tile.even_stride,
                        tile.odd + kDone / 2 * tile.odd_stride, tile.odd_stride, tile.length};
  Sums<kPart, kVectors> sums = {};
  dot_tile<kPart, kVectors>(part, hidden, sums);
#pragma GCC unroll 8
  for (int64_t r = 0; r < kPart; ++r) {
    for (int64_t v = 0; v < kVectors * kRegistersPerVector; ++v) y[kDone + r][v] = sums[r][v];
  }
  if constexpr (kDone == 0) {
    for (int64_t i = 0; i < targets.count; ++i) __builtin_prefetch(targets.out[i] + d, 1);
  }
  if constexpr (kDone + kPart < kRows) {
    dot_rows<kRows, kVectors, kDone + kPart>(tile, hidden, targets, d, y);
  }
}

// Outputs [d, d + kRows) of one panel, y[d] = sum_j down[d][j] * hidden[j], to the targets.
template <int64_t kRows, int64_t kVectors>
SPARSE_UNIFIED_TARGET void output_tile(const WeightTile& tile, const float* hidden,
                                       const PanelTargets& targets, int64_t d) {
  Sums<kOutputs, kVectors> y = {};
  dot_rows<kRows, kVectors>(tile, hidden, targets, d, y);
  put_outputs<kVectors>(targets, d, kRows, y);
}

// Size of the next tile of outputs when `rest` remain: whole lines, then what is left in a few
// sizes, which is seldom anything.
int64_t outputs_size(int64_t rest) { return rest >= kOutputs ? kOutputs : rest >= 4 ? 4 : 1; }

// output_tile for outputs_size outputs.
template <int64_t kVectors>
SPARSE_UNIFIED_TARGET void run_output_tile(int64_t outputs, const WeightTile& tile,
                                           const float* hidden, const PanelTargets& targets,
                                           int64_t d) {
  switch (outputs) {
    case kOutputs:
      return output_tile<kOutputs, kVectors>(tile, hidden, targets, d);
    case 4:
      return output_tile<4, kVectors>(tile, hidden, targets, d);
    default:
      return output_tile<1, kVectors>(tile, hidden, targets, d);
  }
}

// Rows [first, first + count) through all three products; panels is [count / 32][D][32], hidden
// [count / 32][h][32].
SPARSE_UNIFIED_TARGET void run_chunk(const GroupedFfnParams& params, const GroupedFfnRows& rows,
                                     int64_t first, int64_t count, float* workspace) {
  const int64_t hidden_size = params.x.columns;
  const int64_t width = params.expert_width;
  const int64_t max_rows = chunk_rows(hidden_size);
  float* panels = workspace;
  float* hidden = panels + max_rows * hidden_size;
  float* widened = hidden + max_rows * width;

  gather_panels(params.dtype, params.x, rows.row_token, first, count, panels);

  // A tile of weights stays in the cache while every panel passes by.
  for (int64_t j = 0, pairs; j < width; j += pairs) {
    pairs = tile_size(width - j, kTilePairs);
    const int64_t neuron = rows.expert * (width + params.spacing.neuron_gap) + j;
    const WeightTile tile = weight_tile(
        params.dtype, stored_rows(params.gate_proj, params.dtype, neuron, 0),
        stored_rows(params.up_proj, params.dtype, neuron, 0), 2 * pairs, hidden_size, widened);
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const int64_t num_rows = std::min(kPanelRows, count - row);
      run_hidden_tile(pairs, num_rows, tile, panels + row * hidden_size,
                      hidden + row * width + j * panel_lanes(num_rows));
    }
  }

  // Same again for the outputs.
  PanelTargets targets[kChunkRows / kPanelRows];
  for (int64_t row = 0; row < count; row += kPanelRows) {
    targets[row / kPanelRows] =
        panel_targets(rows, first + row, std::min(kPanelRows, count - row), hidden_size);
  }
  const int64_t first_down = rows.expert * params.spacing.down_rows;
  const int64_t first_column = params.spacing.down_rows == 0 ? rows.expert * width : 0;
  for (int64_t d = 0, outputs; d < hidden_size; d += outputs) {
    outputs = outputs_size(hidden_size - d);
    const RowPairs down = row_pairs(params.down_proj, params.dtype, first_down + d, first_column);
    const WeightTile tile = weight_tile(params.dtype, down.even, down.odd, outputs, width, widened);
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const PanelTargets& panel = targets[row / kPanelRows];
      if (panel.count > kLanes) {
        run_output_tile<kPanelVectors>(outputs, tile, hidden + row * width, panel, d);
      } else {
        run_output_tile<1>(outputs, tile, hidden + row * width, panel, d);
      }
    }
  }
}

}  // namespace

void grouped_ffn_cpu(const GroupedFfnParams& params, const GroupedFfnRows& rows, float* workspace) {
  for_each_chunk(0, rows.count, chunk_rows(params.x.columns), [&](int64_t first, int64_t count) {
    run_chunk(params, rows, first, count, workspace);
  });
}

int64_t grouped_ffn_workspace_floats(int64_t hidden_size, int64_t expert_width) {
  return chunk_rows(hidden_size) * (hidden_size + expert_width) +
         kOutputs * std::max(hidden_size, expert_width);
}

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
