// SPDX-License-Identifier: Apache-2.0
// Schemas, once, and the functions behind them, which serve the CPU and CUDA. Fakes and autograd
// are registered in Python. In the emulator the CUDA kernels take the place of the CPU's, so that
// tests reach them through the same ops.
#include <algorithm>
#include <new>
#include <utility>

#include "bindings/ops.h"

#if !defined(SPARSE_UNIFIED_EMULATION)

STABLE_TORCH_LIBRARY(sparse_unified, m) {
  m.def("route_topk(Tensor x, Tensor gate, int top_k) -> (Tensor, Tensor, Tensor)");
  m.def(
      "route_topk_backward(Tensor grad_logits, Tensor grad_topk_logits, Tensor topk_idx, Tensor x, "
      "Tensor gate, bool needs_x, bool needs_gate) -> (Tensor, Tensor)");
  m.def("sort_by_expert(Tensor topk_idx, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("permute(Tensor x, Tensor row_token, Tensor token_rows) -> Tensor");
  m.def("combine(Tensor y, Tensor? weights, Tensor token_rows, float weight_offset=0.) -> Tensor");
  m.def(
      "grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj, "
      "Tensor up_proj, Tensor down_proj) -> Tensor");
  m.def(
      "grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
      "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
      "float weight_offset=0.) -> Tensor");
  m.def(
      "grouped_ffn_combine_train(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, "
      "Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
      "float weight_offset=0.) -> (Tensor, Tensor, Tensor)");
  m.def(
      "grouped_ffn_combine_backward(Tensor grad_y, Tensor x, Tensor weights, Tensor row_token, "
      "Tensor token_rows, Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, "
      "Tensor down_proj, Tensor gate_rows, Tensor up_rows, float weight_offset, bool needs_x, "
      "bool needs_weights, bool needs_experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
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

template <size_t kSize>
struct Name {
  constexpr Name(const char (&text)[kSize]) { std::copy_n(text, kSize, chars); }
  char chars[kSize];
};

// An op that says which one it is when memory runs out.
template <Name kName, auto kFunction>
struct Op;

template <Name kName, typename Result, typename... Argument, Result (*kFunction)(Argument...)>
struct Op<kName, kFunction> {
  static Result run(Argument... arguments) {
    try {
      return kFunction(std::move(arguments)...);
    } catch (const OutOfMemory& error) {
      fail(kName.chars, "arguments", "leave enough memory", "no room for ", error.what());
    } catch (const std::bad_alloc&) {
      fail(kName.chars, "arguments", "leave enough memory", "no room for working memory");
    }
  }
};

#define SPARSE_UNIFIED_OP(op) m.impl(#op, TORCH_BOX((&Op<#op, &op>::run)))

void implement(torch::stable::detail::StableLibrary& m) {
  SPARSE_UNIFIED_OP(route_topk);
  SPARSE_UNIFIED_OP(route_topk_backward);
  SPARSE_UNIFIED_OP(sort_by_expert);
  SPARSE_UNIFIED_OP(permute);
  SPARSE_UNIFIED_OP(combine);
  SPARSE_UNIFIED_OP(grouped_ffn);
  SPARSE_UNIFIED_OP(grouped_ffn_combine);
  SPARSE_UNIFIED_OP(grouped_ffn_combine_train);
  SPARSE_UNIFIED_OP(grouped_ffn_combine_backward);
  SPARSE_UNIFIED_OP(pruned_ffn);
  SPARSE_UNIFIED_OP(pruned_ffn_train);
  SPARSE_UNIFIED_OP(pruned_ffn_backward);
}

#if !defined(SPARSE_UNIFIED_EMULATION)
void implement_cpu(torch::stable::detail::StableLibrary& m) { SPARSE_UNIFIED_OP(ffn_importance); }
#endif

}  // namespace
}  // namespace sparse_unified

STABLE_TORCH_LIBRARY_IMPL(sparse_unified, CPU, m) {
  sparse_unified::implement(m);
#if !defined(SPARSE_UNIFIED_EMULATION)
  sparse_unified::implement_cpu(m);
#endif
}

#if defined(SPARSE_UNIFIED_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(sparse_unified, CUDA, m) { sparse_unified::implement(m); }
#endif
