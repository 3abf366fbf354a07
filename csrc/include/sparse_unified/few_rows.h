// SPDX-License-Identifier: Apache-2.0
// out = a @ b^T for a handful of rows: what a token of text multiplies.
#pragma once

#include <cstdint>

#include "sparse_unified/matrix.h"

namespace sparse_unified {

// With more rows every value of b is used often enough for a GEMM that packs it.
constexpr int64_t kMostFewRows = 7;

struct FewRowsParams {
  Matrix a;            // [n, k] fp32, n <= kMostFewRows
  Matrix b;            // [m, k] fp32
  float* out;          // [n, m]
  int64_t out_stride;  // elements from one row of out to the next
};

void few_rows_cpu(const FewRowsParams& params);

}  // namespace sparse_unified
