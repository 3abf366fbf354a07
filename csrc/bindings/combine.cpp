// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/combine.h"

#include "bindings/arguments.h"
#include "bindings/ops.h"

namespace sparse_unified {
namespace {

constexpr int64_t kGrainTokens = 16;

}  // namespace

Tensor combine(Tensor y, std::optional<Tensor> weights, Tensor token_rows) {
  constexpr const char* kOp = "combine";
  check_combine(kOp, y, weights, token_rows);
  y = with_dense_rows(y);
  token_rows = as_contiguous(token_rows);
  check_indices(kOp, "token_rows", token_rows, y.size(0));
  if (weights) weights = as_contiguous(*weights);

  Tensor out = empty_like_sized(y, {token_rows.size(0), y.size(1)});
  CombineParams params{};
  params.dtype = check_float(kOp, "y", y);
  params.y = y.const_data_ptr();
  params.y_stride = y.stride(0);
  params.weights = weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr;
  params.token_rows = static_cast<const int32_t*>(token_rows.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.hidden_size = y.size(1);
  params.top_k = token_rows.size(1);
  torch::stable::parallel_for(0, token_rows.size(0), kGrainTokens,
                              [&](int64_t begin, int64_t end) { combine_cpu(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_out, Tensor y, Tensor weights,
                                            Tensor token_rows, bool needs_y, bool needs_weights) {
  constexpr const char* kOp = "combine_backward";
  check_combine(kOp, y, weights, token_rows);
  check_combine_gradient(kOp, grad_out, y, token_rows);
  grad_out = with_dense_rows(grad_out);
  y = with_dense_rows(y);
  weights = as_contiguous(weights);
  token_rows = as_contiguous(token_rows);
  check_bijection(kOp, "token_rows", token_rows, y.size(0));

  Tensor grad_y = empty_like_sized(y, {needs_y ? y.size(0) : 0, y.size(1)});
  Tensor grad_weights =
      empty_like_sized(weights, {needs_weights ? weights.size(0) : 0, weights.size(1)});
  CombineBackwardParams params{};
  params.dtype = check_float(kOp, "y", y);
  params.grad_out = grad_out.const_data_ptr();
  params.grad_stride = grad_out.stride(0);
  params.y = y.const_data_ptr();
  params.y_stride = y.stride(0);
  params.weights = static_cast<const float*>(weights.const_data_ptr());
  params.token_rows = static_cast<const int32_t*>(token_rows.const_data_ptr());
  params.grad_y = needs_y ? grad_y.mutable_data_ptr() : nullptr;
  params.grad_weights =
      needs_weights ? static_cast<float*>(grad_weights.mutable_data_ptr()) : nullptr;
  params.hidden_size = y.size(1);
  params.top_k = token_rows.size(1);
  torch::stable::parallel_for(0, token_rows.size(0), kGrainTokens, [&](int64_t begin, int64_t end) {
    combine_backward_cpu(params, begin, end);
  });
  return {grad_y, grad_weights};
}

}  // namespace sparse_unified
