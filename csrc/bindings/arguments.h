// SPDX-License-Identifier: Apache-2.0
// Checks of shapes, dtypes and devices that the CPU and the CUDA side of an op share. Values of
// indices are looked at on the CPU alone: a GPU would have to be waited for.
#pragma once

#include <optional>

#include "bindings/common.h"

namespace sparse_unified {

// x [T, D], gate [E, D].
void check_router(const char* op, const Tensor& x, const Tensor& gate);

// topk_idx [T, K] of a router with num_experts experts, values unseen.
void check_routing(const char* op, const Tensor& topk_idx, int64_t num_experts);

// x [T, D], row_token [R], token_rows [T, K].
void check_permute(const char* op, const Tensor& x, const Tensor& row_token,
                   const Tensor& token_rows);

// y [R, D], weights [T, K], token_rows [T, K] as combine and its backward take them.
void check_combine(const char* op, const Tensor& y, const std::optional<Tensor>& weights,
                   const Tensor& token_rows);

// grad_logits [T, E], grad_topk_logits [T, K], topk_idx [T, K] as the router's backward takes them.
void check_router_gradients(const char* op, const Tensor& grad_logits,
                            const Tensor& grad_topk_logits, const Tensor& topk_idx, const Tensor& x,
                            const Tensor& gate);

// The sizes of grouped_ffn, once its tensors fit each other.
struct GroupedFfnSizes {
  DType dtype;
  int64_t num_rows;      // R
  int64_t hidden_size;   // D
  int64_t num_experts;   // E
  int64_t expert_width;  // h
};

GroupedFfnSizes check_grouped_ffn(const char* op, const Tensor& x, const Tensor& row_token,
                                  const Tensor& expert_offsets, const Tensor& gate_proj,
                                  const Tensor& up_proj, const Tensor& down_proj);

// weights [T, K] and token_rows [T, K] beside x [T, D] and row_token [R].
void check_row_weights(const char* op, const Tensor& x, const Tensor& row_token,
                       const Tensor& weights, const Tensor& token_rows);

// The sizes of pruned_ffn, likewise.
struct PrunedFfnSizes {
  DType dtype;
  int64_t num_tokens;   // T
  int64_t hidden_size;  // D
  int64_t width;        // I
  int64_t num_kept;     // B
  int64_t kept_width;   // B * block_size
};

PrunedFfnSizes check_pruned_ffn(const char* op, const Tensor& x, const Tensor& kept_blocks,
                                const Tensor& gate_proj, const Tensor& up_proj,
                                const Tensor& down_proj, int64_t block_size);

// grad_y [T, D], gate_rows and up_rows [rows, width] as the backward of either FFN takes them.
void check_ffn_gradients(const char* op, const Tensor& x, int64_t num_rows, int64_t width,
                         const Tensor& grad_y, const Tensor& gate_rows, const Tensor& up_rows);

}  // namespace sparse_unified
