// SPDX-License-Identifier: Apache-2.0
// y[t] = sum_b down_b(silu(gate_b x[t]) * up_b x[t]) over kept blocks b of the width: 6 T D
// operations in fp32 a kept neuron, and only kept rows and columns of the weights are read.
//
// Panels of tokens (see ffn_tiles.h) pass by weights that stay where they are, as in grouped_ffn.
// Neighbours in the list that are neighbours in the width make one run. Runs are taken in slices of
// at most kSumBlock neurons: the hidden activations of a slice are computed, then its share of
// every output, which is added to a second panel. So hidden activations are never more than a
// slice, and an output is one sum of blocks of kSumBlock neurons, however the runs lie.
//
// Included once for each instruction set, as ffn_tiles.h says.
#pragma once

#include <algorithm>

#include "cpu/ffn_tiles.h"
#include "sparse_unified/accumulate.h"
#include "sparse_unified/pruned_ffn.h"

#ifdef SPARSE_UNIFIED_TARGET

namespace sparse_unified::SPARSE_UNIFIED_TILES {
namespace {

static_assert(kMaxPrunedBlock <= kSumBlock);

// Tokens worked on at once, at most: x and y in panels and the hidden activations of a slice stay
// in the nearer caches while the weights pass by.
#if SPARSE_UNIFIED_LEVEL == 4
constexpr int64_t kChunkFloats = 256 * 896;
constexpr int64_t kChunkRows = 256;
#else
constexpr int64_t kChunkFloats = 64 * 3584;
constexpr int64_t kChunkRows = 96;
#endif

int64_t chunk_rows(int64_t hidden_size) {
  return rows_of_chunk(hidden_size, kChunkRows, kChunkFloats);
}

// Adjacent neurons of a slice: [first, first + count) of the width, from `offset` of the slice.
struct Run {
  int64_t first;
  int64_t count;
  int64_t offset;
};

struct Slice {
  Run runs[kSumBlock];
  int64_t num_runs;
  int64_t width;
};

// Fills `slice` from kept_blocks[block] onwards; returns the first block of the next slice.
int64_t next_slice(const PrunedFfnParams& params, int64_t block, Slice& slice) {
  slice.num_runs = 0;
  slice.width = 0;
  for (; block < params.num_kept && slice.width + params.block_size <= kSumBlock; ++block) {
    const int64_t first = params.kept_blocks[block] * params.block_size;
    Run* last = slice.num_runs ? &slice.runs[slice.num_runs - 1] : nullptr;
    if (last != nullptr && last->first + last->count == first) {
      last->count += params.block_size;
    } else {
      slice.runs[slice.num_runs++] = {first, params.block_size, slice.width};
    }
    slice.width += params.block_size;
  }
  return block;
}

// y[d] (+)= sum over the runs of down[d][j] * hidden[j], for kRows outputs of one panel.
template <int64_t kRows, int64_t kVectors>
SPARSE_UNIFIED_TARGET void output_tile(const float* down, int64_t down_stride, const Slice& slice,
                                       bool is_first, const float* hidden, float* y) {
  constexpr int64_t kRegisters = kVectors * kRegistersPerVector;
  Register acc[kRows][kRegisters] = {};
  for (int64_t i = 0; i < slice.num_runs; ++i) {
    const Run run = slice.runs[i];
    const float* even = down + run.first;
    const float* odd = even + down_stride;
    const float* values = hidden + run.offset * kVectors * kLanes;
    for (int64_t k = 0; k < run.count; ++k) {
      Register value[kRegisters];
      for (int64_t v = 0; v < kRegisters; ++v) {
        std::memcpy(&value[v], values + (k * kRegisters + v) * kRegisterLanes, sizeof(Register));
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const float weight = (r % 2 == 0 ? even : odd)[r / 2 * 2 * down_stride + k];
        for (int64_t v = 0; v < kRegisters; ++v) acc[r][v] += weight * value[v];
      }
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kRegisters; ++v) {
      float* out = y + (r * kRegisters + v) * kRegisterLanes;
      Register sum = acc[r][v];
      if (!is_first) {
        Register before;
        std::memcpy(&before, out, sizeof(before));
        sum += before;
      }
      std::memcpy(out, &sum, sizeof(sum));
    }
  }
}

// output_tile for 1 to kTileRows outputs and a panel of `num_rows` rows.
template <int64_t kRows = kTileRows>
SPARSE_UNIFIED_TARGET void run_output_tile(int64_t rows, int64_t num_rows, const float* down,
                                           int64_t down_stride, const Slice& slice, bool is_first,
                                           const float* hidden, float* y) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return run_output_tile<kRows - 1>(rows, num_rows, down, down_stride, slice, is_first, hidden,
                                        y);
    }
  }
  if (num_rows > kLanes) {
    output_tile<kRows, kPanelVectors>(down, down_stride, slice, is_first, hidden, y);
  } else {
    output_tile<kRows, 1>(down, down_stride, slice, is_first, hidden, y);
  }
}

#if SPARSE_UNIFIED_LEVEL == 4

// Brings the rows y [D][tokens] of one panel back to out [count, D].
template <int64_t kVectors>
SPARSE_UNIFIED_TARGET void store_panel(const float* y, int64_t count, int64_t hidden_size,
                                       float* out) {
  for (int64_t d = 0; d < hidden_size; d += kLanes) {
    const int64_t n = std::min(kLanes, hidden_size - d);
    for (int64_t v = 0; v < kVectors; ++v) {
      Float values[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) values[i] = load(y + ((d + i) * kVectors + v) * kLanes);
      transpose(values);
      const int64_t end = std::min((v + 1) * kLanes, count);
      for (int64_t row = v * kLanes; row < end; ++row) {
        float* target = out + row * hidden_size + d;
        const Float value = values[row - v * kLanes];
        if (n == kLanes) {
          store(target, value);
        } else {
          store(target, value, n);
        }
      }
    }
  }
}

#else

template <int64_t kVectors>
SPARSE_UNIFIED_TARGET void store_panel(const float* y, int64_t count, int64_t hidden_size,
                                       float* out) {
  static_assert(kVectors == 1);
  float* rows[kLanes] = {};
  for (int64_t row = 0; row < count; ++row) rows[row] = out + row * hidden_size;
  for (int64_t d = 0; d < hidden_size; d += kLanes) {
    put_rows(y + d * kLanes, std::min(kLanes, hidden_size - d), count, rows, d, nullptr);
  }
}

#endif

// Rows of the down-projection in fp32 and where in them the neurons of a slice are.
struct OutputWeights {
  const float* data;
  int64_t stride;
  const Slice* slice;
};

// Rows d to d + outputs: in place, or, of a 16-bit type, widened [outputs][slice width].
OutputWeights output_weights(const PrunedFfnParams& params, const Slice& slice, const Slice& whole,
                             int64_t d, int64_t outputs, float* widened) {
  const Matrix& down = params.down_proj;
  if (params.dtype == DType::kFloat32) return {down.row<float>(d), down.stride, &slice};
  for (int64_t i = 0; i < slice.num_runs; ++i) {
    const Run& run = slice.runs[i];
    const RowPairs rows = row_pairs(down, params.dtype, d, run.first);
    widen_rows(params.dtype, rows.even, rows.odd, outputs, run.count, widened + run.offset,
               slice.width);
  }
  return {widened, slice.width, &whole};
}

// Tokens [first, first + count) through all kept blocks. Panels x and y are [count / 32][D][32],
// hidden is [count / 32][slice width][32].
SPARSE_UNIFIED_TARGET void run_chunk(const PrunedFfnParams& params, int64_t first, int64_t count,
                                     float* workspace) {
  const int64_t hidden_size = params.x.columns;
  const int64_t max_rows = chunk_rows(hidden_size);
  float* x_panels = workspace;
  float* y_panels = x_panels + max_rows * hidden_size;
  float* hidden = y_panels + max_rows * hidden_size;
  float* widened = hidden + max_rows * kSumBlock;
  const DType dtype = params.dtype;

  gather_panels(dtype, params.x, nullptr, first, count, x_panels);

  Slice slice;
  Slice whole;  // the same neurons side by side, as widened weights hold them
  for (int64_t block = 0; block < params.num_kept;) {
    const bool is_first = block == 0;
    block = next_slice(params, block, slice);
    whole.num_runs = 1;
    whole.runs[0] = {0, slice.width, 0};

    // A tile of weights stays in the cache while every panel passes by.
    for (int64_t i = 0; i < slice.num_runs; ++i) {
      const Run& run = slice.runs[i];
      for (int64_t j = 0, pairs; j < run.count; j += pairs) {
        pairs = tile_size(run.count - j, kTilePairs);
        const WeightTile tile = weight_tile(
            dtype, stored_rows(params.gate_proj, dtype, run.first + j, 0),
            stored_rows(params.up_proj, dtype, run.first + j, 0), 2 * pairs, hidden_size, widened);
        for (int64_t row = 0; row < count; row += kPanelRows) {
          const int64_t num_rows = std::min(kPanelRows, count - row);
          run_hidden_tile(pairs, num_rows, tile, x_panels + row * hidden_size,
                          hidden + row * slice.width + (run.offset + j) * panel_lanes(num_rows));
        }
      }
    }

    for (int64_t d = 0, outputs; d < hidden_size; d += outputs) {
      outputs = tile_size(hidden_size - d, kTileRows);
      const OutputWeights down = output_weights(params, slice, whole, d, outputs, widened);
      for (int64_t row = 0; row < count; row += kPanelRows) {
        const int64_t num_rows = std::min(kPanelRows, count - row);
        run_output_tile(outputs, num_rows, down.data, down.stride, *down.slice, is_first,
                        hidden + row * slice.width,
                        y_panels + row * hidden_size + d * panel_lanes(num_rows));
      }
    }
  }

  for (int64_t row = 0; row < count; row += kPanelRows) {
    const int64_t in_panel = std::min(kPanelRows, count - row);
    const float* y = y_panels + row * hidden_size;
    char* target =
        static_cast<char*>(params.y) + (first + row) * hidden_size * element_bytes(dtype);
    const bool is_fp32 = dtype == DType::kFloat32;
    float* out = is_fp32 ? reinterpret_cast<float*>(target) : x_panels;  // x has served
    if (in_panel > kLanes) {
      store_panel<kPanelVectors>(y, in_panel, hidden_size, out);
    } else {
      store_panel<1>(y, in_panel, hidden_size, out);
    }
    if (!is_fp32) round_cpu({dtype, out, target, in_panel * hidden_size});
  }
}

}  // namespace

int64_t pruned_ffn_workspace_floats(int64_t hidden_size) {
  return chunk_rows(hidden_size) * (2 * hidden_size + kSumBlock) +
         kTileRows * std::max(hidden_size, kSumBlock);
}

void pruned_ffn_cpu(const PrunedFfnParams& params, int64_t token_begin, int64_t token_end,
                    float* workspace) {
  for_each_chunk(token_begin, token_end, chunk_rows(params.x.columns),
                 [&](int64_t first, int64_t count) { run_chunk(params, first, count, workspace); });
}

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
