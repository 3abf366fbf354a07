// SPDX-License-Identifier: Apache-2.0
// out[i][j] = sum_k a[i][k] * b[j][k] for at most 7 rows of a: 2 n operations for each value of b,
// which is read once, where it lies; so it is bound by memory, which a GEMM that packs b, or a
// matrix-vector product for each row, would read or write several times.
//
// Sums are of 16 lanes, in fp32, and are rounded once. A row's result does not depend on the other
// rows.
#include "sparse_unified/few_rows.h"

#include <algorithm>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

// Rows of b at a time: as many as keep the multipliers busy with the registers of AVX2.
constexpr int64_t rows_at_once(int64_t num_rows) { return std::max<int64_t>(6 / num_rows, 1); }

using QuarterLanes = float __attribute__((vector_size(4 * kLanes / 4)));

// Sum of the lanes, folded in registers.
SPARSE_UNIFIED_INLINE float fold(const Float& value) {
  HalfFloat halves[2];
  std::memcpy(halves, &value, sizeof(halves));
  const HalfFloat half = halves[0] + halves[1];
  QuarterLanes quarters[2];
  std::memcpy(quarters, &half, sizeof(quarters));
  const QuarterLanes lanes = quarters[0] + quarters[1];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// What of a row is behind its whole vectors: its last 16 values in the lanes `last`, which no
// vector before had, and zeros.
SPARSE_UNIFIED_INLINE Float tail(const float* row, int64_t length, const Int& last) {
  if (length < kLanes) return load(row, length);
  const Float value = load(row + length - kLanes);
  return last ? value : Float{};
}

// The products of all rows of a, whose tails are given, and kColumns rows of b from row j on. The
// rows of b that follow are asked for, since they may begin anywhere in memory. `last` is true in
// the lanes of a row's last 16 values that are in none of the whole vectors before.
template <int64_t kRows, int64_t kColumns>
SPARSE_UNIFIED_INLINE void dot_rows(const FewRowsParams& params, const Float* tails,
                                    const Int& last, int64_t j) {
  const int64_t length = params.a.columns;
  const int64_t whole = length / kLanes * kLanes;
  const float* a[kRows];
  const float* b[kColumns];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) a[i] = params.a.row<float>(i);
#pragma GCC unroll 8
  for (int64_t c = 0; c < kColumns; ++c) b[c] = params.b.row<float>(j + c);
  const int64_t ahead = std::min(kColumns, params.b.rows - j - 1) * params.b.stride;
  Float sums[kColumns][kRows] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < kColumns; ++c) {
      __builtin_prefetch(b[c] + ahead + k);
      const Float value = load(b[c] + k);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) sums[c][i] += load(a[i] + k) * value;
    }
  }
#pragma GCC unroll 8
  for (int64_t c = 0; c < kColumns; ++c) {
    const Float b_tail = whole < length ? tail(b[c], length, last) : Float{};
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      params.out[i * params.out_stride + j + c] = fold(sums[c][i] + tails[i] * b_tail);
    }
  }
}

template <int64_t kRows>
SPARSE_UNIFIED_INLINE void multiply(const FewRowsParams& params) {
  constexpr int64_t kColumns = rows_at_once(kRows);
  Int last = {};
  const int64_t rest = params.a.columns % kLanes;
  for (int64_t lane = kLanes - rest; lane < kLanes; ++lane) last[lane] = -1;
  Float tails[kRows] = {};
  for (int64_t i = 0; rest != 0 && i < kRows; ++i) {
    tails[i] = tail(params.a.row<float>(i), params.a.columns, last);
  }
  int64_t j = 0;
  for (; j + kColumns <= params.b.rows; j += kColumns) {
    dot_rows<kRows, kColumns>(params, tails, last, j);
  }
  if constexpr (kColumns > 1) {
    for (; j < params.b.rows; ++j) dot_rows<kRows, 1>(params, tails, last, j);
  }
}

SPARSE_UNIFIED_MULTIVERSION void few_rows(const FewRowsParams& params) {
  switch (params.a.rows) {
    case 1:
      return multiply<1>(params);
    case 2:
      return multiply<2>(params);
    case 3:
      return multiply<3>(params);
    case 4:
      return multiply<4>(params);
    case 5:
      return multiply<5>(params);
    case 6:
      return multiply<6>(params);
    case kMostFewRows:
      return multiply<kMostFewRows>(params);
    default:  // no rows: nothing to do
      return;
  }
}

}  // namespace

void few_rows_cpu(const FewRowsParams& params) { few_rows(params); }

}  // namespace sparse_unified
