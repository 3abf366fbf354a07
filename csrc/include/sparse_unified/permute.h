// SPDX-License-Identifier: Apache-2.0
// permute: gathers the token of each row.
#pragma once

#include <cstdint>

namespace sparse_unified {

struct PermuteParams {
  const void* x;             // [T, D], rows x_stride_bytes apart
  int64_t x_stride_bytes;    //
  const int32_t* row_token;  // [R]
  void* y;                   // [R, D]
  int64_t row_bytes;         // D * element size
};

// y[r] = x[row_token[r]] for rows [row_begin, row_end).
void permute_cpu(const PermuteParams& params, int64_t row_begin, int64_t row_end);

}  // namespace sparse_unified
