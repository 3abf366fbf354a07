// SPDX-License-Identifier: Apache-2.0
// Backward of grouped_ffn_combine. Of size [R, D] nothing comes from forward: the gradient of a
// row's weight, <grad_y of its token, y of the row>, is made of the kept activations. On the CPU
// one task per expert, since a weight gradient sums over all rows of its expert; y of its rows is
// multiplied once more, so that the gradient has the bits of one from a y that was kept. Frozen
// experts skip three of the seven GEMMs, a frozen router one.
#include "bindings/cuda_ffn.h"
#include "bindings/grouped_ffn.h"
#include "bindings/ops.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/combine.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

// Without rows where not wanted.
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
  char* grad_y;       // [n, D]
  char* x_rows;       // [n, D], or [kLibraryTaskRows, D] of y
};

// What backward is given besides the arguments of forward.
struct Given {
  Tensor grad_y;       // [T, D]
  Tensor gate_rows;    // [R, h]
  Tensor up_rows;      // [R, h]
  Tensor row_weights;  // [R]
};

// Gradients of gate and up, and hidden where it is needed, from the weighted grad_y of the rows.
void activation_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const Given& given,
                          bool needs_hidden, const ExpertBuffers& buffers) {
  const int64_t n = rows.count();
  const int64_t h = ffn.expert_width;
  combine_backward_cpu({.dtype = ffn.dtype,
                        .grad_out = matrix_of(given.grad_y),
                        .row_token = ffn.row_token.const_data_ptr<int32_t>() + rows.begin,
                        .weights = given.row_weights.const_data_ptr<float>() + rows.begin,
                        .grad_y = buffers.grad_y,
                        .y = nullptr,
                        .grad_weights = nullptr,
                        .num_rows = n});
  matmul_out(ffn.matrix(buffers.grad_hidden, n, h), ffn.matrix(buffers.grad_y, n, ffn.hidden_size),
             ffn.expert_columns(ffn.down_proj, rows.expert));
  swiglu_backward_cpu({.dtype = ffn.dtype,
                       .grad_hidden = buffers.grad_hidden,
                       .gate = ffn.row(given.gate_rows, rows.begin, h),
                       .up = ffn.row(given.up_rows, rows.begin, h),
                       .hidden = needs_hidden ? buffers.hidden : nullptr,
                       .grad_gate = buffers.grad_gate,
                       .grad_up = buffers.grad_up,
                       .num_values = n * h});
}

// Gradients [n] of the weights of the rows [rows.begin, rows.end), a part of those that `hidden`
// starts with.
void row_weight_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const Given& given,
                          char* hidden, char* y, float* grads) {
  const int64_t n = rows.count();
  matmul_out(ffn.matrix(y, n, ffn.hidden_size), ffn.matrix(hidden, n, ffn.expert_width),
             transposed(ffn.expert_columns(ffn.down_proj, rows.expert)));
  combine_backward_cpu({.dtype = ffn.dtype,
                        .grad_out = matrix_of(given.grad_y),
                        .row_token = ffn.row_token.const_data_ptr<int32_t>() + rows.begin,
                        .weights = nullptr,
                        .grad_y = nullptr,
                        .y = y,
                        .grad_weights = grads + rows.begin,
                        .num_rows = n});
}

void weight_gradients(const GroupedFfn& ffn, const ExpertRows& rows, const ExpertBuffers& buffers,
                      const Gradients& grads) {
  const int64_t n = rows.count();
  const int64_t h = ffn.expert_width;
  ffn.gather(rows, buffers.x_rows);
  const Tensor x = ffn.matrix(buffers.x_rows, n, ffn.hidden_size);
  matmul_out(ffn.expert_rows(grads.gate_proj, rows.expert),
             transposed(ffn.matrix(buffers.grad_gate, n, h)), x);
  matmul_out(ffn.expert_rows(grads.up_proj, rows.expert),
             transposed(ffn.matrix(buffers.grad_up, n, h)), x);
  matmul_out(ffn.expert_columns(grads.down_proj, rows.expert),
             transposed(ffn.matrix(buffers.grad_y, n, ffn.hidden_size)),
             ffn.matrix(buffers.hidden, n, h));
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

// [T, K] from values of the rows [R].
Tensor by_slot(const CombinedFfn& ffn, const Tensor& row_values) {
  Tensor out = empty_like_sized(ffn.weights, {ffn.weights.size(0), ffn.weights.size(1)});
  const auto* rows = ffn.token_rows.const_data_ptr<int32_t>();
  const auto* values = row_values.const_data_ptr<float>();
  auto* slots = out.mutable_data_ptr<float>();
  for (int64_t slot = 0; slot < ffn.num_rows; ++slot) slots[slot] = values[rows[slot]];
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grouped_ffn_combine_backward(
    Tensor grad_y, Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
    Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor gate_rows,
    Tensor up_rows, double weight_offset, bool needs_x, bool needs_weights, bool needs_experts) {
  constexpr const char* kOp = "grouped_ffn_combine_backward";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::grouped(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj)
          .combine_backward(grad_y, weights, token_rows, weight_offset, gate_rows, up_rows, needs_x,
                            needs_weights, needs_experts);
    }
  }
  const CombinedFfn ffn(kOp, x, weights, row_token, token_rows, expert_offsets, gate_proj, up_proj,
                        down_proj, weight_offset);
  const int64_t h = ffn.expert_width;
  check_ffn_gradients(kOp, x, ffn.num_rows, h, grad_y, gate_rows, up_rows);
  const Given given{with_dense_rows(grad_y), as_contiguous(gate_rows), as_contiguous(up_rows),
                    empty_like_sized(ffn.weights, {ffn.num_rows})};
  ffn.spread_weights(0, x.size(0), given.row_weights.mutable_data_ptr<float>());

  const auto like = [&](const Tensor& weight) {
    return weights_gradient(weight, needs_experts, empty_like_sized);
  };
  const Gradients grads{empty_like_sized(ffn.x, {needs_x ? ffn.num_rows : 0, ffn.hidden_size}),
                        like(ffn.gate_proj), like(ffn.up_proj), like(ffn.down_proj)};
  if (needs_experts) zero_idle_experts(ffn, grads);
  const Tensor row_grads = empty_like_sized(ffn.weights, {needs_weights ? ffn.num_rows : 0});

  const std::vector<ExpertRows> tasks = ffn.split(ffn.num_rows + 1);
  const std::vector<ExpertRows> parts = ffn.split(kLibraryTaskRows);  // as forward multiplied them
  int64_t max_rows = 0;
  for (const ExpertRows& rows : tasks) max_rows = std::max(max_rows, rows.count());
  const int64_t h_bytes = ffn.matrix_bytes(max_rows, h);
  const int64_t y_bytes = ffn.matrix_bytes(max_rows, ffn.hidden_size);
  const int64_t x_bytes = needs_experts   ? y_bytes
                          : needs_weights ? ffn.matrix_bytes(kLibraryTaskRows, ffn.hidden_size)
                                          : 0;
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const Workspace workspace(ffn.x, num_workers(num_tasks), 4 * h_bytes + y_bytes + x_bytes);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const ExpertRows& rows = tasks[task];
    char* base = workspace.get(worker);
    const ExpertBuffers buffers{base,
                                base + h_bytes,
                                base + 2 * h_bytes,
                                base + 3 * h_bytes,
                                base + 4 * h_bytes,
                                base + 4 * h_bytes + y_bytes};
    activation_gradients(ffn, rows, given, needs_experts || needs_weights, buffers);
    for (const ExpertRows& part : parts) {
      if (!needs_weights || part.expert != rows.expert) continue;
      char* hidden = buffers.hidden + (part.begin - rows.begin) * h * element_bytes(ffn.dtype);
      row_weight_gradients(ffn, part, given, hidden, buffers.x_rows,
                           row_grads.mutable_data_ptr<float>());
    }
    if (needs_experts) weight_gradients(ffn, rows, buffers, grads);
    if (needs_x) row_gradients(ffn, rows, buffers, grads.rows);
  });
  return {needs_x ? combine(grads.rows, std::nullopt, ffn.token_rows, 0) : grads.rows,
          needs_weights ? by_slot(ffn, row_grads)
                        : empty_like_sized(ffn.weights, {0, ffn.weights.size(1)}),
          grads.gate_proj, grads.up_proj, grads.down_proj};
}

}  // namespace sparse_unified
