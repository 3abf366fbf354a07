// SPDX-License-Identifier: Apache-2.0
// Schemas, once, and the functions behind them, which serve the CPU and CUDA. Fakes and autograd
// are registered in Python. In the emulator the CUDA kernels take the place of the CPU's, so that
// tests reach them through the same ops.
#include "bindings/ops.h"

#if !defined(SPARSE_UNIFIED_EMULATION)

STABLE_TORCH_LIBRARY(sparse_unified, m) {
  m.def("route_topk(Tensor x, Tensor gate, int top_k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits, Tensor topk_idx, Tensor x, "
      "Tensor gate, bool needs_x, bool needs_gate) -> (Tensor, Tensor)");
  m.def("sort_by_expert(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("permute(Tensor x, Tensor row_token, Tensor token_rows) -> Tensor");
  m.def("combine(Tensor y, Tensor? weights, Tensor token_rows) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_out, Tensor y, Tensor weights, Tensor token_rows, "
      "bool needs_y, bool needs_weights) -> (Tensor, Tensor)");
  m.def(
      "grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
      "Tensor up_proj, Tensor down_proj, Tensor? token_rows=None) -> Tensor");
  m.def(
      "grouped_ffn_train(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
      "Tensor up_proj, Tensor down_proj, Tensor? token_rows=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
      "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj) -> Tensor");
  m.def(
      "grouped_ffn_backward(Tensor grad_y, Tensor x, Tensor row_token, Tensor expert_offsets, "
      "Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, "
      "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pruned_ffn(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
      "Tensor down_proj, int block_size) -> Tensor");
  m.def(
      "pruned_ffn_train(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, "
      "Tensor down_proj, int block_size) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pruned_ffn_backward(Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, "
      "Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, int block_size, "
      "bool needs_x, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ffn_importance(Tensor x, Tensor gate_proj, Tensor up_proj, float threshold=0., "
      "Tensor? token_weights=None) -> (Tensor, Tensor, Tensor)");
}

#endif

namespace sparse_unified {
namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("route_topk", TORCH_BOX(&route_topk));
  m.impl("route_topk_backward", TORCH_BOX(&route_topk_backward));
  m.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
  m.impl("grouped_ffn", TORCH_BOX(&grouped_ffn));
  m.impl("grouped_ffn_train", TORCH_BOX(&grouped_ffn_train));
  m.impl("grouped_ffn_combine", TORCH_BOX(&grouped_ffn_combine));
  m.impl("grouped_ffn_backward", TORCH_BOX(&grouped_ffn_backward));
  m.impl("pruned_ffn", TORCH_BOX(&pruned_ffn));
  m.impl("pruned_ffn_train", TORCH_BOX(&pruned_ffn_train));
  m.impl("pruned_ffn_backward", TORCH_BOX(&pruned_ffn_backward));
}

}  // namespace
}  // namespace sparse_unified

STABLE_TORCH_LIBRARY_IMPL(sparse_unified, CPU, m) {
  sparse_unified::implement(m);
#if !defined(SPARSE_UNIFIED_EMULATION)
  m.impl("ffn_importance", TORCH_BOX(&sparse_unified::ffn_importance));
#endif
}

#if defined(SPARSE_UNIFIED_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sparse_unified, CUDA, m) { sparse_unified::implement(m); }
#endif
