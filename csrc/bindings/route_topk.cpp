// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/route_topk.h"

#include "bindings/arguments.h"
#include "bindings/ops.h"

namespace sparse_unified {
namespace {

constexpr int64_t kGrainTokens = 16;
constexpr int64_t kGrainColumns = 64;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route_topk(Tensor x, Tensor gate, int64_t top_k) {
  constexpr const char* kOp = "route_topk";
  const DType dtype = check_router(kOp, x, gate);
  const int64_t num_tokens = x.size(0);
  const int64_t num_experts = gate.size(0);
  check(top_k >= 1 && top_k <= num_experts, kOp, "top_k",
        "be from 1 to the number of experts " + std::to_string(num_experts), top_k);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);

  Tensor gate_t = empty_like_sized(x, {x.size(1), padded_experts(num_experts)}, ScalarType::Float);
  Tensor logits = empty_like_sized(x, {num_tokens, num_experts}, ScalarType::Float);
  Tensor topk_logits = empty_like_sized(x, {num_tokens, top_k}, ScalarType::Float);
  Tensor topk_idx = empty_like_sized(x, {num_tokens, top_k}, ScalarType::Int);
  pack_gate(dtype, gate.const_data_ptr(), gate.stride(0), num_experts, x.size(1),
            static_cast<float*>(gate_t.mutable_data_ptr()));

  RouteTopkParams params{};
  params.dtype = dtype;
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.gate_t = static_cast<const float*>(gate_t.const_data_ptr());
  params.logits = static_cast<float*>(logits.mutable_data_ptr());
  params.topk_logits = static_cast<float*>(topk_logits.mutable_data_ptr());
  params.topk_idx = static_cast<int32_t*>(topk_idx.mutable_data_ptr());
  params.hidden_size = x.size(1);
  params.num_experts = num_experts;
  params.top_k = top_k;
  torch::stable::parallel_for(0, num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
    route_topk_cpu(params, begin, end);
  });
  return {logits, topk_logits, topk_idx};
}

std::tuple<Tensor, Tensor> route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits,
                                               Tensor topk_idx, Tensor x, Tensor gate, bool needs_x,
                                               bool needs_gate) {
  constexpr const char* kOp = "route_topk_backward";
  check_router_gradients(kOp, grad_logits, grad_topk_logits, topk_idx, x, gate);
  const DType dtype = check_float(kOp, "x", x);
  const int64_t num_tokens = x.size(0);
  const int64_t num_experts = gate.size(0);
  const int64_t top_k = topk_idx.size(1);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);
  topk_idx = as_contiguous(topk_idx);
  grad_topk_logits = as_contiguous(grad_topk_logits);
  check_indices(kOp, "topk_idx", topk_idx, num_experts);

  // The selected logits are logits: their gradients add up in one [T, E] matrix.
  Tensor grad = torch::stable::clone(as_contiguous(grad_logits));
  auto* grad_data = static_cast<float*>(grad.mutable_data_ptr());
  const auto* grad_topk = static_cast<const float*>(grad_topk_logits.const_data_ptr());
  const auto* idx = static_cast<const int32_t*>(topk_idx.const_data_ptr());
  for (int64_t slot = 0; slot < num_tokens * top_k; ++slot) {
    grad_data[slot / top_k * num_experts + idx[slot]] += grad_topk[slot];
  }

  Tensor grad_x = empty_like_sized(x, {needs_x ? num_tokens : 0, x.size(1)});
  Tensor grad_gate = empty_like_sized(x, {needs_gate ? num_experts : 0, x.size(1)});
  RouteTopkBackwardParams params{};
  params.dtype = dtype;
  params.grad_logits = grad_data;
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.gate = gate.const_data_ptr();
  params.gate_stride = gate.stride(0);
  params.grad_x = grad_x.mutable_data_ptr();
  params.grad_gate = grad_gate.mutable_data_ptr();
  params.num_tokens = num_tokens;
  params.hidden_size = x.size(1);
  params.num_experts = num_experts;
  if (needs_x) {
    torch::stable::parallel_for(0, num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
      route_topk_backward_x_cpu(params, begin, end);
    });
  }
  if (needs_gate) {
    torch::stable::parallel_for(0, x.size(1), kGrainColumns, [&](int64_t begin, int64_t end) {
      route_topk_backward_gate_cpu(params, begin, end);
    });
  }
  return {grad_x, grad_gate};
}

}  // namespace sparse_unified
