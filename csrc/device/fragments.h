// SPDX-License-Identifier: Apache-2.0
// The part of an operand tile that a warp multiplies in one step of k, 16 long, as the registers of
// mma.m16n8k16: ldmatrix from either kind of tile (tile_loader.h).
#pragma once

#include "device/mma.h"
#include "device/swizzle.h"

namespace sparse_unified {

// kExtent rows of the operand. ldmatrix.x4 brings 16 of them at a time.
template <class Tile, Major kMajor, int kExtent>
struct WarpOperand {
  static constexpr int kLoads = kExtent / 16;
  static_assert(kExtent % 16 == 0 && (kExtent & (kExtent - 1)) == 0);

  // Offset in the tile of the 8 elements whose address this lane gives for the first load of the
  // first k step. `first` is the warp's first row, a multiple of kExtent. Matrices, in order:
  //   A (kIsB false)  {m 0-7, k 0-7}, {m 8-15, k 0-7}, {m 0-7, k 8-15}, {m 8-15, k 8-15}
  //   B (kIsB true)   {n 0-7, k 0-7}, {n 0-7, k 8-15}, {n 8-15, k 0-7}, {n 8-15, k 8-15}
  template <bool kIsB>
  SPARSE_UNIFIED_DEVICE static uint32_t lane_offset(int first) {
    const int matrix = lane_idx() / 8;
    const int half_mn = kIsB ? matrix / 2 : matrix % 2;
    const int half_k = kIsB ? matrix % 2 : matrix / 2;
    const int line = lane_idx() % 8;
    const int offset = kMajor == Major::kK
                           ? Tile::offset(first + half_mn * 8 + line, half_k)
                           : Tile::offset(half_k * 8 + line, first / kChunkElements + half_mn);
    return static_cast<uint32_t>(offset);
  }

  // Load `load` of k step `k_idx` from the tile at `shared`.
  SPARSE_UNIFIED_DEVICE static void load(uint32_t (&fragment)[4], uint32_t shared,
                                         uint32_t lane_offset, int load, int k_idx) {
    constexpr int kStepBytes = 16 * Tile::kRowBytes;
    if constexpr (kMajor == Major::kK) {
      const auto flip = static_cast<uint32_t>(k_idx * 2 * kVectorBytes);
      load_matrix_x4(fragment,
                     shared + (lane_offset ^ flip) + static_cast<uint32_t>(load * kStepBytes));
    } else {
      const auto flip = static_cast<uint32_t>(load * 2 * kVectorBytes);
      load_matrix_x4_transposed(
          fragment, shared + (lane_offset ^ flip) + static_cast<uint32_t>(k_idx * kStepBytes));
    }
  }
};

}  // namespace sparse_unified
