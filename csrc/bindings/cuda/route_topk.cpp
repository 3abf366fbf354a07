// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/cuda/route_topk.h"

#include "bindings/arguments.h"
#include "bindings/cuda/ops.h"

namespace sparse_unified::cuda {
namespace {

void check_num_experts(const char* op, const Tensor& gate) {
  check(gate.size(0) <= kMaxCudaExperts, op, "gate",
        "have at most " + std::to_string(kMaxCudaExperts) + " experts on CUDA", gate.size(0));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route_topk(Tensor x, Tensor gate, int64_t top_k) {
  constexpr const char* kOp = "route_topk";
  RouteTopkCudaParams params{};
  params.dtype = check_router(kOp, x, gate);
  check_num_experts(kOp, gate);
  check(top_k >= 1 && top_k <= gate.size(0), kOp, "top_k",
        "be from 1 to the number of experts " + std::to_string(gate.size(0)), top_k);
  const Context context(kOp, x);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);

  Tensor logits = empty_like_sized(x, {x.size(0), gate.size(0)}, ScalarType::Float);
  Tensor topk_logits = empty_like_sized(x, {x.size(0), top_k}, ScalarType::Float);
  Tensor topk_idx = empty_like_sized(x, {x.size(0), top_k}, ScalarType::Int);
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.gate = gate.const_data_ptr();
  params.gate_stride = gate.stride(0);
  params.logits = static_cast<float*>(logits.mutable_data_ptr());
  params.topk_logits = static_cast<float*>(topk_logits.mutable_data_ptr());
  params.topk_idx = static_cast<int32_t*>(topk_idx.mutable_data_ptr());
  params.num_tokens = x.size(0);
  params.hidden_size = x.size(1);
  params.num_experts = gate.size(0);
  params.top_k = top_k;
  context.check(route_topk_cuda(params, context.stream()));
  return {logits, topk_logits, topk_idx};
}

std::tuple<Tensor, Tensor> route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits,
                                               Tensor topk_idx, Tensor x, Tensor gate, bool needs_x,
                                               bool needs_gate) {
  constexpr const char* kOp = "route_topk_backward";
  check_router_gradients(kOp, grad_logits, grad_topk_logits, topk_idx, x, gate);
  check_num_experts(kOp, gate);
  const Context context(kOp, x);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);
  grad_logits = torch::stable::contiguous(grad_logits);
  grad_topk_logits = torch::stable::contiguous(grad_topk_logits);
  topk_idx = torch::stable::contiguous(topk_idx);

  Tensor grad_x = empty_like_sized(x, {needs_x ? x.size(0) : 0, x.size(1)});
  Tensor grad_gate = empty_like_sized(x, {needs_gate ? gate.size(0) : 0, x.size(1)});
  RouteTopkBackwardCudaParams params{};
  params.dtype = check_float(kOp, "x", x);
  params.grad_logits = static_cast<const float*>(grad_logits.const_data_ptr());
  params.grad_topk_logits = static_cast<const float*>(grad_topk_logits.const_data_ptr());
  params.topk_idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.gate = gate.const_data_ptr();
  params.gate_stride = gate.stride(0);
  params.grad_x = needs_x ? grad_x.mutable_data_ptr() : nullptr;
  params.grad_gate = needs_gate ? grad_gate.mutable_data_ptr() : nullptr;
  params.num_tokens = x.size(0);
  params.hidden_size = x.size(1);
  params.num_experts = gate.size(0);
  params.top_k = topk_idx.size(1);
  Tensor workspace = context.workspace(route_topk_backward_cuda_workspace_bytes(params));
  context.check(route_topk_backward_cuda(params, workspace.mutable_data_ptr(), context.stream()));
  return {grad_x, grad_gate};
}

}  // namespace sparse_unified::cuda
