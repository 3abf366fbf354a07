// SPDX-License-Identifier: Apache-2.0
// The register tiles of the fp32 FFN kernels on AVX-512: weights read in place, times panels of
// tokens. A vector holds 16 tokens; a panel of 32 (or, at the end, 16) tokens is laid out
// [D][tokens], so every product is a weight, broadcast from where it lies, times two vectors.
#pragma once

#include <algorithm>

#include "cpu/vector.h"
#include "sparse_unified/grouped_ffn.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define SPARSE_UNIFIED_AVX512 __attribute__((target("arch=x86-64-v4")))

namespace sparse_unified {

constexpr int64_t kPanelVectors = 2;
constexpr int64_t kPanelRows = kPanelVectors * kLanes;
// 7 neurons (gate and up) or 14 outputs, times 2 vectors of tokens: 28 of 32 registers accumulate.
constexpr int64_t kTilePairs = 7;
constexpr int64_t kTileRows = 14;
// A sum is cut into blocks, so that fp32 rounding grows with their number and not with D.
constexpr int64_t kSumBlock = 512;
// How far ahead of a row that is read and written the next lines are asked for.
constexpr int64_t kAheadFloats = 64;

// Size of the next tile when `rest` rows remain: equal tiles, none too small to fill the pipelines.
inline int64_t tile_size(int64_t rest, int64_t largest) {
  const int64_t num_tiles = (rest + largest - 1) / largest;
  return (rest + num_tiles - 1) / num_tiles;
}

// Lanes a panel of `num_rows` rows is laid out with.
inline int64_t panel_lanes(int64_t num_rows) { return num_rows > kLanes ? kPanelRows : kLanes; }

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

// panel[d][i] = x[row_token[i]][d], or x[i][d] without row_token; lanes beyond `count` are zero.
template <int64_t kVectors>
SPARSE_UNIFIED_AVX512 void gather_panel(const float* x, int64_t x_stride, const int32_t* row_token,
                                        int64_t count, int64_t hidden_size, float* panel) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const int64_t lanes = std::min(kLanes, count - v * kLanes);
    const float* sources[kLanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t i = v * kLanes + lane;
      sources[lane] = x + (row_token != nullptr ? row_token[i] : i) * x_stride;
    }
    for (int64_t d = 0; d < hidden_size; d += kLanes) {
      const int64_t n = std::min(kLanes, hidden_size - d);
      Float rows[kLanes] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        rows[lane] = n == kLanes ? load(sources[lane] + d) : load(sources[lane] + d, n);
      }
      transpose(rows);
      for (int64_t i = 0; i < n; ++i) store(panel + ((d + i) * kVectors + v) * kLanes, rows[i]);
    }
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

}  // namespace sparse_unified

#endif
