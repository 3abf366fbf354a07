// SPDX-License-Identifier: Apache-2.0
// The CUDA side of every op; signatures and shapes as in bindings/ops.h.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/cuda/context.h"

namespace sparse_unified::cuda {

std::tuple<Tensor, Tensor, Tensor> route_topk(Tensor x, Tensor gate, int64_t top_k);
std::tuple<Tensor, Tensor> route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits,
                                               Tensor topk_idx, Tensor x, Tensor gate, bool needs_x,
                                               bool needs_gate);
std::tuple<Tensor, Tensor, Tensor> sort_by_expert(Tensor topk_idx, int64_t num_experts);
Tensor permute(Tensor x, Tensor row_token, Tensor token_rows);
Tensor combine(Tensor y, std::optional<Tensor> weights, Tensor token_rows);
std::tuple<Tensor, Tensor> combine_backward(Tensor grad_out, Tensor y, Tensor weights,
                                            Tensor token_rows, bool needs_y, bool needs_weights);
Tensor grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
                   Tensor up_proj, Tensor down_proj, std::optional<Tensor> token_rows);
std::tuple<Tensor, Tensor, Tensor> grouped_ffn_train(Tensor x, Tensor row_token,
                                                     Tensor expert_offsets, Tensor gate_proj,
                                                     Tensor up_proj, Tensor down_proj,
                                                     std::optional<Tensor> token_rows);
Tensor grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
                           Tensor expert_offsets, Tensor gate_proj, Tensor up_proj,
                           Tensor down_proj);
std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_ffn_backward(
    Tensor grad_y, Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
    Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, bool needs_x,
    bool needs_weights);
Tensor pruned_ffn(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                  int64_t block_size);
std::tuple<Tensor, Tensor, Tensor> pruned_ffn_train(Tensor x, Tensor kept_blocks, Tensor gate_proj,
                                                    Tensor up_proj, Tensor down_proj,
                                                    int64_t block_size);
std::tuple<Tensor, Tensor, Tensor, Tensor> pruned_ffn_backward(
    Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
    Tensor gate_rows, Tensor up_rows, int64_t block_size, bool needs_x, bool needs_weights);

}  // namespace sparse_unified::cuda
