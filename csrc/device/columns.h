// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes of adjacent columns of a row, whatever the alignment of the row.
#pragma once

#include <cstring>

#include "device/vector.h"

namespace sparse_unified {

// Whether rows of `num_columns` values that start at `data` and lie `stride` elements apart consist
// of whole, aligned vectors: what kIsAligned below promises.
template <typename T>
bool has_aligned_columns(const void* data, int64_t stride, int64_t num_columns) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         stride % kVectorElements<T> == 0 && num_columns % kVectorElements<T> == 0;
}

// Columns [column, column + kVectorElements<T>) of a row of num_columns; zeros beyond its end.
template <typename T, bool kIsAligned>
SPARSE_UNIFIED_DEVICE Vector16 load_columns(const T* row, int64_t column, int64_t num_columns) {
  Vector16 vector{};
  if constexpr (kIsAligned) {
    if (column < num_columns) vector = load_vector(row + column);
  } else {
    T values[kVectorElements<T>] = {};
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (column + i < num_columns) values[i] = row[column + i];
    }
    memcpy(&vector, values, sizeof(vector));
  }
  return vector;
}

// The same for data that nobody writes during the kernel and that is read once.
template <typename T, bool kIsAligned>
SPARSE_UNIFIED_DEVICE Vector16 load_columns_once(const T* row, int64_t column,
                                                 int64_t num_columns) {
  if constexpr (kIsAligned) {
    return column < num_columns ? load_vector_once(row + column) : Vector16{};
  } else {
    return load_columns<T, false>(row, column, num_columns);
  }
}

// And back; nothing is written beyond the end of the row.
template <typename T, bool kIsAligned>
SPARSE_UNIFIED_DEVICE void store_columns(T* row, int64_t column, int64_t num_columns,
                                         const Vector16& vector) {
  if constexpr (kIsAligned) {
    if (column < num_columns) store_vector(row + column, vector);
  } else {
    T values[kVectorElements<T>];
    memcpy(values, &vector, sizeof(vector));
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) {
      if (column + i < num_columns) row[column + i] = values[i];
    }
  }
}

}  // namespace sparse_unified
