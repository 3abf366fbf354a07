// SPDX-License-Identifier: Apache-2.0
#include "bindings/arguments.h"

#include <limits>
#include <utility>

#include "bindings/context.h"
#include "sparse_unified/pruned_ffn.h"
#include "sparse_unified/route_topk.h"

namespace sparse_unified {
namespace {

constexpr int64_t kBlockMultiple = 16;

// up_proj [I, D] and down_proj [D, I] beside a gate_proj [I, D] that fits x.
void check_other_weights(const char* op, const Tensor& gate_proj, const Tensor& up_proj,
                         const Tensor& down_proj) {
  const Device device = device_of(gate_proj);
  const int64_t width = gate_proj.size(0);
  const int64_t hidden_size = gate_proj.size(1);
  check_tensor(op, "up_proj", up_proj, 2, device);
  check_dtype(op, "up_proj", up_proj, gate_proj.scalar_type());
  check_size(op, "up_proj", up_proj, 0, width, "the width of gate_proj");
  check_size(op, "up_proj", up_proj, 1, hidden_size, "the hidden size of x");
  check_tensor(op, "down_proj", down_proj, 2, device);
  check_dtype(op, "down_proj", down_proj, gate_proj.scalar_type());
  check_size(op, "down_proj", down_proj, 0, hidden_size, "the hidden size of x");
  check_size(op, "down_proj", down_proj, 1, width, "the width of gate_proj");
}

// gate_proj and up_proj [E, h, D], down_proj [E, D, h]; gate_proj has three dimensions.
void check_expert_weights(const char* op, const Tensor& x, int64_t num_experts,
                          const Tensor& gate_proj, const Tensor& up_proj, const Tensor& down_proj) {
  for (const auto& [name, weights] :
       {std::pair{"gate_proj", &gate_proj}, {"up_proj", &up_proj}, {"down_proj", &down_proj}}) {
    const bool is_down = weights == &down_proj;
    check_tensor(op, name, *weights, 3, device_of(x));
    check_dtype(op, name, *weights, x.scalar_type());
    check_size(op, name, *weights, 0, num_experts, "the number of experts");
    check_size(op, name, *weights, is_down ? 2 : 1, gate_proj.size(1), "the width of gate_proj");
    check_size(op, name, *weights, is_down ? 1 : 2, x.size(1), "the hidden size of x");
  }
}

void check_gate(const char* op, const Tensor& x, const Tensor& gate_proj) {
  check_tensor(op, "gate_proj", gate_proj, 2, device_of(x));
  check_dtype(op, "gate_proj", gate_proj, x.scalar_type());
  check_size(op, "gate_proj", gate_proj, 1, x.size(1), "the hidden size of x");
}

std::string legal_block_sizes(int64_t width) {
  std::string text;
  for (int64_t size = kBlockMultiple; size <= kMaxPrunedBlock; size += kBlockMultiple) {
    if (width % size == 0) text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  return text;
}

}  // namespace

void check_router(const char* op, const Tensor& x, const Tensor& gate) {
  const Device device = device_of(x);
  check_tensor(op, "x", x, 2, device);
  check_float(op, "x", x);
  check_tensor(op, "gate", gate, 2, device);
  check_dtype(op, "gate", gate, x.scalar_type());
  check_size(op, "gate", gate, 1, x.size(1), "the hidden size of x");
  check(!runs_on_cuda(x) || gate.size(0) <= kMaxCudaExperts, op, "gate",
        "have at most " + std::to_string(kMaxCudaExperts) + " experts on CUDA", gate.size(0));
}

void check_router_gradients(const char* op, const Tensor& grad_logits,
                            const Tensor& grad_topk_logits, const Tensor& topk_idx, const Tensor& x,
                            const Tensor& gate) {
  const Device device = device_of(x);
  check_tensor(op, "grad_logits", grad_logits, 2, device);
  check_dtype(op, "grad_logits", grad_logits, ScalarType::Float);
  check_tensor(op, "grad_topk_logits", grad_topk_logits, 2, device);
  check_dtype(op, "grad_topk_logits", grad_topk_logits, ScalarType::Float);
  check_tensor(op, "topk_idx", topk_idx, 2, device);
  check_dtype(op, "topk_idx", topk_idx, ScalarType::Int);
  check_router(op, x, gate);
  check_size(op, "grad_logits", grad_logits, 0, x.size(0), "the number of tokens");
  check_size(op, "grad_logits", grad_logits, 1, gate.size(0), "the number of experts");
  check_size(op, "grad_topk_logits", grad_topk_logits, 0, x.size(0), "the number of tokens");
  check_size(op, "grad_topk_logits", grad_topk_logits, 1, topk_idx.size(1), "top_k");
  check_size(op, "topk_idx", topk_idx, 0, x.size(0), "the number of tokens");
}

void check_routing(const char* op, const Tensor& topk_idx, int64_t num_experts) {
  check_tensor(op, "topk_idx", topk_idx, 2, device_of(topk_idx));
  check_dtype(op, "topk_idx", topk_idx, ScalarType::Int);
  check(topk_idx.numel() <= std::numeric_limits<int32_t>::max(), op, "topk_idx",
        "hold at most 2^31 - 1 entries", topk_idx.numel());
  check(num_experts >= 1, op, "num_experts", "be at least 1", num_experts);
  check(num_experts <= std::numeric_limits<int32_t>::max(), op, "num_experts",
        "be at most 2^31 - 1", num_experts);
  check(!runs_on_cuda(topk_idx) || num_experts <= kMaxCudaExperts, op, "num_experts",
        "be at most " + std::to_string(kMaxCudaExperts) + " on CUDA", num_experts);
}

void check_permute(const char* op, const Tensor& x, const Tensor& row_token,
                   const Tensor& token_rows) {
  const Device device = device_of(x);
  check_tensor(op, "x", x, 2, device);
  check_float(op, "x", x);
  check_tensor(op, "row_token", row_token, 1, device);
  check_dtype(op, "row_token", row_token, ScalarType::Int);
  check_tensor(op, "token_rows", token_rows, 2, device);
  check_dtype(op, "token_rows", token_rows, ScalarType::Int);
  check_size(op, "token_rows", token_rows, 0, x.size(0), "the number of tokens");
  check(token_rows.numel() == row_token.size(0), op, "token_rows",
        "hold " + std::to_string(row_token.size(0)) + " indices, one for each row",
        token_rows.numel());
}

void check_combine(const char* op, const Tensor& y, const std::optional<Tensor>& weights,
                   const Tensor& token_rows) {
  const Device device = device_of(y);
  check_tensor(op, "y", y, 2, device);
  check_float(op, "y", y);
  if (weights) {
    check_tensor(op, "weights", *weights, 2, device);
    check_dtype(op, "weights", *weights, ScalarType::Float);
  }
  check_tensor(op, "token_rows", token_rows, 2, device);
  check_dtype(op, "token_rows", token_rows, ScalarType::Int);
  check(token_rows.numel() == y.size(0), op, "token_rows",
        "name each of the " + std::to_string(y.size(0)) + " rows of y once", "shape ",
        shape_text(token_rows));
  if (weights) {
    check(weights->size(0) == token_rows.size(0) && weights->size(1) == token_rows.size(1), op,
          "weights", "have the shape of token_rows " + shape_text(token_rows), "shape ",
          shape_text(*weights));
  }
}

void check_row_weights(const char* op, const Tensor& x, const Tensor& row_token,
                       const Tensor& weights, const Tensor& token_rows) {
  const Device device = device_of(x);
  check_tensor(op, "weights", weights, 2, device);
  check_dtype(op, "weights", weights, ScalarType::Float);
  check_size(op, "weights", weights, 0, x.size(0), "the number of tokens");
  check_tensor(op, "token_rows", token_rows, 2, device);
  check_dtype(op, "token_rows", token_rows, ScalarType::Int);
  check_size(op, "token_rows", token_rows, 0, x.size(0), "the number of tokens");
  check(token_rows.numel() == row_token.size(0), op, "token_rows",
        "name each of the " + std::to_string(row_token.size(0)) + " rows once", "shape ",
        shape_text(token_rows));
  check_size(op, "weights", weights, 1, token_rows.size(1), "the columns of token_rows");
}

GroupedFfnSizes check_grouped_ffn(const char* op, const Tensor& x, const Tensor& row_token,
                                  const Tensor& expert_offsets, const Tensor& gate_proj,
                                  const Tensor& up_proj, const Tensor& down_proj) {
  const Device device = device_of(x);
  GroupedFfnSizes sizes{};
  check_tensor(op, "x", x, 2, device);
  sizes.dtype = check_float(op, "x", x);
  sizes.hidden_size = x.size(1);
  check_tensor(op, "row_token", row_token, 1, device);
  check_dtype(op, "row_token", row_token, ScalarType::Int);
  sizes.num_rows = row_token.size(0);
  check_tensor(op, "expert_offsets", expert_offsets, 1, device);
  check_dtype(op, "expert_offsets", expert_offsets, ScalarType::Int);
  sizes.num_experts = expert_offsets.size(0) - 1;
  check(sizes.num_experts >= 1, op, "expert_offsets", "have at least 2 entries",
        sizes.num_experts + 1);
  if (gate_proj.defined() && gate_proj.dim() == 3) {
    check_expert_weights(op, x, sizes.num_experts, gate_proj, up_proj, down_proj);
    sizes.expert_width = gate_proj.size(1);
    return sizes;
  }
  check_gate(op, x, gate_proj);
  check(gate_proj.size(0) % sizes.num_experts == 0, op, "gate_proj",
        "have rows in equal numbers for " + std::to_string(sizes.num_experts) + " experts",
        "shape ", shape_text(gate_proj));
  sizes.expert_width = gate_proj.size(0) / sizes.num_experts;
  check_other_weights(op, gate_proj, up_proj, down_proj);
  return sizes;
}

PrunedFfnSizes check_pruned_ffn(const char* op, const Tensor& x, const Tensor& kept_blocks,
                                const Tensor& gate_proj, const Tensor& up_proj,
                                const Tensor& down_proj, int64_t block_size) {
  const Device device = device_of(x);
  PrunedFfnSizes sizes{};
  check_tensor(op, "x", x, 2, device);
  sizes.dtype = check_float(op, "x", x);
  check_tensor(op, "kept_blocks", kept_blocks, 1, device);
  check_dtype(op, "kept_blocks", kept_blocks, ScalarType::Int);
  check_gate(op, x, gate_proj);
  sizes.width = gate_proj.size(0);
  check(sizes.width % kBlockMultiple == 0, op, "gate_proj",
        "have a width that is a multiple of " + std::to_string(kBlockMultiple), "shape ",
        shape_text(gate_proj));
  check_other_weights(op, gate_proj, up_proj, down_proj);
  check(block_size >= kBlockMultiple && block_size <= kMaxPrunedBlock &&
            block_size % kBlockMultiple == 0 && sizes.width % block_size == 0,
        op, "block_size",
        "be a multiple of 16 up to 128 that divides the width " + std::to_string(sizes.width) +
            " (" + legal_block_sizes(sizes.width) + ")",
        block_size);
  sizes.num_tokens = x.size(0);
  sizes.hidden_size = x.size(1);
  sizes.num_kept = kept_blocks.size(0);
  sizes.kept_width = sizes.num_kept * block_size;
  return sizes;
}

void check_ffn_gradients(const char* op, const Tensor& x, int64_t num_rows, int64_t width,
                         const Tensor& grad_y, const Tensor& gate_rows, const Tensor& up_rows) {
  const Device device = device_of(x);
  check_tensor(op, "grad_y", grad_y, 2, device);
  check_dtype(op, "grad_y", grad_y, x.scalar_type());
  check_size(op, "grad_y", grad_y, 0, x.size(0), "the number of tokens");
  check_size(op, "grad_y", grad_y, 1, x.size(1), "the hidden size of x");
  for (const auto& [name, rows] : {std::pair{"gate_rows", &gate_rows}, {"up_rows", &up_rows}}) {
    check_tensor(op, name, *rows, 2, device);
    check_dtype(op, name, *rows, x.scalar_type());
    check_size(op, name, *rows, 0, num_rows, "the number of rows");
    check_size(op, name, *rows, 1, width, "the width of the activations");
  }
}

}  // namespace sparse_unified
