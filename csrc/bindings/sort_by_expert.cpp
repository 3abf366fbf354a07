// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/sort_by_expert.h"

#include "bindings/arguments.h"
#include "bindings/context.h"
#include "bindings/ops.h"

namespace sparse_unified {

std::tuple<Tensor, Tensor, Tensor> sort_by_expert(Tensor topk_idx, int64_t num_experts) {
  constexpr const char* kOp = "sort_by_expert";
  check_routing(kOp, topk_idx, num_experts);
  const Context context(kOp, topk_idx);
  topk_idx = own_indices(topk_idx);

  SortByExpertParams params{.topk_idx = topk_idx.const_data_ptr<int32_t>(),
                            .num_rows = topk_idx.numel(),
                            .num_experts = num_experts,
                            .top_k = topk_idx.size(1)};
  if (!context.is_cuda()) {
    const int64_t bad = find_bad_expert(params);
    check(bad < 0, kOp, "topk_idx",
          "hold expert indices from 0 to " + std::to_string(num_experts - 1),
          bad < 0 ? 0 : params.topk_idx[bad], " at position ", bad);
  }

  Tensor expert_offsets = empty_like_sized(topk_idx, {num_experts + 1});
  Tensor row_token = empty_like_sized(topk_idx, {params.num_rows});
  Tensor token_rows = empty_like_sized(topk_idx, {topk_idx.size(0), topk_idx.size(1)});
  params.expert_offsets = expert_offsets.mutable_data_ptr<int32_t>();
  params.row_token = row_token.mutable_data_ptr<int32_t>();
  params.token_rows = token_rows.mutable_data_ptr<int32_t>();
  const bool is_done = context.launch([&](cudaStream_t stream) {
    Tensor workspace = context.workspace(sort_by_expert_cuda_workspace_bytes(params));
    return sort_by_expert_cuda(params, workspace.mutable_data_ptr(), stream);
  });
  if (!is_done) sort_by_expert_cpu(params);
  return {expert_offsets, row_token, token_rows};
}

}  // namespace sparse_unified
