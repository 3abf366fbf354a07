// SPDX-License-Identifier: Apache-2.0
// y[r] = x[row_token[r]]: R rows read and written once, whole rows at a time.
#include "sparse_unified/permute.h"

#include <cstring>

namespace sparse_unified {

void permute_cpu(const PermuteParams& params, int64_t row_begin, int64_t row_end) {
  const char* x = static_cast<const char*>(params.x);
  char* y = static_cast<char*>(params.y);
  for (int64_t row = row_begin; row < row_end; ++row) {
    std::memcpy(y + row * params.row_bytes, x + params.row_token[row] * params.x_stride_bytes,
                static_cast<size_t>(params.row_bytes));
  }
}

}  // namespace sparse_unified
