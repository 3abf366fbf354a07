// SPDX-License-Identifier: Apache-2.0
// Which tile of a grouped GEMM a block computes. The host knows only the number of rows R and of
// groups E, so the grid has the most tiles there can be, and each block finds its own from the
// offsets of the groups on the device; blocks left over leave at once. They are the last of the
// grid, at most E - 1 rows of tiles.
#pragma once

#include "device/cluster.h"
#include "device/platform.h"
#include "device/warp.h"

namespace sparse_unified {

// Tiles of M that are swept together before the next tile of N: what runs at one time is then about
// as high as wide, which makes its rows and weights the least to read (16 tiles of 128 rows and 8
// of 256 columns on 132 multiprocessors), and the weights of a tile of N stay in L2 for all of a
// group's rows.
constexpr int kRasterTiles = 16;

struct TileCoordinates {
  int m;
  int n;
};

// The idx-th tile of a num_m x num_n grid, of which kRaster are swept together.
template <int kRaster = kRasterTiles>
SPARSE_UNIFIED_HOST_DEVICE TileCoordinates rasterize(int idx, int num_m, int num_n) {
  const int band = idx / (kRaster * num_n);
  const int first_m = band * kRaster;
  const int height = num_m - first_m < kRaster ? num_m - first_m : kRaster;
  const int local = idx - first_m * num_n;
  return {first_m + local % height, local / height};
}

// The rows of a group.
struct RowRange {
  int begin;
  int end;
};

// A tile of rows of one group.
struct RowTile {
  int group;
  int first_row;  // of the tile
  int end_row;    // of the group, beyond its last row
  int n;          // index of the tile along N
  int slot;       // index of the tile of rows over all groups

  // False in a cluster's block that a group has no tile for.
  SPARSE_UNIFIED_DEVICE bool has_rows() const { return first_row < end_row; }
  // Row `row` of the tile, or the last of the group.
  SPARSE_UNIFIED_DEVICE int clamped(int row) const { return min(first_row + row, end_row - 1); }
};

// Most tiles of rows that num_groups groups of num_rows rows in all can have.
SPARSE_UNIFIED_HOST_DEVICE int64_t max_row_tiles(int64_t num_rows, int64_t num_groups,
                                                 int64_t tile_rows) {
  const int64_t num_filled = num_rows < num_groups ? num_rows : num_groups;
  return (num_rows + num_filled * (tile_rows - 1)) / tile_rows;
}

// Rows of group `group`; offsets [E + 1], or null for one group of all rows.
SPARSE_UNIFIED_DEVICE RowRange group_rows(const int32_t* offsets, int group, int num_rows) {
  if (offsets == nullptr) return {0, num_rows};
  const RowRange rows{offsets[group], offsets[group + 1]};
  device_check(0 <= rows.begin && rows.begin <= rows.end && rows.end <= num_rows);
  return rows;
}

// Tiles of rows of all groups in front of `group`. All lanes of a warp call it.
template <int kTileRows>
SPARSE_UNIFIED_DEVICE int count_tiles_before(const int32_t* offsets, int group, int num_rows) {
  int num_tiles = 0;
  for (int other = lane_idx(); other < group; other += kWarpSize) {
    const RowRange rows = group_rows(offsets, other, num_rows);
    num_tiles += ceil_div(rows.end - rows.begin, kTileRows);
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) num_tiles += shuffle_xor(num_tiles, mask);
  return num_tiles;
}

// Tile `idx` of them all; false when there are not so many. All lanes of a warp call it. The blocks
// of a cluster of kBlocks share an idx: they get neighbouring tiles of rows of one group, the last
// of them none where the group has no more. Their slots take a second look at the groups; who needs
// none says so (kFindsSlot).
template <int kTileRows, int kBlocks = 1, bool kFindsSlot = true>
SPARSE_UNIFIED_DEVICE bool find_row_tile(const int32_t* offsets, int num_groups, int num_rows,
                                         int num_n, int idx, RowTile& tile) {
  static_assert(kRasterTiles % kBlocks == 0);
  const int slot = idx / num_n;  // tiles of rows, or kBlocks of them, in front of this one
  int num_before = 0;            // those of groups in front of `first_group`
  for (int first_group = 0; first_group < num_groups; first_group += kWarpSize) {
    const int group = first_group + lane_idx();
    const RowRange rows =
        group < num_groups ? group_rows(offsets, group, num_rows) : RowRange{0, 0};
    const int num_tiles = ceil_div(rows.end - rows.begin, kBlocks * kTileRows);
    int through = num_tiles;  // of the groups up to this lane's
    for (int delta = 1; delta < kWarpSize; delta *= 2) {
      const int below = shuffle_up(through, delta);
      if (lane_idx() >= delta) through += below;
    }
    const uint32_t reached = ballot(num_before + through > slot);
    if (reached != 0) {
      const int lane = find_first_bit(reached) - 1;
      const int begin = shuffle(rows.begin, lane);
      const int num_m = shuffle(num_tiles, lane);
      const int first_slot = num_before + shuffle(through, lane) - num_m;
      const TileCoordinates at =
          rasterize<kRasterTiles / kBlocks>(idx - first_slot * num_n, num_m, num_n);
      tile = {first_group + lane, begin + at.m * kTileRows, shuffle(rows.end, lane), at.n,
              first_slot + at.m};
      if constexpr (kBlocks > 1) {
        const int m = at.m * kBlocks + cluster_rank();
        tile.first_row = begin + m * kTileRows;
        if constexpr (kFindsSlot) {
          tile.slot = count_tiles_before<kTileRows>(offsets, tile.group, num_rows) + m;
        }
      }
      return true;
    }
    num_before += shuffle(through, kWarpSize - 1);
  }
  return false;
}

// The first tile of this block, whose cluster stays on its multiprocessors, and how far it is to
// the next one.
template <int kBlocks>
SPARSE_UNIFIED_DEVICE int first_tile() {
  return static_cast<int>(blockIdx.x) / kBlocks;
}
template <int kBlocks>
SPARSE_UNIFIED_DEVICE int tile_step() {
  return static_cast<int>(gridDim.x) / kBlocks;
}

// Blocks of a grid that stay on their multiprocessors and compute `num_tiles`, each by a cluster of
// `cluster_blocks` blocks.
inline unsigned num_persistent_blocks(int64_t num_tiles, int num_multiprocessors,
                                      int cluster_blocks) {
  const int64_t num_clusters =
      num_multiprocessors < cluster_blocks ? 1 : num_multiprocessors / cluster_blocks;
  return static_cast<unsigned>((num_tiles < num_clusters ? num_tiles : num_clusters) *
                               cluster_blocks);
}

}  // namespace sparse_unified
