// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/permute.h"

#include "bindings/ops.h"

namespace sparse_unified {

Tensor permute(Tensor x, Tensor row_token, Tensor token_rows) {
  constexpr const char* kOp = "permute";
  check_tensor(kOp, "x", x, 2);
  const DType dtype = check_float(kOp, "x", x);
  check_tensor(kOp, "row_token", row_token, 1);
  check_dtype(kOp, "row_token", row_token, ScalarType::Int);
  check_tensor(kOp, "token_rows", token_rows, 2);
  check_dtype(kOp, "token_rows", token_rows, ScalarType::Int);
  check_size(kOp, "token_rows", token_rows, 0, x.size(0), "the number of tokens");
  check(token_rows.numel() == row_token.numel(), kOp, "token_rows",
        "hold one entry for each of the " + std::to_string(row_token.numel()) + " rows", "shape ",
        shape_text(token_rows));
  row_token = torch::stable::contiguous(row_token);
  token_rows = torch::stable::contiguous(token_rows);
  check_bijection(kOp, "token_rows", token_rows, row_token.size(0));
  const auto* tokens = static_cast<const int32_t*>(row_token.const_data_ptr());
  const auto* rows = static_cast<const int32_t*>(token_rows.const_data_ptr());
  const int64_t num_tokens = x.size(0);
  const int64_t top_k = token_rows.size(1);
  for (int64_t token = 0, slot = 0; token < num_tokens; ++token) {
    for (int64_t k = 0; k < top_k; ++k, ++slot) {
      if (tokens[rows[slot]] != token) {
        fail(kOp, "row_token", "name the token whose rows token_rows lists", tokens[rows[slot]],
             " at row ", rows[slot], " of token ", token);
      }
    }
  }
  x = with_dense_rows(x);

  Tensor y = empty_like_sized(x, {row_token.size(0), x.size(1)});
  PermuteParams params{};
  params.x = x.const_data_ptr();
  params.x_stride_bytes = x.stride(0) * element_bytes(dtype);
  params.token_rows = rows;
  params.y = y.mutable_data_ptr();
  params.row_bytes = x.size(1) * element_bytes(dtype);
  params.top_k = top_k;
  torch::stable::parallel_for(0, num_tokens, 16,
                              [&](int64_t begin, int64_t end) { permute_cpu(params, begin, end); });
  return y;
}

}  // namespace sparse_unified
