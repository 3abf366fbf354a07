// SPDX-License-Identifier: Apache-2.0
// How a tile of 16-bit elements lies in shared memory, so that neither the copies into it nor
// ldmatrix out of it conflict on banks.
//
// A row is cut into chunks of 16 bytes, and a line of 128 bytes (all 32 banks) has 8 of them. Both
// accesses touch 8 chunks at a time: a copy the 8 of a line, ldmatrix the same chunk of 8
// consecutive rows. Chunk c of row r therefore lies at chunk c ^ f(r) of its row, where f counts
// lines: those 8 chunks fall into 8 different places of a line.
#pragma once

#include "device/platform.h"
#include "device/vector.h"

namespace sparse_unified {

// Elements of 16 bits in a chunk.
constexpr int kChunkElements = 8;

template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunks = kColumns / kChunkElements;  // of a row
  static constexpr int kRowBytes = kChunks * kVectorBytes;
  static constexpr int kBytes = kRows * kRowBytes;

  static constexpr int kLineChunks = kChunks < 8 ? kChunks : 8;  // that one row has of a line
  static constexpr int kLineRows = 8 / kLineChunks;              // rows that share a line
  static_assert((kChunks & (kChunks - 1)) == 0 && kChunks >= 2, "f(r) must stay within the row");

  // Byte offset of a chunk. f has a period of 8 rows, and chunks only differ in the bits below
  // kRowBytes:
  //   offset(r + 8 * i, c) == offset(r, c) + 8 * i * kRowBytes
  //   offset(r, c ^ d) == offset(r, c) ^ (d * kVectorBytes)
  SPARSE_UNIFIED_HOST_DEVICE static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ row / kLineRows % kLineChunks) * kVectorBytes;
  }
};

}  // namespace sparse_unified
