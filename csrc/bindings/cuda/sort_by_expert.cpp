// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/cuda/sort_by_expert.h"

#include "bindings/arguments.h"
#include "bindings/cuda/ops.h"
#include "sparse_unified/cuda/route_topk.h"

namespace sparse_unified::cuda {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(Tensor topk_idx, int64_t num_experts) {
  constexpr const char* kOp = "sort_by_expert";
  check_routing(kOp, topk_idx, num_experts);
  check(num_experts <= kMaxCudaExperts, kOp, "num_experts",
        "be at most " + std::to_string(kMaxCudaExperts) + " on CUDA", num_experts);
  const Context context(kOp, topk_idx);
  topk_idx = torch::stable::contiguous(topk_idx);

  const int64_t num_rows = topk_idx.numel();
  Tensor expert_offsets = empty_like_sized(topk_idx, {num_experts + 1});
  Tensor row_token = empty_like_sized(topk_idx, {num_rows});
  Tensor token_rows = empty_like_sized(topk_idx, {topk_idx.size(0), topk_idx.size(1)});
  SortByExpertParams params{};
  params.topk_idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
  params.expert_offsets = static_cast<int32_t*>(expert_offsets.mutable_data_ptr());
  params.row_token = static_cast<int32_t*>(row_token.mutable_data_ptr());
  params.token_rows = static_cast<int32_t*>(token_rows.mutable_data_ptr());
  params.num_rows = num_rows;
  params.num_experts = num_experts;
  params.top_k = topk_idx.size(1);
  Tensor workspace = context.workspace(sort_by_expert_cuda_workspace_bytes(params));
  context.check(sort_by_expert_cuda(params, workspace.mutable_data_ptr(), context.stream()));
  return {expert_offsets, row_token, token_rows};
}

}  // namespace sparse_unified::cuda
