// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/route_topk.h"

#include "bindings/arguments.h"
#include "bindings/context.h"
#include "bindings/ops.h"

namespace sparse_unified {
namespace {

constexpr int64_t kGrainTokens = 16;
constexpr int64_t kGrainColumns = 64;

// The selected logits are logits: their gradients add up in one [T, E] matrix.
Tensor add_topk(const Tensor& grad_logits, const Tensor& grad_topk_logits, const Tensor& topk_idx) {
  Tensor sum = contiguous_copy(grad_logits);
  auto* data = sum.mutable_data_ptr<float>();
  const auto* grad_topk = grad_topk_logits.const_data_ptr<float>();
  const auto* idx = topk_idx.const_data_ptr<int32_t>();
  const int64_t num_experts = grad_logits.size(1);
  for (int64_t slot = 0, top_k = topk_idx.size(1); slot < topk_idx.numel(); ++slot) {
    data[slot / top_k * num_experts + idx[slot]] += grad_topk[slot];
  }
  return sum;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> route_topk(Tensor x, Tensor gate, int64_t top_k) {
  constexpr const char* kOp = "route_topk";
  check_router(kOp, x, gate);
  const int64_t num_tokens = x.size(0);
  const int64_t num_experts = gate.size(0);
  check(top_k >= 1 && top_k <= num_experts, kOp, "top_k",
        "be from 1 to the number of experts " + std::to_string(num_experts), top_k);
  const Context context(kOp, x);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);

  Tensor logits = empty_like_sized(x, {num_tokens, num_experts}, ScalarType::Float);
  Tensor topk_logits = empty_like_sized(x, {num_tokens, top_k}, ScalarType::Float);
  Tensor topk_idx = empty_like_sized(x, {num_tokens, top_k}, ScalarType::Int);
  RouteTopkParams params{.dtype = dtype_of(x),
                         .x = matrix_of(x),
                         .gate = matrix_of(gate),
                         .logits = logits.mutable_data_ptr<float>(),
                         .topk_logits = topk_logits.mutable_data_ptr<float>(),
                         .topk_idx = topk_idx.mutable_data_ptr<int32_t>(),
                         .top_k = top_k};
  if (!context.launch([&](cudaStream_t stream) { return route_topk_cuda(params, stream); })) {
    Tensor gate_t =
        empty_like_sized(x, {x.size(1), padded_experts(num_experts)}, ScalarType::Float);
    pack_gate(params.dtype, params.gate, gate_t.mutable_data_ptr<float>());
    params.gate_t = gate_t.const_data_ptr<float>();
    torch::stable::parallel_for(0, num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
      route_topk_cpu(params, begin, end);
    });
  }
  return {logits, topk_logits, topk_idx};
}

std::tuple<Tensor, Tensor> route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits,
                                               Tensor topk_idx, Tensor x, Tensor gate, bool needs_x,
                                               bool needs_gate) {
  constexpr const char* kOp = "route_topk_backward";
  check_router_gradients(kOp, grad_logits, grad_topk_logits, topk_idx, x, gate);
  const Context context(kOp, x);
  x = with_dense_rows(x);
  gate = with_dense_rows(gate);
  topk_idx = own_indices(topk_idx);
  grad_topk_logits = as_contiguous(grad_topk_logits);
  if (context.is_cuda()) {
    grad_logits = as_contiguous(grad_logits);
  } else {
    check_indices(kOp, "topk_idx", topk_idx, gate.size(0));
    grad_logits = add_topk(grad_logits, grad_topk_logits, topk_idx);
  }

  Tensor grad_x = empty_like_sized(x, {needs_x ? x.size(0) : 0, x.size(1)});
  Tensor grad_gate = empty_like_sized(x, {needs_gate ? gate.size(0) : 0, x.size(1)});
  const RouteTopkBackwardParams params{
      .dtype = dtype_of(x),
      .grad_logits = grad_logits.const_data_ptr<float>(),
      .grad_topk_logits = grad_topk_logits.const_data_ptr<float>(),
      .topk_idx = topk_idx.const_data_ptr<int32_t>(),
      .x = matrix_of(x),
      .gate = matrix_of(gate),
      .grad_x = needs_x ? grad_x.mutable_data_ptr() : nullptr,
      .grad_gate = needs_gate ? grad_gate.mutable_data_ptr() : nullptr,
      .top_k = topk_idx.size(1)};
  const bool is_done = context.launch([&](cudaStream_t stream) {
    Tensor workspace = context.workspace(route_topk_backward_cuda_workspace_bytes(params));
    return route_topk_backward_cuda(params, workspace.mutable_data_ptr(), stream);
  });
  if (!is_done && needs_x) {
    torch::stable::parallel_for(0, x.size(0), kGrainTokens, [&](int64_t begin, int64_t end) {
      route_topk_backward_x_cpu(params, begin, end);
    });
  }
  if (!is_done && needs_gate) {
    torch::stable::parallel_for(0, x.size(1), kGrainColumns, [&](int64_t begin, int64_t end) {
      route_topk_backward_gate_cpu(params, begin, end);
    });
  }
  return {grad_x, grad_gate};
}

}  // namespace sparse_unified
