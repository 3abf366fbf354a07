// SPDX-License-Identifier: Apache-2.0
// Copies one operand of a GEMM tile by tile into shared memory, 16 bytes a thread, asynchronously.
// All matrices are row-major; there are two kinds of operands:
//   k-contiguous    its rows are M (or N), its columns K; tile [M, K]
//   mn-contiguous   its rows are K, its columns M (or N); tile [K, M]
// What lies beyond K is filled with zeros and not read, so that it adds nothing to a sum. Beyond M
// and N a tile holds the last row or column once more: nobody keeps what becomes of it, and each
// copy saves a predicate.
//
// A loader is called once for each k step, in order. It keeps what does not change between steps
// (pointers, places in shared memory) in registers, and looks up the indices of the next step while
// it copies this one.
#pragma once

#include "device/async_copy.h"
#include "device/index_map.h"
#include "device/swizzle.h"

namespace sparse_unified {

// Columns: index map of K.
template <typename T, class Tile, int kThreads, class Columns>
class KContiguousLoader {
  static constexpr int kPassRows = kThreads / Tile::kChunks;  // rows that all threads copy at once
  static constexpr int kPasses = Tile::kRows / kPassRows;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kPassRows == 0);
  static_assert(kPassRows % 8 == 0, "passes must be whole periods of the swizzle");

 public:
  // row_pointer(r): column 0 of the matrix row for row r of the tile. num_columns: K, a multiple of
  // 8.
  template <class RowPointer>
  SPARSE_UNIFIED_DEVICE KContiguousLoader(const RowPointer& row_pointer, const Columns& columns,
                                          int num_columns)
      : columns_(columns), num_columns_(num_columns) {
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / Tile::kChunks;
    const int chunk = thread % Tile::kChunks;
    shared_offset_ = Tile::offset(row, chunk);
    column_ = chunk * kChunkElements;
    if (column_ < num_columns_) pending_ = columns_.look_up(column_);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows_[i] = row_pointer(row + i * kPassRows);
  }

  SPARSE_UNIFIED_DEVICE void issue(uint32_t shared) {
    const int column = columns_.resolve(pending_, column_);
    const int source_bytes = column_ < num_columns_ ? kVectorBytes : 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy_async_16(
          shared + static_cast<uint32_t>(shared_offset_ + i * kPassRows * Tile::kRowBytes),
          rows_[i] + column, source_bytes);
    }
    column_ += Tile::kColumns;
    if (column_ < num_columns_) pending_ = columns_.look_up(column_);
  }

 private:
  const T* rows_[kPasses];
  Columns columns_;
  int num_columns_;
  int column_;         // of this thread's chunk, in the next step
  int shared_offset_;  // of this thread's first chunk in the tile
  typename Columns::Pending pending_{};
};

// Rows: index map of K, with pointer(pending, k): this thread's column in row k.
template <typename T, class Tile, int kThreads, class Rows>
class MnContiguousLoader {
  static constexpr int kPassRows = kThreads / Tile::kChunks;
  static constexpr int kPasses = Tile::kRows / kPassRows;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kPassRows == 0);
  static_assert(kPassRows % 8 == 0, "passes must be whole periods of the swizzle");

 public:
  // Column in the tile that this thread copies, with the 7 after it.
  SPARSE_UNIFIED_DEVICE static int column() {
    return static_cast<int>(threadIdx.x) % Tile::kChunks * kChunkElements;
  }

  // num_rows: K.
  SPARSE_UNIFIED_DEVICE MnContiguousLoader(const Rows& rows, int num_rows)
      : rows_(rows), num_rows_(num_rows) {
    const int thread = static_cast<int>(threadIdx.x);
    row_ = thread / Tile::kChunks;
    shared_offset_ = Tile::offset(row_, thread % Tile::kChunks);
    look_up();
  }

  SPARSE_UNIFIED_DEVICE void issue(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = row_ + i * kPassRows;
      copy_async_16(
          shared + static_cast<uint32_t>(shared_offset_ + i * kPassRows * Tile::kRowBytes),
          rows_.pointer(pending_[i], row), row < num_rows_ ? kVectorBytes : 0);
    }
    row_ += Tile::kRows;
    look_up();
  }

 private:
  SPARSE_UNIFIED_DEVICE void look_up() {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = row_ + i * kPassRows;
      if (row < num_rows_) pending_[i] = rows_.look_up(row);
    }
  }

  Rows rows_;
  int num_rows_;
  int row_;            // of this thread's first chunk, in the next step
  int shared_offset_;  // of this thread's first chunk in the tile
  typename Rows::Pending pending_[kPasses]{};
};

// Rows of a matrix through an index map, as MnContiguousLoader takes them.
template <typename T, class Index>
struct MatrixRows {
  const T* data;  // row 0, at the column of this thread
  int64_t stride;
  Index index;
  using Pending = typename Index::Pending;
  SPARSE_UNIFIED_DEVICE Pending look_up(int k) const { return index.look_up(k); }
  SPARSE_UNIFIED_DEVICE const T* pointer(Pending pending, int k) const {
    return data + index.resolve(pending, k) * stride;
  }
};

}  // namespace sparse_unified
