// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/combine.h"

#include "bindings/arguments.h"
#include "bindings/context.h"
#include "bindings/ops.h"

namespace sparse_unified {
namespace {

constexpr int64_t kGrainTokens = 16;

}  // namespace

Tensor combine(Tensor y, std::optional<Tensor> weights, Tensor token_rows) {
  constexpr const char* kOp = "combine";
  check_combine(kOp, y, weights, token_rows);
  const Context context(kOp, y);
  y = with_dense_rows(y);
  token_rows = own_indices(token_rows);
  if (!context.is_cuda()) check_indices(kOp, "token_rows", token_rows, y.size(0));
  if (weights) weights = as_contiguous(*weights);

  const int64_t num_tokens = token_rows.size(0);
  Tensor out = empty_like_sized(y, {num_tokens, y.size(1)});
  const CombineParams params{.dtype = dtype_of(y),
                             .y = matrix_of(y),
                             .weights = weights ? weights->const_data_ptr<float>() : nullptr,
                             .token_rows = token_rows.const_data_ptr<int32_t>(),
                             .out = out.mutable_data_ptr(),
                             .num_tokens = num_tokens,
                             .top_k = token_rows.size(1)};
  if (context.launch([&](cudaStream_t stream) { return combine_cuda(params, stream); })) return out;
  torch::stable::parallel_for(0, num_tokens, kGrainTokens,
                              [&](int64_t begin, int64_t end) { combine_cpu(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_out, Tensor y, Tensor weights,
                                            Tensor token_rows, bool needs_y, bool needs_weights) {
  constexpr const char* kOp = "combine_backward";
  check_combine(kOp, y, weights, token_rows);
  check_combine_gradient(kOp, grad_out, y, token_rows);
  const Context context(kOp, y);
  grad_out = with_dense_rows(grad_out);
  y = with_dense_rows(y);
  weights = as_contiguous(weights);
  token_rows = own_indices(token_rows);
  if (!context.is_cuda()) check_bijection(kOp, "token_rows", token_rows, y.size(0));

  Tensor grad_y = empty_like_sized(y, {needs_y ? y.size(0) : 0, y.size(1)});
  Tensor grad_weights =
      empty_like_sized(weights, {needs_weights ? weights.size(0) : 0, weights.size(1)});
  const CombineBackwardParams params{
      .dtype = dtype_of(y),
      .grad_out = matrix_of(grad_out),
      .y = matrix_of(y),
      .weights = weights.const_data_ptr<float>(),
      .token_rows = token_rows.const_data_ptr<int32_t>(),
      .grad_y = needs_y ? grad_y.mutable_data_ptr() : nullptr,
      .grad_weights = needs_weights ? grad_weights.mutable_data_ptr<float>() : nullptr,
      .top_k = token_rows.size(1)};
  if (!context.launch([&](cudaStream_t stream) { return combine_backward_cuda(params, stream); })) {
    torch::stable::parallel_for(
        0, token_rows.size(0), kGrainTokens,
        [&](int64_t begin, int64_t end) { combine_backward_cpu(params, begin, end); });
  }
  return {grad_y, grad_weights};
}

}  // namespace sparse_unified
