// SPDX-License-Identifier: Apache-2.0
// Forward of the expert FFN on the CPU. The rows of an expert are cut into tasks; a task gathers
// its rows, runs torch's GEMMs single-threaded on data that stays in its core's cache, and writes
// its rows of y. Threads never wait for each other inside the block.
#include "bindings/grouped_ffn.h"

#include "bindings/ops.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

// NOTE: a constant, not a function of the thread count, so that results do not depend on it.
constexpr int64_t kMaxTaskRows = 256;

struct Activations {
  Tensor gate_rows;  // [R, h]
  Tensor up_rows;    // [R, h]
};

// y [R, D]; with `kept` the two activations before SwiGLU are left in it.
Tensor forward(const GroupedFfn& ffn, const Activations* kept) {
  const int64_t h = ffn.expert_width;
  const int64_t hidden_size = ffn.hidden_size;
  const int64_t x_bytes = ffn.matrix_bytes(kMaxTaskRows, hidden_size);
  const int64_t h_bytes = ffn.matrix_bytes(kMaxTaskRows, h);
  const std::vector<ExpertRows> tasks = ffn.split(kMaxTaskRows);
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const Workspace workspace(ffn.x, num_workers(num_tasks), x_bytes + 2 * h_bytes);
  Tensor y = empty_like_sized(ffn.x, {ffn.num_rows, hidden_size});

  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const ExpertRows& rows = tasks[task];
    const int64_t n = rows.count();
    char* x_rows = workspace.get(worker);
    char* hidden = x_rows + x_bytes;
    void* gate = kept ? ffn.row(kept->gate_rows, rows.begin, h) : hidden;
    void* up = kept ? ffn.row(kept->up_rows, rows.begin, h) : hidden + h_bytes;

    ffn.gather(rows, x_rows);
    const Tensor x = ffn.matrix(x_rows, n, hidden_size);
    matmul_out(ffn.matrix(gate, n, h), x, ffn.expert_rows_t(ffn.gate_proj, rows.expert));
    matmul_out(ffn.matrix(up, n, h), x, ffn.expert_rows_t(ffn.up_proj, rows.expert));
    swiglu_cpu(SwigluParams{ffn.dtype, gate, up, hidden, n * h});
    matmul_out(ffn.matrix(ffn.row(y, rows.begin, hidden_size), n, hidden_size),
               ffn.matrix(hidden, n, h), ffn.expert_columns_t(ffn.down_proj, rows.expert));
  });
  return y;
}

}  // namespace

Tensor grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
                   Tensor up_proj, Tensor down_proj, std::optional<Tensor>) {
  const GroupedFfn ffn("grouped_ffn", x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  return forward(ffn, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> grouped_ffn_train(Tensor x, Tensor row_token,
                                                     Tensor expert_offsets, Tensor gate_proj,
                                                     Tensor up_proj, Tensor down_proj,
                                                     std::optional<Tensor>) {
  const GroupedFfn ffn("grouped_ffn_train", x, row_token, expert_offsets, gate_proj, up_proj,
                       down_proj);
  const Activations kept{empty_like_sized(ffn.x, {ffn.num_rows, ffn.expert_width}),
                         empty_like_sized(ffn.x, {ffn.num_rows, ffn.expert_width})};
  Tensor y = forward(ffn, &kept);
  return {y, kept.gate_rows, kept.up_rows};
}

}  // namespace sparse_unified
