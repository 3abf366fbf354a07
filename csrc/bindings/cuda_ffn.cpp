// SPDX-License-Identifier: Apache-2.0
#include "bindings/cuda_ffn.h"

#include "bindings/arguments.h"

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

std::tuple<Tensor, Tensor, Tensor, Tensor> CudaFfn::backward(Tensor grad_y, Tensor gate_rows,
                                                             Tensor up_rows, bool needs_x,
                                                             bool needs_weights) const {
  check_ffn_gradients(op_, x_, params_.num_rows, params_.expert_width, grad_y, gate_rows, up_rows);
  const GroupedFfnCudaPlan plan = plan_for(/*is_backward=*/true);
  grad_y = contiguous_vector_rows(grad_y);
  gate_rows = contiguous_vector_rows(gate_rows);
  up_rows = contiguous_vector_rows(up_rows);

  // With a list of blocks, kernels write the gradients of what is kept; those of the rest are zero.
  const Allocate allocate =
      params_.blocks.block_size == 0 ? Allocate{empty_like_sized} : zeros_like_sized;
  Tensor grad_rows = allocate(x_, {needs_x ? params_.num_rows : 0, x_.size(1)});
  Tensor grad_gate_proj = weights_gradient(gate_proj_, needs_weights, allocate);
  Tensor grad_up_proj = weights_gradient(up_proj_, needs_weights, allocate);
  Tensor grad_down_proj = weights_gradient(down_proj_, needs_weights, allocate);
  if (params_.expert_width > 0) {
    GroupedFfnBackwardCudaParams params{
        .forward = params_,
        .grad_y = grad_y.const_data_ptr(),
        .grad_rows = needs_x ? grad_rows.mutable_data_ptr() : nullptr,
        .grad_gate_proj = needs_weights ? grad_gate_proj.mutable_data_ptr() : nullptr,
        .grad_up_proj = needs_weights ? grad_up_proj.mutable_data_ptr() : nullptr,
        .grad_down_proj = needs_weights ? grad_down_proj.mutable_data_ptr() : nullptr};
    params.forward.gate_rows = gate_rows.data_ptr();
    params.forward.up_rows = up_rows.data_ptr();
    context_.launch([&](cudaStream_t stream) {
      Tensor workspace = context_.workspace((needs_weights ? 3 : 2) * plan.matrix_bytes);
      return grouped_ffn_backward_cuda(params, context_.device(), plan,
                                       workspace.mutable_data_ptr(), stream);
    });
  }
  return {grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj};
}

}  // namespace sparse_unified
