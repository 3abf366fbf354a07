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

// Gathered rows worked on at once, at most: they and a tile of weights share 2 MB of L2 on AVX-512
// and, with their hidden panels, 512 KB on AVX2. Where L2 is smaller, rows come from L3 in time,
// but an expert whose rows are cut brings its weights from memory once more for the rest. 320 rows
// of D = 896 are more than half of a block of 512 tokens ever sends to one expert.
#if SPARSE_UNIFIED_LEVEL >= 4
constexpr int64_t kChunkLanes = 128 * 3584;
constexpr int64_t kChunkRows = 320;
#else
constexpr int64_t kChunkLanes = 64 * 3584;
constexpr int64_t kChunkRows = 96;
#endif

int64_t chunk_rows(int64_t hidden_size) {
  return rows_of_chunk(num_lanes(hidden_size), kChunkRows, kChunkLanes);
}

// Where the rows of a panel go.
struct PanelTargets {
  float* out[kPanelRows];
  const float* weights;  // [count]; null means stored, not added
  int64_t count;

  void prefetch(int64_t d) const {
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(out[i] + d, 1);
  }

  // Brings the first `num_columns` of the outputs y to columns d and up of the rows.
  template <int64_t kHalves>
  SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put(int64_t d, int64_t num_columns,
                                                       const Sums<kOutputs, kHalves>& y) const {
    for (int64_t first = 0; first < num_columns; first += kLanes) {
      const int64_t columns = std::min(kLanes, num_columns - first);
      put_line<vectors_of(kHalves)>(d + first, columns, y + first);
    }
  }

  // The same for up to 16 outputs, a cache line of a row.
  template <int64_t kVectors>
  SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put_line(
      int64_t d, int64_t num_columns, const Register (*y)[kVectors * kRegistersPerVector]) const {
#if SPARSE_UNIFIED_LEVEL >= 4
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      Float values[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) values[r] = vector_of(y[r], v);
      transpose(values);

      float* const* rows = out + v * kLanes;
      const bool adds = weights != nullptr;
      const float* scales = adds ? weights + v * kLanes : nullptr;
      const int64_t num_rows = std::min(kLanes, count - v * kLanes);
      if (adds && num_rows == kLanes && num_columns == kLanes) {
        // The common case is unrolled and whole, so that the values stay in registers.
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) {
          store(rows[i] + d, load(rows[i] + d) + scales[i] * values[i]);
        }
        continue;
      }
      const auto columns = static_cast<__mmask16>((1u << num_columns) - 1);
      for (int64_t i = 0; i < num_rows; ++i) {
        Float value = values[i];
        if (adds) {
          const auto before = bit_cast<Float>(_mm512_maskz_loadu_ps(columns, rows[i] + d));
          value = before + scales[i] * value;
        }
        _mm512_mask_storeu_ps(rows[i] + d, columns, bit_cast<__m512>(value));
      }
    }
#else
    static_assert(kVectors == 1);
    float columns[kLanes * kLanes];
    std::memcpy(columns, y, sizeof(columns));
    put_rows(columns, num_columns, count, out, d, weights);
#endif
  }
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

// The weights of one expert alone.
FfnWeights expert_weights(const GroupedFfnParams& params, int64_t expert) {
  const int64_t neuron = expert * (params.expert_width + params.spacing.neuron_gap);
  const int64_t down_row = expert * params.spacing.down_rows;
  const int64_t column = params.spacing.down_rows == 0 ? expert * params.expert_width : 0;
  return {params.dtype, matrix_from(params.gate_proj, params.dtype, neuron, 0),
          matrix_from(params.up_proj, params.dtype, neuron, 0),
          matrix_from(params.down_proj, params.dtype, down_row, column)};
}

// Rows [first, first + count) through all neurons of the expert.
void run_chunk(const GroupedFfnParams& params, const GroupedFfnRows& rows, int64_t first,
               int64_t count, float* workspace) {
  const int64_t hidden_size = params.x.columns;
  const int64_t max_rows = chunk_rows(hidden_size);
  float* panels = workspace;
  float* hidden = panels + max_rows * num_lanes(hidden_size);
  float* scratch = hidden + max_rows * num_lanes(params.expert_width);

  gather_panels(params.dtype, params.x, rows.row_token, first, count, panels);

  PanelTargets targets[kChunkRows / kPanelRows];
  for (int64_t row = 0; row < count; row += kPanelRows) {
    targets[row / kPanelRows] =
        panel_targets(rows, first + row, std::min(kPanelRows, count - row), hidden_size);
  }
  const Run all{0, params.expert_width, 0};
  run_slice(expert_weights(params, rows.expert), {&all, 1, params.expert_width}, count, panels,
            hidden, scratch, targets);
}

}  // namespace

void grouped_ffn_cpu(const GroupedFfnParams& params, const GroupedFfnRows& rows, float* workspace) {
#if SPARSE_UNIFIED_LEVEL == 6
  const TileScope scope;
#endif
  for_each_chunk(0, rows.count, chunk_rows(params.x.columns), [&](int64_t first, int64_t count) {
    run_chunk(params, rows, first, count, workspace);
  });
}

int64_t grouped_ffn_workspace_floats(int64_t hidden_size, int64_t expert_width) {
  return chunk_rows(hidden_size) * (num_lanes(hidden_size) + num_lanes(expert_width)) +
         tile_floats(std::max(hidden_size, expert_width));
}

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
