// SPDX-License-Identifier: Apache-2.0
// grouped_ffn on CUDA, the host side: what the kernels take, where their intermediate rows lie, and
// the launches in order.
#include "sparse_unified/cuda/grouped_ffn.h"

#include <cstdlib>
#include <utility>

#include "cuda/grouped_ffn_row_weights.h"
#include "cuda/grouped_ffn_sm80.h"
#include "cuda/grouped_ffn_sm90a.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified {
namespace {

constexpr int64_t kWorkspaceAlignment = 256;

std::string override_text() {
  const char* text = std::getenv(kGroupedFfnOverrideVariable);
  return text == nullptr ? "" : text;
}

int64_t num_groups(const GroupedFfnCudaParams& params) {
  return params.expert_offsets == nullptr ? 1 : params.num_experts;
}

GroupedFfnProblem problem_of(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                             bool is_backward) {
  return {.dtype = params.dtype,
          .num_rows = params.num_rows,
          .hidden_size = params.x.columns,
          .num_experts = num_groups(params),
          .expert_width = params.expert_width,
          .block_size = params.blocks.kept_blocks == nullptr ? 0 : params.blocks.block_size,
          .is_backward = is_backward,
          .has_sm90a_code = device.compute_capability == 90 && grouped_ffn_sm90a_is_compiled(),
          .down_rows = params.spacing.down_rows};
}

// Of one intermediate matrix, [rows, h] elements of 16 bits; the kernels for Hopper pad the rows.
int64_t matrix_bytes(const GroupedFfnCudaParams& params, GroupedFfnFamily family) {
  const int64_t num_rows = family == GroupedFfnFamily::kSm90a
                               ? grouped_ffn_sm90a_padded_rows(params.num_rows, num_groups(params))
                               : params.num_rows;
  const int64_t bytes = 2 * num_rows * params.expert_width;
  return ceil_div(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Neurons that grad_hidden sums up to one part of the gradient of a row's weight.
int64_t part_neurons(GroupedFfnFamily family) {
  return family == GroupedFfnFamily::kSm90a ? kSm90aPartNeurons : kSm80PartNeurons;
}

// The weights of the rows, [R] fp32, and the parts of their gradients, [parts, R].
int64_t num_parts(const GroupedFfnCudaParams& params, GroupedFfnFamily family) {
  return ceil_div(params.expert_width, part_neurons(family));
}
int64_t row_bytes(const GroupedFfnCudaParams& params) {
  return ceil_div<int64_t>(4 * params.num_rows, kWorkspaceAlignment) * kWorkspaceAlignment;
}

std::string must(const char* argument, const char* rule, int64_t got) {
  return std::string(argument) + " must " + rule + ", got " + std::to_string(got);
}

std::string blocks_refusal(const GroupedFfnCudaParams& params) {
  const WidthBlocks& blocks = params.blocks;
  if (blocks.kept_blocks == nullptr) return "";
  if (blocks.block_size <= 0 || blocks.block_size % 16 != 0) {
    return must("block_size", "be a multiple of 16", blocks.block_size);
  }
  if (params.num_experts * params.expert_width != blocks.num_kept * blocks.block_size) {
    return must("expert_width", "share the kept blocks out equally", params.expert_width);
  }
  return "";
}

// Kernels count rows, columns and neurons in 32 bits; offsets have 64.
std::string size_refusal(const GroupedFfnCudaParams& params) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  for (const auto& [name, size] : {std::pair{"the number of tokens", params.x.rows},
                                   {"the number of rows", params.num_rows},
                                   {"hidden_size", params.x.columns},
                                   {"the width of the weights", params.gate_proj.rows},
                                   {"the rows of down_proj", params.down_proj.rows}}) {
    if (size >= kLimit) return must(name, "be below 2^30", size);
  }
  return "";
}

std::string layout_refusal(const GroupedFfnCudaParams& params) {
  for (const auto& [name, matrix] : {std::pair{"x", params.x},
                                     {"gate_proj", params.gate_proj},
                                     {"up_proj", params.up_proj},
                                     {"down_proj", params.down_proj}}) {
    if (!is_aligned(matrix.data))
      return std::string(name) + " must start at a multiple of 16 bytes";
    if (matrix.stride % kChunkElements != 0) {
      return must(name, "have rows a multiple of 8 elements apart", matrix.stride);
    }
  }
  for (const void* pointer : {params.gate_rows, params.up_rows, params.y}) {
    if (!is_aligned(pointer)) return "the output rows must start at a multiple of 16 bytes";
  }
  return "";
}

std::string config_refusal(const GroupedFfnProblem& problem, const DeviceInfo& device,
                           const GroupedFfnConfig& config) {
  if (config.family == GroupedFfnFamily::kSm90a) {
    return grouped_ffn_sm90a_refusal(problem, device, config.sm90a);
  }
  for (const GroupedFfnTileId id : config.tiles) {
    if (grouped_ffn_tile(id).shared_bytes() > device.shared_bytes_block) {
      return must("shared memory of a block", "hold a tile of every kernel",
                  device.shared_bytes_block);
    }
  }
  return "";
}

cudaError_t forward_sm80(const GroupedFfnForwardKernelParams& params,
                         const GroupedFfnConfig& config, cudaStream_t stream) {
  const cudaError_t error = grouped_ffn_up_sm80(config.tile(GroupedFfnPhase::kUp), params, stream);
  if (error != cudaSuccess) return error;
  return grouped_ffn_down_sm80(config.tile(GroupedFfnPhase::kDown), params, stream);
}

// NOTE: the gradients of the rows come last, since they may take the place of grad_y.
cudaError_t backward_sm80(const GroupedFfnBackwardKernelParams& params,
                          const GroupedFfnConfig& config, cudaStream_t stream) {
  const GroupedFfnBackwardCudaParams& ffn = params.ffn;
  cudaError_t error =
      grouped_ffn_grad_hidden_sm80(config.tile(GroupedFfnPhase::kGradHidden), params, stream);
  if (error != cudaSuccess) return error;
  const GroupedFfnTileId tile = config.tile(GroupedFfnPhase::kGradWeights);
  if (ffn.grad_gate_proj != nullptr || ffn.grad_up_proj != nullptr) {
    error = grouped_ffn_grad_weights_sm80(tile, {params, false}, stream);
    if (error != cudaSuccess) return error;
  }
  if (ffn.grad_down_proj != nullptr) {
    error = grouped_ffn_grad_weights_sm80(tile, {params, true}, stream);
    if (error != cudaSuccess) return error;
  }
  if (ffn.grad_rows == nullptr) return cudaSuccess;
  return grouped_ffn_grad_rows_sm80(config.tile(GroupedFfnPhase::kGradRows), params, stream);
}

// Intermediate matrices of the backward pass, [padded rows, h] each.
struct Sm90aWorkspace {
  void* grad_gate;
  void* grad_up;
  void* hidden;  // null when grad_down_proj is not wanted
};

cudaError_t backward_sm90a(const GroupedFfnBackwardCudaParams& params, const DeviceInfo& device,
                           const GroupedFfnSm90aOptions& options, const Sm90aWorkspace& workspace,
                           const RowFactors& factors, cudaStream_t stream) {
  cudaError_t error =
      grouped_ffn_grad_hidden_sm90a(params, device, options, workspace.grad_gate, workspace.grad_up,
                                    workspace.hidden, factors, stream);
  if (error != cudaSuccess) return error;
  error = grouped_ffn_grad_weights_sm90a(params, device, options, workspace.grad_gate,
                                         workspace.grad_up, workspace.hidden, stream);
  if (error != cudaSuccess || params.grad_rows == nullptr) return error;
  return grouped_ffn_grad_rows_sm90a(params, device, options, workspace.grad_gate,
                                     workspace.grad_up, stream);
}

std::string params_refusal(const GroupedFfnCudaParams& params, const DeviceInfo& device) {
  if (params.dtype != DType::kBFloat16 && params.dtype != DType::kFloat16) {
    return "x must be bfloat16 or float16";
  }
  if (device.compute_capability < 80) {
    return must("the device", "have compute capability 80 or more", device.compute_capability);
  }
  if (params.x.columns % kChunkElements != 0) {
    return must("hidden_size", "be a multiple of 8", params.x.columns);
  }
  if (params.expert_width % kChunkElements != 0) {
    return must("expert_width", "be a multiple of 8", params.expert_width);
  }
  for (const auto rule : {size_refusal, blocks_refusal, layout_refusal}) {
    const std::string reason = rule(params);
    if (!reason.empty()) return reason;
  }
  return "";
}

}  // namespace

GroupedFfnCudaPlan plan_grouped_ffn_cuda(const GroupedFfnCudaParams& params,
                                         const DeviceInfo& device, bool is_backward) {
  GroupedFfnCudaPlan plan{.refusal = params_refusal(params, device),
                          .config = {},
                          .matrix_bytes = 0,
                          .weights_bytes = 0};
  const std::string text = override_text();
  if (plan.refusal.empty()) plan.refusal = grouped_ffn_override_error(text);
  if (!plan.refusal.empty()) return plan;
  const GroupedFfnProblem problem = problem_of(params, device, is_backward);
  // A rule gives way to what the process asks for, and where its kernels do not take the problem.
  const std::string stored = grouped_ffn_rules_for(problem, device);
  plan.config = choose_grouped_ffn_config(
      problem, device, stored + (stored.empty() || text.empty() ? "" : ",") + text);
  plan.refusal = config_refusal(problem, device, plan.config);
  if (!plan.refusal.empty() && !stored.empty()) {
    plan.config = choose_grouped_ffn_config(problem, device, text);
    plan.refusal = config_refusal(problem, device, plan.config);
  }
  plan.matrix_bytes = matrix_bytes(params, plan.config.family);
  plan.weights_bytes = (1 + num_parts(params, plan.config.family)) * row_bytes(params);
  return plan;
}

cudaError_t grouped_ffn_cuda(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                             const GroupedFfnCudaPlan& plan, void* workspace, cudaStream_t stream) {
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  const GroupedFfnForwardKernelParams kernel_params{params, workspace};
  const GroupedFfnConfig& config = plan.config;
  if (config.family == GroupedFfnFamily::kSm90a) {
    const cudaError_t error = grouped_ffn_up_sm90a(params, device, config.sm90a, workspace, stream);
    if (error != cudaSuccess) return error;
    return grouped_ffn_down_sm90a(params, device, config.sm90a, workspace, stream);
  }
  return forward_sm80(kernel_params, config, stream);
}

cudaError_t grouped_ffn_backward_cuda(const GroupedFfnBackwardCudaParams& params,
                                      const DeviceInfo& device, const GroupedFfnCudaPlan& plan,
                                      void* workspace, cudaStream_t stream) {
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  const int64_t one_matrix = plan.matrix_bytes;
  auto* bytes = static_cast<unsigned char*>(workspace);
  void* hidden = params.grad_down_proj == nullptr ? nullptr : bytes + 2 * one_matrix;
  const RowWeights& weights = params.weights;
  const int64_t num_rows = params.forward.num_rows;
  RowFactors factors{};
  if (weights.weights != nullptr) {
    unsigned char* floats = bytes + (hidden == nullptr ? 2 : 3) * one_matrix;
    factors.weights = reinterpret_cast<float*>(floats);
    if (weights.grad_weights != nullptr) {
      factors.parts = reinterpret_cast<float*>(floats + row_bytes(params.forward));
    }
    const cudaError_t error =
        spread_row_weights(weights, num_rows, reinterpret_cast<float*>(floats), stream);
    if (error != cudaSuccess) return error;
  }
  const GroupedFfnConfig& config = plan.config;
  const bool is_sm90a = config.family == GroupedFfnFamily::kSm90a;
  const cudaError_t error =
      is_sm90a ? backward_sm90a(params, device, config.sm90a, {bytes, bytes + one_matrix, hidden},
                                factors, stream)
               : backward_sm80({params, bytes, hidden, factors}, config, stream);
  if (error != cudaSuccess || factors.parts == nullptr) return error;
  return sum_row_parts(weights, num_rows, factors.parts, num_parts(params.forward, config.family),
                       stream);
}

}  // namespace sparse_unified
