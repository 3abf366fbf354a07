// SPDX-License-Identifier: Apache-2.0
// Forward of the expert FFN. On the CPU, the rows of an expert are cut into tasks that threads take
// without waiting for each other. The fused kernel of csrc/cpu runs them where it is the fastest
// way (see prefers_ffn_cpu); else, for the few rows of a decoding step and in training, torch's
// GEMMs do, on gathered rows.
#include "bindings/grouped_ffn.h"

#include "bindings/cuda_ffn.h"
#include "bindings/ops.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/accumulate.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

// NOTE: constants like kLibraryTaskRows, for the same reason.
constexpr int64_t kKernelTaskRows = 512;
constexpr int64_t kKernelRowMultiple = 32;
// Below this many rows the kernel's vectors of 16 tokens would be mostly empty.
constexpr int64_t kKernelLeastRows = 8;

// Runs tasks on torch's GEMMs; with `kept` the two activations before SwiGLU are left in it.
class LibraryPath {
 public:
  LibraryPath(const GroupedFfn& ffn, const Tensor& y, const KeptActivations* kept,
              int64_t num_workers, int64_t max_rows)
      : ffn_(ffn),
        y_(y),
        kept_(kept),
        x_bytes_(ffn.matrix_bytes(max_rows, ffn.hidden_size)),
        h_bytes_(ffn.matrix_bytes(max_rows, ffn.expert_width)),
        workspace_(ffn.x, num_workers, x_bytes_ + 2 * h_bytes_) {}

  void run(const ExpertRows& rows, int64_t worker) const {
    const int64_t n = rows.count();
    const int64_t h = ffn_.expert_width;
    const int64_t hidden_size = ffn_.hidden_size;
    char* x_rows = workspace_.get(worker);
    char* hidden = x_rows + x_bytes_;
    void* gate = kept_ ? ffn_.row(kept_->gate_rows, rows.begin, h) : hidden;
    void* up = kept_ ? ffn_.row(kept_->up_rows, rows.begin, h) : hidden + h_bytes_;

    ffn_.gather(rows, x_rows);
    const Tensor x = ffn_.matrix(x_rows, n, hidden_size);
    matmul_out(ffn_.matrix(gate, n, h), x,
               transposed(ffn_.expert_rows(ffn_.gate_proj, rows.expert)));
    matmul_out(ffn_.matrix(up, n, h), x, transposed(ffn_.expert_rows(ffn_.up_proj, rows.expert)));
    swiglu_cpu(SwigluParams{ffn_.dtype, gate, up, hidden, n * h});
    matmul_out(ffn_.matrix(ffn_.row(y_, rows.begin, hidden_size), n, hidden_size),
               ffn_.matrix(hidden, n, h),
               transposed(ffn_.expert_columns(ffn_.down_proj, rows.expert)));
  }

 private:
  const GroupedFfn& ffn_;
  const Tensor& y_;
  const KeptActivations* kept_;
  int64_t x_bytes_;
  int64_t h_bytes_;
  Workspace workspace_;
};

Tensor library_forward(const GroupedFfn& ffn, const KeptActivations* kept) {
  Tensor y = empty_like_sized(ffn.x, {ffn.num_rows, ffn.hidden_size});
  const std::vector<ExpertRows> tasks = ffn.split(kLibraryTaskRows);
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const LibraryPath path(ffn, y, kept, num_workers(num_tasks), kLibraryTaskRows);
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) { path.run(tasks[task], worker); });
  return y;
}

Tensor kernel_forward(const GroupedFfn& ffn) {
  Tensor y = empty_like_sized(ffn.x, {ffn.num_rows, ffn.hidden_size});
  const std::vector<ExpertRows> tasks = ffn.split(kKernelTaskRows, kKernelRowMultiple);
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t workers = num_workers(num_tasks);
  const int64_t kernel_floats = grouped_ffn_workspace_floats(ffn.hidden_size, ffn.expert_width);
  const bool is_fp32 = ffn.dtype == DType::kFloat32;
  const int64_t sum_floats = is_fp32 ? 0 : kKernelTaskRows * ffn.hidden_size;
  const Workspace workspace(ffn.x, workers, 4 * (kernel_floats + sum_floats));
  const LibraryPath library(ffn, y, nullptr, workers, kKernelLeastRows);
  const GroupedFfnParams params = ffn.kernel_params();
  const auto* row_token = ffn.row_token.const_data_ptr<int32_t>();
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    const ExpertRows& rows = tasks[task];
    if (rows.count() < kKernelLeastRows) return library.run(rows, worker);
    GroupedFfnRows kernel_rows{};
    kernel_rows.expert = rows.expert;
    kernel_rows.count = rows.count();
    kernel_rows.row_token = row_token + rows.begin;
    void* out = ffn.row(y, rows.begin, ffn.hidden_size);
    float* floats = workspace.floats(worker);
    kernel_rows.out = is_fp32 ? static_cast<float*>(out) : floats + kernel_floats;
    grouped_ffn_cpu(params, kernel_rows, floats);
    if (!is_fp32) round_cpu({ffn.dtype, kernel_rows.out, out, rows.count() * ffn.hidden_size});
  });
  return y;
}

}  // namespace

Tensor grouped_ffn_forward(const GroupedFfn& ffn) {
  return ffn.has_kernel() ? kernel_forward(ffn) : library_forward(ffn, nullptr);
}

Tensor grouped_ffn_forward(const GroupedFfn& ffn, const KeptActivations& kept) {
  return library_forward(ffn, &kept);
}

Tensor grouped_ffn(Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
                   Tensor up_proj, Tensor down_proj) {
  constexpr const char* kOp = "grouped_ffn";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::grouped(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj)
          .forward();
    }
  }
  return grouped_ffn_forward(
      GroupedFfn(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj));
}

}  // namespace sparse_unified
