// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/combine.h"

#include "bindings/arguments.h"
#include "bindings/context.h"
#include "bindings/ops.h"

namespace sparse_unified {
namespace {

constexpr int64_t kGrainTokens = 16;

}  // namespace

Tensor combine(Tensor y, std::optional<Tensor> weights, Tensor token_rows, double weight_offset) {
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
                             .weight_offset = static_cast<float>(weight_offset),
                             .token_rows = token_rows.const_data_ptr<int32_t>(),
                             .out = out.mutable_data_ptr(),
                             .num_tokens = num_tokens,
                             .top_k = token_rows.size(1)};
  if (context.launch([&](cudaStream_t stream) { return combine_cuda(params, stream); })) return out;
  torch::stable::parallel_for(0, num_tokens, kGrainTokens,
                              [&](int64_t begin, int64_t end) { combine_cpu(params, begin, end); });
  return out;
}

}  // namespace sparse_unified
