// SPDX-License-Identifier: Apache-2.0
// grouped_ffn and pruned_ffn on CUDA, which share their kernels: pruned_ffn is one group of all
// tokens, with the kept blocks in place of an expert's neurons.
#pragma once

#include <tuple>

#include "bindings/context.h"
#include "sparse_unified/cuda/grouped_ffn.h"

namespace sparse_unified {

class CudaFfn {
 public:
  // Checks the arguments in order; `op` names the caller in the messages.
  static CudaFfn grouped(const char* op, const Tensor& x, const Tensor& row_token,
                         const Tensor& expert_offsets, const Tensor& gate_proj,
                         const Tensor& up_proj, const Tensor& down_proj);
  static CudaFfn pruned(const char* op, const Tensor& x, const Tensor& kept_blocks,
                        const Tensor& gate_proj, const Tensor& up_proj, const Tensor& down_proj,
                        int64_t block_size);

  // -> y [R, D]
  Tensor forward() const { return forward(nullptr, nullptr); }
  // -> y [R, D], gate_rows [R, h], up_rows [R, h]
  std::tuple<Tensor, Tensor, Tensor> train() const;
  // -> grad_x [T, D], gradients of gate_proj, up_proj and down_proj; of pruned_ffn
  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor gate_rows,
                                                      Tensor up_rows, bool needs_x,
                                                      bool needs_weights) const;
  // -> grad_x [T, D], grad_weights [T, K], then as above; of grouped_ffn_combine
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> combine_backward(
      Tensor grad_y, Tensor weights, Tensor token_rows, double weight_offset, Tensor gate_rows,
      Tensor up_rows, bool needs_x, bool needs_weights, bool needs_experts) const;

 private:
  CudaFfn(const char* op, const Tensor& x, const Tensor& gate_proj, const Tensor& up_proj,
          const Tensor& down_proj);
  Tensor forward(void* gate_rows, void* up_rows) const;
  // Into grad_rows unless it is null -> the gradients of the three weights.
  std::tuple<Tensor, Tensor, Tensor> run_backward(const RowWeights& weights, const Tensor& grad_y,
                                                  const Tensor& gate_rows, const Tensor& up_rows,
                                                  void* grad_rows, bool needs_experts) const;
  GroupedFfnCudaPlan plan_for(bool is_backward) const;  // throws where none is possible

  const char* op_;
  Context context_;
  Tensor x_;           // [T, D]
  Tensor gate_proj_;   // [I, D]
  Tensor up_proj_;     // [I, D]
  Tensor down_proj_;   // [D, I]
  Tensor indices_[2];  // row_token and expert_offsets, or kept_blocks
  GroupedFfnCudaParams params_;
};

}  // namespace sparse_unified
