// SPDX-License-Identifier: Apache-2.0
// From the accumulators of a consumer warpgroup to rows in memory, in two steps: rounding, after
// which the accumulators are free for the next tile, and stores, which need registers alone and run
// in the shadow of the next tile's products.
#pragma once

#include "device/epilogue.h"

namespace sparse_unified {

// Where the results of a consumer go.
template <typename T>
struct ResultPlace {
  T* first;         // row 0, column 0
  int64_t stride;   // elements from row to row
  int num_rows;     // that are stored, of 64; none when 0 or less
  int num_columns;  // likewise, a multiple of 8
};

// Columns kFirst to kEnd of a [64, kEnd] or wider tile, in vectors of 16 bytes, four lanes next to
// each other in a row. word(i) is the i-th pair of accumulators, rounded.
// NOTE: lanes exchange words whether or not they store: a branch around it would be divergent to
// the compiler, which then spills.
template <int kFirst, int kEnd, typename T, class Word>
SPARSE_UNIFIED_DEVICE void store_rounded_columns(const Word& word, const ResultPlace<T>& place) {
  const int lane_column = lane_idx() % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_idx() % 4 * 16 + lane_idx() / 4 + 8 * half;
    T* out = place.first + row * place.stride + lane_column;
#pragma unroll
    for (int column = kFirst; column < kEnd; column += 32) {
      Vector16 vector{};
#pragma unroll
      for (int j = 0; j < 4 && column + 8 * j < kEnd; ++j) {
        vector.words[j] = word(column / 4 + 2 * j + half);
      }
      transpose_quad(vector.words);
      if (row < place.num_rows && lane_column + column < place.num_columns) {
        store_vector(out + column, vector);
      }
    }
  }
}

// The [64, kColumns] results of a consumer. The first columns are stored as they come, the others,
// rounded to T, when store() is called: all of them would take 8 registers more than there are.
template <typename T, int kColumns>
class RoundedResults {
 public:
  static constexpr int kAtOnce = 32;

  SPARSE_UNIFIED_DEVICE void take(const float (&d)[kColumns / 2], const ResultPlace<T>& place) {
    const auto word = [&](int i) { return pack<T>(d[2 * i], d[2 * i + 1]); };
    store_rounded_columns<0, kAtOnce>(word, place);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words_[i] = word(kAtOnce / 4 + i);
  }
  SPARSE_UNIFIED_DEVICE void store(const ResultPlace<T>& place) const {
    store_rounded_columns<kAtOnce, kColumns>([&](int i) { return words_[i - kAtOnce / 4]; }, place);
  }

 private:
  static constexpr int kWords = (kColumns - kAtOnce) / 4;
  uint32_t words_[kWords];  // two columns of the upper row, two of the lower, and so on
};

// Zeros in the place of a consumer's results.
template <typename T>
SPARSE_UNIFIED_DEVICE void store_zeros(const ResultPlace<T>& place, int num_columns) {
  const int column = lane_idx() * 8;
  for (int row = warp_idx() % 4; row < min(64, place.num_rows); row += 4) {
    if (column < min(num_columns, place.num_columns)) {
      store_vector(place.first + row * place.stride + column, Vector16{});
    }
  }
}

}  // namespace sparse_unified
