// SPDX-License-Identifier: Apache-2.0
// pruned_ffn on CUDA: the kernels of grouped_ffn on one group, all tokens, with the kept blocks in
// place of an expert's neurons.
#include "bindings/arguments.h"
#include "bindings/cuda/ops.h"
#include "sparse_unified/cuda/grouped_ffn.h"

namespace sparse_unified::cuda {
namespace {

// The checked arguments with rows as kernels load them.
struct PrunedFfn {
  PrunedFfn(const char* op, Tensor x_in, Tensor kept_blocks_in, Tensor gate_proj_in,
            Tensor up_proj_in, Tensor down_proj_in, int64_t block_size_in, bool is_backward)
      : sizes(check_pruned_ffn(op, x_in, kept_blocks_in, gate_proj_in, up_proj_in, down_proj_in,
                               block_size_in)),
        context(op, x_in),
        x(with_vector_rows(x_in)),
        kept_blocks(torch::stable::contiguous(kept_blocks_in)),
        gate_proj(with_vector_rows(gate_proj_in)),
        up_proj(with_vector_rows(up_proj_in)),
        down_proj(with_vector_rows(down_proj_in)),
        block_size(block_size_in) {
    const std::string refusal = is_backward
                                    ? grouped_ffn_backward_cuda_refusal(params(), context.device())
                                    : grouped_ffn_cuda_refusal(params(), context.device());
    if (!refusal.empty()) throw std::runtime_error(std::string(op) + ": " + refusal);
  }

  GroupedFfnCudaParams params() const {
    GroupedFfnCudaParams params{};
    params.dtype = sizes.dtype;
    params.x = x.const_data_ptr();
    params.x_stride = x.stride(0);
    params.gate_proj = gate_proj.const_data_ptr();
    params.gate_stride = gate_proj.stride(0);
    params.up_proj = up_proj.const_data_ptr();
    params.up_stride = up_proj.stride(0);
    params.down_proj = down_proj.const_data_ptr();
    params.down_stride = down_proj.stride(0);
    params.blocks.kept_blocks = static_cast<const int32_t*>(kept_blocks.const_data_ptr());
    params.blocks.num_kept = sizes.num_kept;
    params.blocks.block_size = block_size;
    params.blocks.num_blocks = sizes.width / block_size;
    params.num_tokens = sizes.num_tokens;
    params.num_rows = sizes.num_tokens;
    params.hidden_size = sizes.hidden_size;
    params.num_experts = 1;
    params.expert_width = sizes.kept_width;
    return params;
  }

  PrunedFfnSizes sizes;
  Context context;
  Tensor x;            // [T, D]
  Tensor kept_blocks;  // [B]
  Tensor gate_proj;    // [I, D]
  Tensor up_proj;      // [I, D]
  Tensor down_proj;    // [D, I]
  int64_t block_size;
};

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor out = empty_like_sized(like, sizes);
  torch::stable::zero_(out);
  return out;
}

// y [T, D]; gate_rows and up_rows [T, J] are kept where given.
Tensor forward(const PrunedFfn& ffn, void* gate_rows, void* up_rows) {
  if (ffn.sizes.num_kept == 0) return zeros(ffn.x, {ffn.sizes.num_tokens, ffn.sizes.hidden_size});
  Tensor y = empty_like_sized(ffn.x, {ffn.sizes.num_tokens, ffn.sizes.hidden_size});
  GroupedFfnCudaParams params = ffn.params();
  params.gate_rows = gate_rows;
  params.up_rows = up_rows;
  params.y = y.mutable_data_ptr();
  const DeviceInfo& device = ffn.context.device();
  Tensor workspace = ffn.context.workspace(grouped_ffn_cuda_workspace_bytes(params, device));
  ffn.context.check(
      grouped_ffn_cuda(params, device, workspace.mutable_data_ptr(), ffn.context.stream()));
  return y;
}

}  // namespace

Tensor pruned_ffn(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                  int64_t block_size) {
  const PrunedFfn ffn("pruned_ffn", x, kept_blocks, gate_proj, up_proj, down_proj, block_size,
                      false);
  return forward(ffn, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> pruned_ffn_train(Tensor x, Tensor kept_blocks, Tensor gate_proj,
                                                    Tensor up_proj, Tensor down_proj,
                                                    int64_t block_size) {
  const PrunedFfn ffn("pruned_ffn_train", x, kept_blocks, gate_proj, up_proj, down_proj, block_size,
                      false);
  Tensor gate_rows = empty_like_sized(x, {ffn.sizes.num_tokens, ffn.sizes.kept_width});
  Tensor up_rows = empty_like_sized(x, {ffn.sizes.num_tokens, ffn.sizes.kept_width});
  Tensor y = forward(ffn, gate_rows.mutable_data_ptr(), up_rows.mutable_data_ptr());
  return {y, gate_rows, up_rows};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pruned_ffn_backward(
    Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
    Tensor gate_rows, Tensor up_rows, int64_t block_size, bool needs_x, bool needs_weights) {
  constexpr const char* kOp = "pruned_ffn_backward";
  const PrunedFfn ffn(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size, true);
  check_ffn_gradients(kOp, x, ffn.sizes.num_tokens, ffn.sizes.kept_width, grad_y, gate_rows,
                      up_rows);
  grad_y = contiguous_vector_rows(grad_y);
  gate_rows = contiguous_vector_rows(gate_rows);
  up_rows = contiguous_vector_rows(up_rows);

  // Kernels write the gradients of what is kept; those of the rest are zero.
  const int64_t hidden_size = ffn.sizes.hidden_size;
  const int64_t width = needs_weights ? ffn.sizes.width : 0;
  Tensor grad_x = zeros(x, {needs_x ? ffn.sizes.num_tokens : 0, hidden_size});
  Tensor grad_gate_proj = zeros(x, {width, hidden_size});
  Tensor grad_up_proj = zeros(x, {width, hidden_size});
  Tensor grad_down_proj = zeros(x, {needs_weights ? hidden_size : 0, width});
  if (ffn.sizes.num_kept == 0) return {grad_x, grad_gate_proj, grad_up_proj, grad_down_proj};
  GroupedFfnBackwardCudaParams params{};
  params.forward = ffn.params();
  params.forward.gate_rows = gate_rows.data_ptr();
  params.forward.up_rows = up_rows.data_ptr();
  params.grad_y = grad_y.const_data_ptr();
  params.grad_rows = needs_x ? grad_x.mutable_data_ptr() : nullptr;
  params.grad_gate_proj = needs_weights ? grad_gate_proj.mutable_data_ptr() : nullptr;
  params.grad_up_proj = needs_weights ? grad_up_proj.mutable_data_ptr() : nullptr;
  params.grad_down_proj = needs_weights ? grad_down_proj.mutable_data_ptr() : nullptr;
  const DeviceInfo& device = ffn.context.device();
  Tensor workspace =
      ffn.context.workspace(grouped_ffn_backward_cuda_workspace_bytes(params, device));
  ffn.context.check(grouped_ffn_backward_cuda(params, device, workspace.mutable_data_ptr(),
                                              ffn.context.stream()));
  return {grad_x, grad_gate_proj, grad_up_proj, grad_down_proj};
}

}  // namespace sparse_unified::cuda
