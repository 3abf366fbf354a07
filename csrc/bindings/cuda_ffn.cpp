// SPDX-License-Identifier: Apache-2.0
#include "bindings/cuda_ffn.h"

#include "bindings/arguments.h"
#include "bindings/ops.h"

namespace sparse_unified {

// Tensors with rows as kernels load them.
CudaFfn::CudaFfn(const char* op, const Tensor& x, const Tensor& gate_proj, const Tensor& up_proj,
                 const Tensor& down_proj)
    : op_(op),
      context_(op, x),
      x_(with_vector_rows(x)),
      gate_proj_(with_even_steps(with_vector_rows, gate_proj, up_proj)),
      up_proj_(with_even_steps(with_vector_rows, up_proj, gate_proj)),
      down_proj_(with_vector_rows(down_proj)),
      params_{.dtype = dtype_of(x_),
              .x = matrix_of(x_),
              .gate_proj = matrix_of(gate_proj_),
              .up_proj = matrix_of(up_proj_),
              .down_proj = matrix_of(down_proj_),
              .spacing = spacing_of(gate_proj_, down_proj_)} {}

CudaFfn CudaFfn::grouped(const char* op, const Tensor& x, const Tensor& row_token,
                         const Tensor& expert_offsets, const Tensor& gate_proj,
                         const Tensor& up_proj, const Tensor& down_proj) {
  const GroupedFfnSizes sizes =
      check_grouped_ffn(op, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  CudaFfn ffn(op, x, gate_proj, up_proj, down_proj);
  ffn.indices_[0] = as_contiguous(row_token);
  ffn.indices_[1] = as_contiguous(expert_offsets);
  ffn.params_.row_token = ffn.indices_[0].const_data_ptr<int32_t>();
  ffn.params_.expert_offsets = ffn.indices_[1].const_data_ptr<int32_t>();
  ffn.params_.num_rows = sizes.num_rows;
  ffn.params_.num_experts = sizes.num_experts;
  ffn.params_.expert_width = sizes.expert_width;
  return ffn;
}

CudaFfn CudaFfn::pruned(const char* op, const Tensor& x, const Tensor& kept_blocks,
                        const Tensor& gate_proj, const Tensor& up_proj, const Tensor& down_proj,
                        int64_t block_size) {
  const PrunedFfnSizes sizes =
      check_pruned_ffn(op, x, kept_blocks, gate_proj, up_proj, down_proj, block_size);
  CudaFfn ffn(op, x, gate_proj, up_proj, down_proj);
  ffn.indices_[0] = as_contiguous(kept_blocks);
  ffn.params_.blocks = {.kept_blocks = ffn.indices_[0].const_data_ptr<int32_t>(),
                        .num_kept = sizes.num_kept,
                        .block_size = block_size,
                        .num_blocks = sizes.width / block_size};
  ffn.params_.num_rows = sizes.num_tokens;
  ffn.params_.num_experts = 1;
  ffn.params_.expert_width = sizes.kept_width;
  return ffn;
}

GroupedFfnCudaPlan CudaFfn::plan_for([[maybe_unused]] bool is_backward) const {
  GroupedFfnCudaPlan plan{};
  if constexpr (kHasCuda) plan = plan_grouped_ffn_cuda(params_, context_.device(), is_backward);
  if (!plan.refusal.empty()) throw std::runtime_error(std::string(op_) + ": " + plan.refusal);
  return plan;
}

Tensor CudaFfn::forward(void* gate_rows, void* up_rows) const {
  const GroupedFfnCudaPlan plan = plan_for(/*is_backward=*/false);
  if (params_.expert_width == 0) return zeros_like_sized(x_, {params_.num_rows, x_.size(1)});
  Tensor y = empty_like_sized(x_, {params_.num_rows, x_.size(1)});
  GroupedFfnCudaParams params = params_;
  params.gate_rows = gate_rows;
  params.up_rows = up_rows;
  params.y = y.mutable_data_ptr();
  context_.launch([&](cudaStream_t stream) {
    Tensor workspace = context_.workspace(plan.matrix_bytes);
    return grouped_ffn_cuda(params, context_.device(), plan, workspace.mutable_data_ptr(), stream);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> CudaFfn::train() const {
  Tensor gate_rows = empty_like_sized(x_, {params_.num_rows, params_.expert_width});
  Tensor up_rows = empty_like_sized(x_, {params_.num_rows, params_.expert_width});
  Tensor y = forward(gate_rows.mutable_data_ptr(), up_rows.mutable_data_ptr());
  return {y, gate_rows, up_rows};
}

std::tuple<Tensor, Tensor, Tensor> CudaFfn::run_backward(const RowWeights& weights,
                                                         const Tensor& grad_y,
                                                         const Tensor& gate_rows,
                                                         const Tensor& up_rows, void* grad_rows,
                                                         bool needs_experts) const {
  const GroupedFfnCudaPlan plan = plan_for(/*is_backward=*/true);
  // With a list of blocks, kernels write the gradients of what is kept; those of the rest are zero.
  const Allocate allocate =
      params_.blocks.block_size == 0 ? Allocate{empty_like_sized} : zeros_like_sized;
  Tensor grad_gate_proj = weights_gradient(gate_proj_, needs_experts, allocate);
  Tensor grad_up_proj = weights_gradient(up_proj_, needs_experts, allocate);
  Tensor grad_down_proj = weights_gradient(down_proj_, needs_experts, allocate);
  const Tensor gate = contiguous_vector_rows(gate_rows);
  const Tensor up = contiguous_vector_rows(up_rows);
  GroupedFfnBackwardCudaParams params{
      .forward = params_,
      .weights = weights,
      .grad_y = grad_y.const_data_ptr(),
      .grad_rows = grad_rows,
      .grad_gate_proj = needs_experts ? grad_gate_proj.mutable_data_ptr() : nullptr,
      .grad_up_proj = needs_experts ? grad_up_proj.mutable_data_ptr() : nullptr,
      .grad_down_proj = needs_experts ? grad_down_proj.mutable_data_ptr() : nullptr};
  params.forward.gate_rows = gate.data_ptr();
  params.forward.up_rows = up.data_ptr();
  if (params_.expert_width == 0) return {grad_gate_proj, grad_up_proj, grad_down_proj};
  context_.launch([&](cudaStream_t stream) {
    const int64_t bytes = (needs_experts ? 3 : 2) * plan.matrix_bytes +
                          (weights.weights != nullptr ? plan.weights_bytes : 0);
    Tensor workspace = context_.workspace(bytes);
    return grouped_ffn_backward_cuda(params, context_.device(), plan, workspace.mutable_data_ptr(),
                                     stream);
  });
  return {grad_gate_proj, grad_up_proj, grad_down_proj};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> CudaFfn::backward(Tensor grad_y, Tensor gate_rows,
                                                             Tensor up_rows, bool needs_x,
                                                             bool needs_weights) const {
  check_ffn_gradients(op_, x_, params_.num_rows, params_.expert_width, grad_y, gate_rows, up_rows);
  grad_y = contiguous_vector_rows(grad_y);
  const Allocate allocate =
      params_.expert_width > 0 ? Allocate{empty_like_sized} : zeros_like_sized;
  Tensor grad_x = allocate(x_, {needs_x ? params_.num_rows : 0, x_.size(1)});
  const auto [gate, up, down] = run_backward(
      {}, grad_y, gate_rows, up_rows, needs_x ? grad_x.mutable_data_ptr() : nullptr, needs_weights);
  return {grad_x, gate, up, down};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> CudaFfn::combine_backward(
    Tensor grad_y, Tensor weights, Tensor token_rows, double weight_offset, Tensor gate_rows,
    Tensor up_rows, bool needs_x, bool needs_weights, bool needs_experts) const {
  check_row_weights(op_, x_, indices_[0], weights, token_rows);
  check_ffn_gradients(op_, x_, params_.num_rows, params_.expert_width, grad_y, gate_rows, up_rows);
  weights = as_contiguous(weights);
  token_rows = as_contiguous(token_rows);
  const bool is_empty = params_.expert_width == 0;
  const Allocate allocate = is_empty ? zeros_like_sized : Allocate{empty_like_sized};
  Tensor grad_weights = allocate(weights, {needs_weights ? weights.size(0) : 0, weights.size(1)});
  // grad_y of the rows, and then the gradients of the rows: who reads the one has ended before.
  Tensor rows = is_empty ? zeros_like_sized(x_, {params_.num_rows, x_.size(1)})
                         : permute(grad_y, indices_[0], token_rows);
  const auto [gate, up, down] = run_backward(
      {.weights = weights.const_data_ptr<float>(),
       .offset = static_cast<float>(weight_offset),
       .token_rows = token_rows.const_data_ptr<int32_t>(),
       .grad_weights = needs_weights ? grad_weights.mutable_data_ptr<float>() : nullptr},
      rows, gate_rows, up_rows, needs_x ? rows.mutable_data_ptr() : nullptr, needs_experts);
  Tensor grad_x =
      needs_x ? combine(rows, std::nullopt, token_rows, 0) : empty_like_sized(x_, {0, x_.size(1)});
  return {grad_x, grad_weights, gate, up, down};
}

}  // namespace sparse_unified
