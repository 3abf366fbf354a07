// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/cuda/permute.h"

#include "bindings/arguments.h"
#include "bindings/cuda/ops.h"

namespace sparse_unified::cuda {

Tensor permute(Tensor x, Tensor row_token, Tensor token_rows) {
  constexpr const char* kOp = "permute";
  const DType dtype = check_permute(kOp, x, row_token, token_rows);
  const Context context(kOp, x);
  x = with_dense_rows(x);
  row_token = torch::stable::contiguous(row_token);

  Tensor y = empty_like_sized(x, {row_token.size(0), x.size(1)});
  PermuteCudaParams params{};
  params.x = x.const_data_ptr();
  params.x_stride_bytes = x.stride(0) * element_bytes(dtype);
  params.row_token = static_cast<const int32_t*>(row_token.const_data_ptr());
  params.y = y.mutable_data_ptr();
  params.row_bytes = x.size(1) * element_bytes(dtype);
  params.num_rows = row_token.size(0);
  params.num_tokens = x.size(0);
  context.check(permute_cuda(params, context.stream()));
  return y;
}

}  // namespace sparse_unified::cuda
