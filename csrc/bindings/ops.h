// SPDX-License-Identifier: Apache-2.0
// Every op, on the CPU and on CUDA, as registered in library.cpp. Shapes: T tokens, D hidden, E
// experts, h expert width, K top_k, R = T * K rows.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/common.h"

namespace sparse_unified {

// -> logits [T, E], topk_logits [T, K], topk_idx [T, K]
std::tuple<Tensor, Tensor, Tensor> route_topk(Tensor x, Tensor gate, int64_t top_k);
// -> grad_x [T, D], grad_gate [E, D]; empty where not wanted
std::tuple<Tensor, Tensor> route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits,
                                               Tensor topk_idx, Tensor x, Tensor gate, bool needs_x,
                                               bool needs_gate);

// -> expert_offsets [E + 1], row_token [R], token_rows [T, K]
std::tuple<Tensor, Tensor, Tensor> sort_by_expert(Tensor topk_idx, int64_t num_experts);

// -> y [R, D]
Tensor permute(Tensor x, Tensor row_token, Tensor token_rows);

// -> out [T, D]
Tensor combine(Tensor y, std::optional<Tensor> weights, Tensor token_rows, double weight_offset);

// -> y [R, D]; for inference
Tensor grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
                   Tensor up_proj, Tensor down_proj);

// -> y [T, D]: grouped_ffn and combine
Tensor grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
                           Tensor expert_offsets, Tensor gate_proj, Tensor up_proj,
                           Tensor down_proj, double weight_offset);
// -> y [T, D], gate_rows [R, h], up_rows [R, h]: the two activations that backward needs
std::tuple<Tensor, Tensor, Tensor> grouped_ffn_combine_train(
    Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, Tensor expert_offsets,
    Tensor gate_proj, Tensor up_proj, Tensor down_proj, double weight_offset);
// -> grad_x [T, D], grad_weights [T, K], grad_gate_proj, grad_up_proj, grad_down_proj; empty where
// not wanted
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_ffn_combine_backward(
    Tensor grad_y, Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
    Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor gate_rows,
    Tensor up_rows, double weight_offset, bool needs_x, bool needs_weights, bool needs_experts);

// -> y [T, D]
Tensor pruned_ffn(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                  int64_t block_size);
// -> y [T, D], gate_rows [T, J], up_rows [T, J], J kept neurons in the order of kept_blocks
std::tuple<Tensor, Tensor, Tensor> pruned_ffn_train(Tensor x, Tensor kept_blocks, Tensor gate_proj,
                                                    Tensor up_proj, Tensor down_proj,
                                                    int64_t block_size);
// -> grad_x [T, D], grad_gate_proj, grad_up_proj, grad_down_proj (zero in blocks that were not
// kept); empty where not wanted
std::tuple<Tensor, Tensor, Tensor, Tensor> pruned_ffn_backward(
    Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
    Tensor gate_rows, Tensor up_rows, int64_t block_size, bool needs_x, bool needs_weights);

// -> sum_abs [I], sum_squares [I], num_fired [I]
std::tuple<Tensor, Tensor, Tensor> ffn_importance(Tensor x, Tensor gate_proj, Tensor up_proj,
                                                  double threshold,
                                                  std::optional<Tensor> token_weights);

}  // namespace sparse_unified
