// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/cuda/grouped_ffn.h"

#include "bindings/arguments.h"
#include "bindings/cuda/ops.h"

namespace sparse_unified::cuda {
namespace {

// The checked arguments of grouped_ffn with rows as kernels load them.
struct GroupedFfn {
  GroupedFfn(const char* op, Tensor x_in, Tensor row_token_in, Tensor expert_offsets_in,
             Tensor gate_proj_in, Tensor up_proj_in, Tensor down_proj_in)
      : sizes(check_grouped_ffn(op, x_in, row_token_in, expert_offsets_in, gate_proj_in, up_proj_in,
                                down_proj_in)),
        context(op, x_in),
        x(with_vector_rows(x_in)),
        row_token(torch::stable::contiguous(row_token_in)),
        expert_offsets(torch::stable::contiguous(expert_offsets_in)),
        gate_proj(with_vector_rows(gate_proj_in)),
        up_proj(with_vector_rows(up_proj_in)),
        down_proj(with_vector_rows(down_proj_in)) {
    const std::string refusal = grouped_ffn_cuda_refusal(params(), context.device());
    if (!refusal.empty()) throw std::runtime_error(std::string(op) + ": " + refusal);
  }

  GroupedFfnCudaParams params() const {
    GroupedFfnCudaParams params{};
    params.dtype = sizes.dtype;
    params.x = x.const_data_ptr();
    params.x_stride = x.stride(0);
    params.row_token = static_cast<const int32_t*>(row_token.const_data_ptr());
    params.expert_offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
    params.gate_proj = gate_proj.const_data_ptr();
    params.gate_stride = gate_proj.stride(0);
    params.up_proj = up_proj.const_data_ptr();
    params.up_stride = up_proj.stride(0);
    params.down_proj = down_proj.const_data_ptr();
    params.down_stride = down_proj.stride(0);
    params.num_tokens = x.size(0);
    params.num_rows = sizes.num_rows;
    params.hidden_size = sizes.hidden_size;
    params.num_experts = sizes.num_experts;
    params.expert_width = sizes.expert_width;
    return params;
  }

  GroupedFfnSizes sizes;
  Context context;
  Tensor x;               // [T, D]
  Tensor row_token;       // [R]
  Tensor expert_offsets;  // [E + 1]
  Tensor gate_proj;       // [E * h, D]
  Tensor up_proj;         // [E * h, D]
  Tensor down_proj;       // [D, E * h]
};

// y [R, D]; gate_rows and up_rows [R, h] are kept where given.
Tensor forward(const GroupedFfn& ffn, void* gate_rows, void* up_rows) {
  Tensor y = empty_like_sized(ffn.x, {ffn.sizes.num_rows, ffn.sizes.hidden_size});
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

// The gradient of x will use token_rows.
void check_token_rows(const char* op, const Tensor& x, const std::optional<Tensor>& token_rows) {
  if (!token_rows) return;
  check_tensor(op, "token_rows", *token_rows, 2, place_of(x));
  check_dtype(op, "token_rows", *token_rows, ScalarType::Int);
  check_size(op, "token_rows", *token_rows, 0, x.size(0), "the number of tokens");
}

}  // namespace

Tensor grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
                   Tensor up_proj, Tensor down_proj, std::optional<Tensor> token_rows) {
  constexpr const char* kOp = "grouped_ffn";
  const GroupedFfn ffn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  check_token_rows(kOp, x, token_rows);
  return forward(ffn, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> grouped_ffn_train(Tensor x, Tensor row_token,
                                                     Tensor expert_offsets, Tensor gate_proj,
                                                     Tensor up_proj, Tensor down_proj,
                                                     std::optional<Tensor> token_rows) {
  constexpr const char* kOp = "grouped_ffn_train";
  const GroupedFfn ffn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  check_token_rows(kOp, x, token_rows);
  Tensor gate_rows = empty_like_sized(x, {ffn.sizes.num_rows, ffn.sizes.expert_width});
  Tensor up_rows = empty_like_sized(x, {ffn.sizes.num_rows, ffn.sizes.expert_width});
  Tensor y = forward(ffn, gate_rows.mutable_data_ptr(), up_rows.mutable_data_ptr());
  return {y, gate_rows, up_rows};
}

Tensor grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
                           Tensor expert_offsets, Tensor gate_proj, Tensor up_proj,
                           Tensor down_proj) {
  constexpr const char* kOp = "grouped_ffn_combine";
  const GroupedFfn ffn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  return combine(forward(ffn, nullptr, nullptr), weights, token_rows);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_ffn_backward(
    Tensor grad_y, Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
    Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, bool needs_x,
    bool needs_weights) {
  constexpr const char* kOp = "grouped_ffn_backward";
  const GroupedFfn ffn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  check_ffn_gradients(kOp, x, ffn.sizes.num_rows, ffn.sizes.expert_width, grad_y, gate_rows,
                      up_rows);
  grad_y = contiguous_vector_rows(grad_y);
  gate_rows = contiguous_vector_rows(gate_rows);
  up_rows = contiguous_vector_rows(up_rows);

  const int64_t hidden_size = ffn.sizes.hidden_size;
  const int64_t width = gate_proj.size(0);
  const int64_t weight_rows = needs_weights ? width : 0;
  Tensor grad_rows = empty_like_sized(x, {needs_x ? ffn.sizes.num_rows : 0, hidden_size});
  Tensor grad_gate_proj = empty_like_sized(x, {weight_rows, hidden_size});
  Tensor grad_up_proj = empty_like_sized(x, {weight_rows, hidden_size});
  Tensor grad_down_proj = empty_like_sized(x, {needs_weights ? hidden_size : 0, width});
  GroupedFfnBackwardCudaParams params{};
  params.forward = ffn.params();
  params.forward.gate_rows = gate_rows.data_ptr();
  params.forward.up_rows = up_rows.data_ptr();
  params.grad_y = grad_y.const_data_ptr();
  params.grad_rows = needs_x ? grad_rows.mutable_data_ptr() : nullptr;
  params.grad_gate_proj = needs_weights ? grad_gate_proj.mutable_data_ptr() : nullptr;
  params.grad_up_proj = needs_weights ? grad_up_proj.mutable_data_ptr() : nullptr;
  params.grad_down_proj = needs_weights ? grad_down_proj.mutable_data_ptr() : nullptr;
  const DeviceInfo& device = ffn.context.device();
  Tensor workspace =
      ffn.context.workspace(grouped_ffn_backward_cuda_workspace_bytes(params, device));
  ffn.context.check(grouped_ffn_backward_cuda(params, device, workspace.mutable_data_ptr(),
                                              ffn.context.stream()));
  return {grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj};
}

}  // namespace sparse_unified::cuda
