// SPDX-License-Identifier: Apache-2.0
// From the accumulators of a warp to rows in memory. mma leaves two adjacent columns in a lane and
// eight in a quad of lanes; after an exchange within the quad each lane has eight adjacent columns
// of a row, so that accesses are 16 bytes a lane and whole sectors.
#pragma once

#include "device/mainloop.h"
#include "device/vector.h"
#include "device/warp.h"

namespace sparse_unified {

// Word j of lane q of a quad becomes word q of lane j; words of 32 bits.
template <typename Word>
SPARSE_UNIFIED_DEVICE void transpose_quad(Word (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool is_upper = (lane_idx() & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const Word got = shuffle_xor(is_upper ? words[i] : words[i + distance], distance);
      (is_upper ? words[i] : words[i + distance]) = got;
    }
  }
}

// Row of the block's tile that this lane holds in half `half` (8 rows) of 16-row tile m.
template <class Shape>
SPARSE_UNIFIED_DEVICE int lane_row(const WarpTile<Shape>& tile, int m, int half) {
  return tile.first_row + m * 16 + half * 8 + lane_idx() / 4;
}

// store(row, column, vector) for each 8 adjacent columns, a multiple of 8, of the warp's tile,
// rounded to T. All lanes make the same number of calls.
template <typename T, class Shape, class Store>
SPARSE_UNIFIED_DEVICE void store_rounded(const WarpTile<Shape>& tile, const Store& store) {
#pragma unroll
  for (int m = 0; m < Shape::kWarpM / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < Shape::kWarpN / 32; ++group) {
        Vector16 vector;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float (&d)[4] = tile.values[m][group * 4 + j];
          vector.words[j] = pack<T>(d[half * 2], d[half * 2 + 1]);
        }
        transpose_quad(vector.words);
        store(lane_row(tile, m, half), tile.first_column + group * 32 + lane_idx() % 4 * 8, vector);
      }
    }
  }
}

}  // namespace sparse_unified
