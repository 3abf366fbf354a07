// SPDX-License-Identifier: Apache-2.0
// permute: copies every token to its rows.
#pragma once

#include <cstdint>

namespace sparse_unified {

struct PermuteParams {
  const void* x;              // [T, D], rows x_stride_bytes apart
  int64_t x_stride_bytes;     //
  const int32_t* token_rows;  // [T, K]
  void* y;                    // [R, D], R = T * K
  int64_t row_bytes;          // D * element size
  int64_t top_k;              // K
  int64_t num_rows;           // R
};

// y[token_rows[t, k]] = x[t] for tokens [token_begin, token_end).
void permute_cpu(const PermuteParams& params, int64_t token_begin, int64_t token_end);

struct GatherRowsParams {
  const void* x;             // [T, D], rows x_stride_bytes apart
  int64_t x_stride_bytes;    //
  const int32_t* row_token;  // [n]
  void* y;                   // [n, D]
  int64_t row_bytes;         // D * element size
  int64_t num_rows;          // n
};

// y[r] = x[row_token[r]]: the same copy for a few adjacent rows, of one expert say.
void gather_rows_cpu(const GatherRowsParams& params);

}  // namespace sparse_unified
