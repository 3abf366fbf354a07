// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/permute.h"

#include "bindings/arguments.h"
#include "bindings/ops.h"

namespace sparse_unified {

Tensor permute(Tensor x, Tensor row_token, Tensor token_rows) {
  constexpr const char* kOp = "permute";
  const DType dtype = check_permute(kOp, x, row_token, token_rows);
  row_token = as_contiguous(row_token);
  token_rows = as_contiguous(token_rows);
  check_row_maps(kOp, row_token, token_rows, x.size(0));
  x = with_dense_rows(x);

  Tensor y = empty_like_sized(x, {row_token.size(0), x.size(1)});
  PermuteParams params{};
  params.x = x.const_data_ptr();
  params.x_stride_bytes = x.stride(0) * element_bytes(dtype);
  params.token_rows = static_cast<const int32_t*>(token_rows.const_data_ptr());
  params.y = y.mutable_data_ptr();
  params.row_bytes = x.size(1) * element_bytes(dtype);
  params.top_k = token_rows.size(1);
  params.num_rows = row_token.size(0);
  torch::stable::parallel_for(0, x.size(0), 16,
                              [&](int64_t begin, int64_t end) { permute_cpu(params, begin, end); });
  return y;
}

}  // namespace sparse_unified
