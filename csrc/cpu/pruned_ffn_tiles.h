// SPDX-License-Identifier: Apache-2.0
// y[t] = sum_b down_b(silu(gate_b x[t]) * up_b x[t]) over kept blocks b of the width: 6 T D
// operations a kept neuron, and only kept rows and columns of the weights are read.
//
// Panels of tokens (see ffn_tiles.h) pass by weights that stay where they are, as in grouped_ffn.
// Neighbours in the list that are neighbours in the width make one run. Runs are taken in slices of
// at most kSliceNeurons: the hidden activations of a slice are computed, then its share of
// every output, which is added to a second panel. So hidden activations are never more than a
// slice, and an output is one sum of blocks of so many neurons, however the runs lie.
//
// Included once for each instruction set, as ffn_tiles.h says.
#pragma once

#include <algorithm>

#include "cpu/ffn_tiles.h"
#include "sparse_unified/pruned_ffn.h"

#ifdef SPARSE_UNIFIED_TARGET

namespace sparse_unified::SPARSE_UNIFIED_TILES {
namespace {

// Tokens worked on at once, at most: x and y in panels and the hidden activations of a slice stay
// in the nearer caches while the weights pass by.
#if SPARSE_UNIFIED_LEVEL == 6
constexpr int64_t kChunkRows = 512;
constexpr int64_t kChunkLanes = kChunkRows * 448;
#elif SPARSE_UNIFIED_LEVEL >= 4
constexpr int64_t kChunkRows = 256;
constexpr int64_t kChunkLanes = kChunkRows * 896;
#else
constexpr int64_t kChunkRows = 96;
constexpr int64_t kChunkLanes = 64 * 3584;
#endif
// Neurons of a slice: on AMX the panels of sums cost as much to load and store as those to compute.
constexpr int64_t kSliceNeurons = kIsAmx ? 2 * kSumBlock : kSumBlock;
static_assert(kMaxPrunedBlock <= kSliceNeurons);

int64_t chunk_rows(int64_t hidden_size) {
  return rows_of_chunk(num_lanes(hidden_size), kChunkRows, kChunkLanes);
}

// A slice and the memory of its runs.
struct KeptSlice {
  Run runs[kSliceNeurons];
  int64_t num_runs;
  int64_t width;
};

// Fills `slice` from kept_blocks[block] onwards; returns the first block of the next slice.
int64_t next_slice(const PrunedFfnParams& params, int64_t block, KeptSlice& slice) {
  slice.num_runs = 0;
  slice.width = 0;
  for (; block < params.num_kept && slice.width + params.block_size <= kSliceNeurons; ++block) {
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

// The second panel [D][tokens], to which the share of every slice is added.
struct PanelSums {
  float* y;
  bool is_first;

  void prefetch(int64_t) const {}

  template <int64_t kHalves>
  SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put(int64_t d, int64_t outputs,
                                                       const Sums<kOutputs, kHalves>& sums) const {
    constexpr int64_t kVectors = vectors_of(kHalves);
    float* out = y + d * kVectors * kLanes;
    for (int64_t i = 0; i < outputs * kVectors; ++i) {
      const Float sum = vector_of(sums[i / kVectors], i % kVectors);
      store(out + i * kLanes, is_first ? sum : load(out + i * kLanes) + sum);
    }
  }
};

// Brings the rows y [D][tokens] of one panel back to out [count, D].
template <int64_t kVectors, typename T>
SPARSE_UNIFIED_TARGET void store_panel(const float* y, int64_t count, int64_t hidden_size, T* out) {
#if SPARSE_UNIFIED_LEVEL >= 4
  for (int64_t d = 0; d < hidden_size; d += kLanes) {
    const int64_t n = std::min(kLanes, hidden_size - d);
    for (int64_t v = 0; v < kVectors; ++v) {
      Float values[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) values[i] = load(y + ((d + i) * kVectors + v) * kLanes);
      transpose(values);
      const int64_t end = std::min((v + 1) * kLanes, count);
      for (int64_t row = v * kLanes; row < end; ++row) {
        T* target = out + row * hidden_size + d;
        const Float value = values[row - v * kLanes];
        if (n == kLanes) {
          store(target, value);
        } else {
          store(target, value, n);
        }
      }
    }
  }
#else
  static_assert(kVectors == 1);
  for (int64_t d = 0; d < hidden_size; d += kLanes) {
    const int64_t n = std::min(kLanes, hidden_size - d);
    float lines[kLanes][kLanes];
    float* rows[kLanes];
    for (int64_t row = 0; row < kLanes; ++row) rows[row] = lines[row];
    put_rows(y + d * kLanes, n, count, rows, 0, nullptr);
    for (int64_t row = 0; row < count; ++row) {
      store(out + row * hidden_size + d, load(lines[row]), n);
    }
  }
#endif
}

// Tokens [first, first + count) through all kept blocks. Panels of sums are [count / 32][D][32].
void run_chunk(const PrunedFfnParams& params, int64_t first, int64_t count, float* workspace) {
  const int64_t hidden_size = params.x.columns;
  const int64_t max_rows = chunk_rows(hidden_size);
  float* x_panels = workspace;
  float* y_panels = x_panels + max_rows * num_lanes(hidden_size);
  float* hidden = y_panels + max_rows * hidden_size;
  float* scratch = hidden + max_rows * num_lanes(kSliceNeurons);
  const FfnWeights weights{params.dtype, params.gate_proj, params.up_proj, params.down_proj};

  gather_panels(params.dtype, params.x, nullptr, first, count, x_panels);

  PanelSums sums[kChunkRows / kPanelRows];
  KeptSlice kept;
  for (int64_t block = 0; block < params.num_kept;) {
    for (int64_t row = 0; row < count; row += kPanelRows) {
      sums[row / kPanelRows] = {y_panels + row * hidden_size, block == 0};
    }
    block = next_slice(params, block, kept);
    run_slice(weights, {kept.runs, kept.num_runs, kept.width}, count, x_panels, hidden, scratch,
              sums);
  }

  dispatch_storage(params.dtype, [&]<typename T>(T) {
    T* y = static_cast<T*>(params.y) + first * hidden_size;
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const int64_t in_panel = std::min(kPanelRows, count - row);
      const auto store = in_panel > kLanes ? store_panel<kPanelVectors, T> : store_panel<1, T>;
      store(y_panels + row * hidden_size, in_panel, hidden_size, y + row * hidden_size);
    }
  });
}

}  // namespace

int64_t pruned_ffn_workspace_floats(int64_t hidden_size) {
  return chunk_rows(hidden_size) *
             (num_lanes(hidden_size) + hidden_size + num_lanes(kSliceNeurons)) +
         tile_floats(std::max(hidden_size, kSliceNeurons));
}

void pruned_ffn_cpu(const PrunedFfnParams& params, int64_t token_begin, int64_t token_end,
                    float* workspace) {
#if SPARSE_UNIFIED_LEVEL == 6
  const TileScope scope;
#endif
  for_each_chunk(token_begin, token_end, chunk_rows(params.x.columns),
                 [&](int64_t first, int64_t count) { run_chunk(params, first, count, workspace); });
}

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
