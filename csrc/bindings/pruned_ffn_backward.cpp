// SPDX-License-Identifier: Apache-2.0
// Backward of the FFN over kept width blocks. Frozen weights skip three of the six
// GEMMs.
#include <utility>

#include "bindings/cuda_ffn.h"
#include "bindings/ops.h"
#include "bindings/pruned_ffn.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

struct WeightGradients {
  Tensor gate_proj;  // [I, D]
  Tensor up_proj;    // [I, D]
  Tensor down_proj;  // [D, I]
};

// One task per slab, since a weight gradient sums over all tokens: gradients of the activations
// [T, J] into `grads`, and of the weights that are kept, unless they are frozen.
void slab_gradients(const PrunedFfn& ffn, const std::vector<KeptSlab>& slabs, const Tensor& grad_y,
                    const Activations& activations, const Activations& grads,
                    const WeightGradients* weights) {
  const Range tokens{0, ffn.num_tokens};
  const Range all{0, ffn.hidden_size};
  const auto num_slabs = static_cast<int64_t>(slabs.size());
  const int64_t weight_bytes = ffn.scratch_bytes(ffn.hidden_size);
  const int64_t hidden_bytes = weights != nullptr ? ffn.scratch_bytes(ffn.num_tokens) : 0;
  const Workspace workspace(ffn.x, num_workers(num_slabs), weight_bytes + hidden_bytes);
  const Tensor grad_y_t = transposed(ffn.hidden_view(grad_y, tokens, all));
  const Tensor x = ffn.hidden_view(ffn.x, tokens, all);
  parallel_tasks(num_slabs, [&](int64_t task, int64_t worker) {
    const KeptSlab& slab = slabs[task];
    char* scratch = workspace.get(worker);
    char* hidden = scratch + weight_bytes;  // [T, n]
    const int64_t n = slab.width;
    // The gradient of hidden lies where that of gate will replace it.
    matmul_out(ffn.kept_view(grads.gate_rows, tokens, slab.offset, n),
               ffn.hidden_view(grad_y, tokens, all),
               ffn.neuron_columns(ffn.down_proj, slab, all, scratch));
    for (int64_t token = 0; token < ffn.num_tokens; ++token) {
      swiglu_backward_cpu(
          {.dtype = ffn.dtype,
           .grad_hidden = ffn.at(grads.gate_rows, token, slab.offset),
           .gate = ffn.at(activations.gate_rows, token, slab.offset),
           .up = ffn.at(activations.up_rows, token, slab.offset),
           .hidden = weights != nullptr ? hidden + token * n * element_bytes(ffn.dtype) : nullptr,
           .grad_gate = ffn.at(grads.gate_rows, token, slab.offset),
           .grad_up = ffn.at(grads.up_rows, token, slab.offset),
           .num_values = n});
    }
    if (weights == nullptr) return;
    const Tensor grad_gate = ffn.kept_view(grads.gate_rows, tokens, slab.offset, n);
    const Tensor grad_up = ffn.kept_view(grads.up_rows, tokens, slab.offset, n);
    // The scratch is that of the gathered weights, which have served.
    for (const auto& [weight, grad] :
         {std::pair{weights->gate_proj, grad_gate}, std::pair{weights->up_proj, grad_up}}) {
      matmul_out(matrix_view(scratch, ffn.scalar_type, n, ffn.hidden_size, ffn.hidden_size),
                 transposed(grad), x);
      ffn.scatter_rows(scratch, weight, slab);
    }
    matmul_out(matrix_view(scratch, ffn.scalar_type, ffn.hidden_size, n, n), grad_y_t,
               matrix_view(hidden, ffn.scalar_type, ffn.num_tokens, n, n));
    ffn.scatter_columns(scratch, weights->down_proj, slab);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> pruned_ffn_backward(
    Tensor grad_y, Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
    Tensor gate_rows, Tensor up_rows, int64_t block_size, bool needs_x, bool needs_weights) {
  constexpr const char* kOp = "pruned_ffn_backward";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::pruned(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size)
          .backward(grad_y, gate_rows, up_rows, needs_x, needs_weights);
    }
  }
  const PrunedFfn ffn(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size);
  check_ffn_gradients(kOp, x, ffn.num_tokens, ffn.kept_width, grad_y, gate_rows, up_rows);
  gate_rows = as_contiguous(gate_rows);
  up_rows = as_contiguous(up_rows);
  grad_y = with_dense_rows(grad_y);

  const std::vector<KeptSlab> slabs = ffn.slabs();
  const Activations grads = empty_activations(ffn);
  const int64_t width = needs_weights ? ffn.width : 0;
  Tensor grad_gate = zeros_like_sized(ffn.x, {width, ffn.hidden_size});
  Tensor grad_up = zeros_like_sized(ffn.x, {width, ffn.hidden_size});
  Tensor grad_down = zeros_like_sized(ffn.x, {needs_weights ? ffn.hidden_size : 0, ffn.width});
  if (ffn.num_tokens > 0) {
    const WeightGradients weights{grad_gate, grad_up, grad_down};
    slab_gradients(ffn, slabs, grad_y, {gate_rows, up_rows}, grads,
                   needs_weights ? &weights : nullptr);
  }
  Tensor grad_x = empty_like_sized(ffn.x, {0, ffn.hidden_size});
  if (!needs_x) return {grad_x, grad_gate, grad_up, grad_down};
  grad_x = sum_over_slabs(
      ffn, slabs, 2,
      [&](ProductSum& sum, const KeptSlab& slab, Range tokens, Range columns, char* scratch) {
        sum.add(ffn.kept_view(grads.gate_rows, tokens, slab.offset, slab.width),
                ffn.neuron_rows(ffn.gate_proj, slab, columns, scratch));
        sum.add(ffn.kept_view(grads.up_rows, tokens, slab.offset, slab.width),
                ffn.neuron_rows(ffn.up_proj, slab, columns, scratch));
      });
  return {grad_x, grad_gate, grad_up, grad_down};
}

}  // namespace sparse_unified
