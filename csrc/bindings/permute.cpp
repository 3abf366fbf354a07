// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/permute.h"

#include "bindings/arguments.h"
#include "bindings/context.h"
#include "bindings/ops.h"

namespace sparse_unified {

Tensor permute(Tensor x, Tensor row_token, Tensor token_rows) {
  constexpr const char* kOp = "permute";
  constexpr int64_t kGrainTokens = 16;
  check_permute(kOp, x, row_token, token_rows);
  const Context context(kOp, x);
  row_token = own_indices(row_token);
  token_rows = own_indices(token_rows);
  if (!context.is_cuda()) check_row_maps(kOp, row_token, token_rows, x.size(0));
  x = with_dense_rows(x);

  Tensor y = empty_like_sized(x, {row_token.size(0), x.size(1)});
  const PermuteParams params{.x = bytes_of(x),
                             .row_token = row_token.const_data_ptr<int32_t>(),
                             .token_rows = token_rows.const_data_ptr<int32_t>(),
                             .y = y.mutable_data_ptr(),
                             .num_rows = row_token.size(0),
                             .top_k = token_rows.size(1)};
  if (context.launch([&](cudaStream_t stream) { return permute_cuda(params, stream); })) return y;
  torch::stable::parallel_for(0, x.size(0), kGrainTokens,
                              [&](int64_t begin, int64_t end) { permute_cpu(params, begin, end); });
  return y;
}

}  // namespace sparse_unified
