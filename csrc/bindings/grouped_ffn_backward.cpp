// SPDX-License-Identifier: Apache-2.0
// Backward of the expert FFN: on the CPU, one task per expert, since a weight gradient sums over
// all rows of its expert. Frozen experts skip three of the six GEMMs.
#include "bindings/cuda_ffn.h"
#include "bindings/grouped_ffn.h"
#include "bindings/ops.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

struct Gradients {
  Tensor rows;       // [R, D]
  Tensor gate_proj;  // [E * h, D]
  Tensor up_proj;    // [E * h, D]
  Tensor down_proj;  // [D, E * h]
};

// Where one worker keeps the matrices of one expert.
struct ExpertBuffers {
  char* grad_hidden;  // [n, h]
  char* grad_gate;    // [n, h]
  char* grad_up;      // [n, h]
  char* hidden;       // [n, h]
  char* x_rows;       // [n, D]
};

// Gradients of gate and up (and the hidden activations where weights need them) from grad_y.
void activation_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const Tensor& grad_y,
                          const Tensor& gate_rows, const Tensor& up_rows, bool needs_hidden,
                          const ExpertBuffers& buffers) {
  const int64_t n = rows.count();
  const int64_t h = ffn.expert_width;
  const Tensor grad = ffn.matrix(ffn.row(grad_y, rows.begin, ffn.hidden_size), n, ffn.hidden_size);
  matmul_out(ffn.matrix(buffers.grad_hidden, n, h), grad,
             ffn.expert_columns(ffn.down_proj, rows.expert));
  swiglu_backward_cpu({.dtype = ffn.dtype,
                       .grad_hidden = buffers.grad_hidden,
                       .gate = ffn.row(gate_rows, rows.begin, h),
                       .up = ffn.row(up_rows, rows.begin, h),
                       .hidden = needs_hidden ? buffers.hidden : nullptr,
                       .grad_gate = buffers.grad_gate,
                       .grad_up = buffers.grad_up,
                       .num_values = n * h});
}

void weight_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const Tensor& grad_y,
                      const ExpertBuffers& buffers, const Gradients& grads) {
  const int64_t n = rows.count();
  const int64_t h = ffn.expert_width;
  ffn.gather(rows, buffers.x_rows);
  const Tensor x = ffn.matrix(buffers.x_rows, n, ffn.hidden_size);
  matmul_out(ffn.expert_rows(grads.gate_proj, rows.expert),
             transposed(ffn.matrix(buffers.grad_gate, n, h)), x);
  matmul_out(ffn.expert_rows(grads.up_proj, rows.expert),
             transposed(ffn.matrix(buffers.grad_up, n, h)), x);
  void* grad = ffn.row(grad_y, rows.begin, ffn.hidden_size);
  matmul_out(ffn.expert_columns(grads.down_proj, rows.expert),
             transposed(ffn.matrix(grad, n, ffn.hidden_size)), ffn.matrix(buffers.hidden, n, h));
}

void row_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const ExpertBuffers& buffers,
                   const Tensor& grad_rows) {
  const int64_t n = rows.count();
  const int64_t h = ffn.expert_width;
  const Tensor grad =
      ffn.matrix(ffn.row(grad_rows, rows.begin, ffn.hidden_size), n, ffn.hidden_size);
  matmul_out(grad, ffn.matrix(buffers.grad_gate, n, h),
             ffn.expert_rows(ffn.gate_proj, rows.expert));
  matmul_add(grad, ffn.matrix(buffers.grad_up, n, h), ffn.expert_rows(ffn.up_proj, rows.expert));
}

// Experts without a row take no part in the loop above: their weight gradients are zero.
void zero_idle_experts(const GroupedFfn& ffn, const Gradients& grads) {
  const auto* offsets = ffn.expert_offsets.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert < ffn.num_experts; ++expert) {
    if (offsets[expert] != offsets[expert + 1]) continue;
    Tensor gate = ffn.expert_rows(grads.gate_proj, expert);
    Tensor up = ffn.expert_rows(grads.up_proj, expert);
    Tensor down = ffn.expert_columns(grads.down_proj, expert);
    torch::stable::zero_(gate);
    torch::stable::zero_(up);
    torch::stable::zero_(down);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_ffn_backward(
    Tensor grad_y, Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
    Tensor up_proj, Tensor down_proj, Tensor gate_rows, Tensor up_rows, bool needs_x,
    bool needs_weights) {
  constexpr const char* kOp = "grouped_ffn_backward";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::grouped(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj)
          .backward(grad_y, gate_rows, up_rows, needs_x, needs_weights);
    }
  }
  const GroupedFfn ffn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  const int64_t h = ffn.expert_width;
  check_ffn_gradients(kOp, x, ffn.num_rows, h, grad_y, gate_rows, up_rows);
  grad_y = as_contiguous(grad_y);
  gate_rows = as_contiguous(gate_rows);
  up_rows = as_contiguous(up_rows);

  const auto like = [&](const Tensor& weights) {
    return weights_gradient(weights, needs_weights, empty_like_sized);
  };
  const Gradients grads{empty_like_sized(ffn.x, {needs_x ? ffn.num_rows : 0, ffn.hidden_size}),
                        like(ffn.gate_proj), like(ffn.up_proj), like(ffn.down_proj)};
  if (needs_weights) zero_idle_experts(ffn, grads);

  const std::vector<ExpertRows> tasks = ffn.split(ffn.num_rows + 1);
  int64_t max_rows = 0;
  for (const ExpertRows& rows : tasks) max_rows = std::max(max_rows, rows.count());
  const int64_t h_bytes = ffn.matrix_bytes(max_rows, h);
  const int64_t x_bytes = needs_weights ? ffn.matrix_bytes(max_rows, ffn.hidden_size) : 0;
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const Workspace workspace(ffn.x, num_workers(num_tasks), 4 * h_bytes + x_bytes);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const ExpertRows& rows = tasks[task];
    char* base = workspace.get(worker);
    const ExpertBuffers buffers{base, base + h_bytes, base + 2 * h_bytes, base + 3 * h_bytes,
                                base + 4 * h_bytes};
    activation_gradients(ffn, rows, grad_y, gate_rows, up_rows, needs_weights, buffers);
    if (needs_weights) weight_gradients(ffn, rows, grad_y, buffers, grads);
    if (needs_x) row_gradients(ffn, rows, buffers, grads.rows);
  });
  return {grads.rows, grads.gate_proj, grads.up_proj, grads.down_proj};
}

}  // namespace sparse_unified
