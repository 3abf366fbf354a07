// SPDX-License-Identifier: Apache-2.0
// grouped_ffn and combine: on CUDA and in training one after the other, else in one pass over
// blocks of tokens. A block runs all experts on its own tokens and adds their weighted rows to its
// own part of the output, in the order of the experts: y [R, D] never exists (59 MB for 1024 tokens
// at 32/16, mostly page faults), all blocks cost the same whatever the routing, and no thread waits
// for another.
#include <algorithm>
#include <cstring>

#include "bindings/cuda_ffn.h"
#include "bindings/grouped_ffn.h"
#include "bindings/ops.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/accumulate.h"

namespace sparse_unified {
namespace {

// Tokens of a block: enough to fill the kernel's vectors of 16 tokens per expert, few enough for
// their part of the output to stay near.
constexpr int64_t kMinBlockTokens = 32;
constexpr int64_t kMaxBlockTokens = 512;
// NOTE: which way a call takes depends on T alone, and a token's result not on its block, so
// results are the same for any number of threads.
constexpr int64_t kLeastTokens = 128;

// How many blocks of equal size keep `num_threads` threads busy.
int64_t count_blocks(int64_t num_tokens, int64_t num_threads) {
  const int64_t round_tokens = kMaxBlockTokens * num_threads;
  const int64_t rounds = (num_tokens + round_tokens - 1) / round_tokens;
  return std::clamp<int64_t>(rounds * num_threads, 1, num_tokens / kMinBlockTokens);
}

// Rows of an expert must be in the order of their tokens, for a block's rows to be adjacent.
void check_row_order(const char* op, const GroupedFfn& ffn) {
  const auto* offsets = ffn.expert_offsets.const_data_ptr<int32_t>();
  const auto* row_token = ffn.row_token.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert < ffn.num_experts; ++expert) {
    for (int64_t row = offsets[expert] + 1; row < offsets[expert + 1]; ++row) {
      if (row_token[row - 1] > row_token[row]) {
        fail(op, "row_token", "not decrease within an expert, as sort_by_expert leaves it",
             row_token[row], " after ", row_token[row - 1], " at row ", row);
      }
    }
  }
}

class TokenBlocks {
 public:
  TokenBlocks(const CombinedFfn& ffn, const Tensor& sums, const Tensor& out)
      : ffn_(ffn),
        params_(ffn.kernel_params()),
        offsets_(ffn.expert_offsets.const_data_ptr<int32_t>()),
        row_token_(ffn.row_token.const_data_ptr<int32_t>()),
        row_weights_(empty_like_sized(ffn.weights, {ffn.num_rows})),
        sums_(sums.mutable_data_ptr<float>()),
        out_(static_cast<char*>(out.mutable_data_ptr())) {}

  void run(int64_t token_begin, int64_t token_end, float* workspace) const {
    auto* row_weights = row_weights_.mutable_data_ptr<float>();
    ffn_.spread_weights(token_begin, token_end, row_weights);
    const int64_t first_value = token_begin * ffn_.hidden_size;
    const int64_t num_values = (token_end - token_begin) * ffn_.hidden_size;
    std::memset(sums_ + first_value, 0, static_cast<size_t>(num_values) * sizeof(float));
    for (int64_t expert = 0; expert < ffn_.num_experts; ++expert) {
      const int32_t* first = row_token_ + offsets_[expert];
      const int32_t* last = row_token_ + offsets_[expert + 1];
      const int32_t* begin = std::lower_bound(first, last, token_begin);
      const int32_t* end = std::lower_bound(begin, last, token_end);
      GroupedFfnRows rows{};
      rows.expert = expert;
      rows.count = end - begin;
      rows.row_token = begin;
      rows.out = sums_;
      rows.target = begin;
      rows.weights = row_weights + (begin - row_token_);
      grouped_ffn_cpu(params_, rows, workspace);
    }
    if (ffn_.dtype != DType::kFloat32) {
      char* out = out_ + first_value * element_bytes(ffn_.dtype);
      round_cpu({ffn_.dtype, sums_ + first_value, out, num_values});
    }
  }

 private:
  const CombinedFfn& ffn_;
  GroupedFfnParams params_;
  const int32_t* offsets_;
  const int32_t* row_token_;
  Tensor row_weights_;  // [R]
  float* sums_;         // [T, D]; for fp32 it is out
  char* out_;           // [T, D]
};

// y [T, D] by the fused kernel.
Tensor kernel_forward(const CombinedFfn& ffn) {
  const int64_t num_tokens = ffn.x.size(0);
  Tensor out = empty_like_sized(ffn.x, {num_tokens, ffn.hidden_size});
  const Tensor sums = ffn.dtype == DType::kFloat32
                          ? out
                          : empty_like_sized(ffn.weights, {num_tokens, ffn.hidden_size});
  const TokenBlocks blocks(ffn, sums, out);
  const int64_t num_blocks = count_blocks(num_tokens, torch::stable::get_num_threads());
  const Workspace workspace(ffn.x, num_workers(num_blocks),
                            4 * grouped_ffn_workspace_floats(ffn.hidden_size, ffn.expert_width));
  parallel_tasks(num_blocks, [&](int64_t block, int64_t worker) {
    blocks.run(num_tokens * block / num_blocks, num_tokens * (block + 1) / num_blocks,
               workspace.floats(worker));
  });
  return out;
}

}  // namespace

CombinedFfn::CombinedFfn(const char* op, Tensor x_in, Tensor weights_in, Tensor row_token_in,
                         Tensor token_rows_in, Tensor expert_offsets_in, Tensor gate_proj_in,
                         Tensor up_proj_in, Tensor down_proj_in, double offset)
    : GroupedFfn(op, x_in, row_token_in, expert_offsets_in, gate_proj_in, up_proj_in, down_proj_in),
      weight_offset(static_cast<float>(offset)) {
  check_row_weights(op, x, row_token, weights_in, token_rows_in);
  weights = as_contiguous(weights_in);
  token_rows = own_indices(token_rows_in);
  check_row_maps(op, row_token, token_rows, x.size(0));
  check_row_order(op, *this);
}

void CombinedFfn::spread_weights(int64_t begin, int64_t end, float* row_weights) const {
  const auto* rows = token_rows.const_data_ptr<int32_t>();
  const auto* values = weights.const_data_ptr<float>();
  const int64_t top_k = token_rows.size(1);
  for (int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
    row_weights[rows[slot]] = weight_offset + values[slot];
  }
}

Tensor grouped_ffn_combine(Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
                           Tensor expert_offsets, Tensor gate_proj, Tensor up_proj,
                           Tensor down_proj, double weight_offset) {
  constexpr const char* kOp = "grouped_ffn_combine";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      const auto ffn =
          CudaFfn::grouped(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
      check_row_weights(kOp, x, row_token, weights, token_rows);
      return combine(ffn.forward(), weights, token_rows, weight_offset);
    }
  }
  const CombinedFfn ffn(kOp, x, weights, row_token, token_rows, expert_offsets, gate_proj, up_proj,
                        down_proj, weight_offset);
  if (!ffn.has_kernel() || x.size(0) < kLeastTokens) {
    return combine(grouped_ffn_forward(ffn), ffn.weights, ffn.token_rows, weight_offset);
  }
  return kernel_forward(ffn);
}

std::tuple<Tensor, Tensor, Tensor> grouped_ffn_combine_train(
    Tensor x, Tensor weights, Tensor row_token, Tensor token_rows, Tensor expert_offsets,
    Tensor gate_proj, Tensor up_proj, Tensor down_proj, double weight_offset) {
  constexpr const char* kOp = "grouped_ffn_combine_train";
  if constexpr (kHasCuda) {
    if (runs_on_cuda(x)) {
      const auto ffn =
          CudaFfn::grouped(kOp, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
      check_row_weights(kOp, x, row_token, weights, token_rows);
      const auto [y, gate_rows, up_rows] = ffn.train();
      return {combine(y, weights, token_rows, weight_offset), gate_rows, up_rows};
    }
  }
  const CombinedFfn ffn(kOp, x, weights, row_token, token_rows, expert_offsets, gate_proj, up_proj,
                        down_proj, weight_offset);
  const KeptActivations kept{empty_like_sized(ffn.x, {ffn.num_rows, ffn.expert_width}),
                             empty_like_sized(ffn.x, {ffn.num_rows, ffn.expert_width})};
  Tensor y = combine(grouped_ffn_forward(ffn, kept), ffn.weights, ffn.token_rows, weight_offset);
  return {y, kept.gate_rows, kept.up_rows};
}

}  // namespace sparse_unified
