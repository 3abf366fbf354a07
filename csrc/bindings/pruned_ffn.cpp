// SPDX-License-Identifier: Apache-2.0
// The FFN over kept width blocks. On the CPU, the kernel of csrc/cpu runs blocks of tokens where it
// is the fastest way (see prefers_ffn_cpu); else, and for few tokens and in training, torch's GEMMs
// run slabs of kept neurons.
#include "bindings/pruned_ffn.h"

#include "bindings/cuda_ffn.h"
#include "bindings/ops.h"
#include "sparse_unified/instruction_set.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified {
namespace {

// Tokens of a task: enough to fill the kernel's panels, few enough to keep threads busy.
constexpr int64_t kMinTaskTokens = 32;
constexpr int64_t kMaxTaskTokens = 512;
// NOTE: which way a call takes depends on T alone, and a token's result not on its task, so results
// are the same for any number of threads. Fewer tokens would leave the kernel's vectors empty.
constexpr int64_t kKernelTokens = 8;

// Leaves the two activations in place; `hidden` [T, J] is where silu(gate) * up goes, and may be
// gate_rows.
Tensor library_forward(const PrunedFfn& ffn, const Activations& activations, const Tensor& hidden) {
  const std::vector<KeptSlab> slabs = ffn.slabs();
  const std::vector<Range> token_parts = split_range(ffn.num_tokens, kGemmTokens);
  const auto num_slabs = static_cast<int64_t>(slabs.size());
  const int64_t num_tasks = static_cast<int64_t>(token_parts.size()) * num_slabs;
  const Range all{0, ffn.hidden_size};
  const Workspace workspace(ffn.x, num_workers(num_tasks), ffn.scratch_bytes(ffn.hidden_size));
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    char* scratch = workspace.get(worker);
    const KeptSlab& slab = slabs[task % num_slabs];
    const Range tokens = token_parts[task / num_slabs];
    const Tensor x = ffn.hidden_view(ffn.x, tokens, all);
    matmul_out(ffn.kept_view(activations.gate_rows, tokens, slab.offset, slab.width), x,
               transposed(ffn.neuron_rows(ffn.gate_proj, slab, all, scratch)));
    matmul_out(ffn.kept_view(activations.up_rows, tokens, slab.offset, slab.width), x,
               transposed(ffn.neuron_rows(ffn.up_proj, slab, all, scratch)));
    for (int64_t token = tokens.begin; token < tokens.begin + tokens.count; ++token) {
      swiglu_cpu({ffn.dtype, ffn.at(activations.gate_rows, token, slab.offset),
                  ffn.at(activations.up_rows, token, slab.offset),
                  ffn.at(hidden, token, slab.offset), slab.width});
    }
  });
  return sum_over_slabs(
      ffn, slabs, 1,
      [&](ProductSum& sum, const KeptSlab& slab, Range tokens, Range outputs, char* scratch) {
        sum.add(ffn.kept_view(hidden, tokens, slab.offset, slab.width),
                transposed(ffn.neuron_columns(ffn.down_proj, slab, outputs, scratch)));
      });
}

// How many tasks of equal size keep `num_threads` threads busy.
int64_t count_tasks(int64_t num_tokens, int64_t num_threads) {
  const int64_t round_tokens = kMaxTaskTokens * num_threads;
  const int64_t rounds = (num_tokens + round_tokens - 1) / round_tokens;
  return std::clamp<int64_t>(rounds * num_threads, 1,
                             std::max<int64_t>(num_tokens / kMinTaskTokens, 1));
}

Tensor kernel_forward(const PrunedFfn& ffn) {
  Tensor y = empty_like_sized(ffn.x, {ffn.num_tokens, ffn.hidden_size});
  const PrunedFfnParams params{.dtype = ffn.dtype,
                               .x = matrix_of(ffn.x),
                               .gate_proj = matrix_of(ffn.gate_proj),
                               .up_proj = matrix_of(ffn.up_proj),
                               .down_proj = matrix_of(ffn.down_proj),
                               .kept_blocks = ffn.kept_blocks.const_data_ptr<int32_t>(),
                               .num_kept = ffn.num_kept,
                               .block_size = ffn.block_size,
                               .y = y.mutable_data_ptr()};
  const int64_t num_tasks = count_tasks(ffn.num_tokens, torch::stable::get_num_threads());
  const Workspace workspace(ffn.x, num_workers(num_tasks),
                            4 * pruned_ffn_workspace_floats(ffn.dtype, ffn.hidden_size));
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    pruned_ffn_cpu(params, ffn.num_tokens * task / num_tasks,
                   ffn.num_tokens * (task + 1) / num_tasks, workspace.floats(worker));
  });
  return y;
}

}  // namespace

Tensor pruned_ffn(Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
                  int64_t block_size) {
  constexpr const char* kOp = "pruned_ffn";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::pruned(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size)
          .forward();
    }
  }
  const PrunedFfn ffn(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size);
  if (ffn.num_kept > 0 && ffn.num_tokens >= kKernelTokens && prefers_ffn_cpu(ffn.dtype)) {
    return kernel_forward(ffn);
  }
  const Activations activations = empty_activations(ffn);
  return library_forward(ffn, activations, activations.gate_rows);
}

std::tuple<Tensor, Tensor, Tensor> pruned_ffn_train(Tensor x, Tensor kept_blocks, Tensor gate_proj,
                                                    Tensor up_proj, Tensor down_proj,
                                                    int64_t block_size) {
  constexpr const char* kOp = "pruned_ffn_train";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      return CudaFfn::pruned(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size)
          .train();
    }
  }
  const PrunedFfn ffn(kOp, x, kept_blocks, gate_proj, up_proj, down_proj, block_size);
  const Activations activations = empty_activations(ffn);
  const Tensor hidden = empty_like_sized(ffn.x, {ffn.num_tokens, ffn.kept_width});
  Tensor y = library_forward(ffn, activations, hidden);
  return {y, activations.gate_rows, activations.up_rows};
}

}  // namespace sparse_unified
