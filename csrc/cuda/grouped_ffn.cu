// SPDX-License-Identifier: Apache-2.0
// grouped_ffn on CUDA, the host side: what the kernels take, where their intermediate rows lie, and
// the launches in order.
#include "sparse_unified/cuda/grouped_ffn.h"

#include <cstdlib>

#include "cuda/grouped_ffn_sm80.cuh"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified {
namespace {

constexpr int64_t kWorkspaceAlignment = 256;

// Of `columns` elements of 16 bits a row.
int64_t matrix_bytes(const GroupedFfnCudaParams& params, int64_t columns) {
  return ceil_div(2 * params.num_rows * columns, kWorkspaceAlignment) * kWorkspaceAlignment;
}

std::string override_text() {
  const char* text = std::getenv(kGroupedFfnOverrideVariable);
  return text == nullptr ? "" : text;
}

GroupedFfnConfig choose_config(const GroupedFfnCudaParams& params, const DeviceInfo& device) {
  const GroupedFfnProblem problem{params.dtype, params.num_rows, params.hidden_size,
                                  params.expert_offsets == nullptr ? 1 : params.num_experts,
                                  params.expert_width};
  return choose_grouped_ffn_config(problem, device, override_text());
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
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
  const WidthBlocks& blocks = params.blocks;
  const int64_t width = blocks.kept_blocks == nullptr ? params.num_experts * params.expert_width
                                                      : blocks.num_blocks * blocks.block_size;
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"the number of tokens", params.num_tokens},
               {"the number of rows", params.num_rows},
               {"hidden_size", params.hidden_size},
               {"the width of the weights", width}};
  for (const auto& size : sizes) {
    if (size.value >= kLimit) return must(size.name, "be below 2^30", size.value);
  }
  return "";
}

std::string layout_refusal(const GroupedFfnCudaParams& params) {
  const struct {
    const char* name;
    const void* pointer;
    int64_t stride;
  } matrices[] = {{"x", params.x, params.x_stride},
                  {"gate_proj", params.gate_proj, params.gate_stride},
                  {"up_proj", params.up_proj, params.up_stride},
                  {"down_proj", params.down_proj, params.down_stride}};
  for (const auto& matrix : matrices) {
    if (!is_aligned(matrix.pointer)) {
      return std::string(matrix.name) + " must start at a multiple of 16 bytes";
    }
    if (matrix.stride % kChunkElements != 0) {
      return must(matrix.name, "have rows a multiple of 8 elements apart", matrix.stride);
    }
  }
  for (const void* pointer : {params.gate_rows, params.up_rows, params.y}) {
    if (!is_aligned(pointer)) return "the output rows must start at a multiple of 16 bytes";
  }
  return "";
}

std::string config_refusal(const GroupedFfnCudaParams& params, const DeviceInfo& device) {
  const std::string error = grouped_ffn_override_error(override_text());
  if (!error.empty()) return error;
  const GroupedFfnConfig config = choose_config(params, device);
  for (const GroupedFfnTileId id : config.tiles) {
    if (grouped_ffn_tile(id).shared_bytes() > device.shared_bytes_block) {
      return must("shared memory of a block", "hold a tile of every kernel",
                  device.shared_bytes_block);
    }
  }
  return "";
}

template <typename T>
cudaError_t forward(const GroupedFfnForwardKernelParams& params, const GroupedFfnConfig& config,
                    cudaStream_t stream) {
  const cudaError_t error =
      grouped_ffn_up_sm80<T>(config.tile(GroupedFfnPhase::kUp), params, stream);
  if (error != cudaSuccess) return error;
  return grouped_ffn_down_sm80<T>(config.tile(GroupedFfnPhase::kDown), params, stream);
}

template <typename T>
cudaError_t backward(const GroupedFfnBackwardKernelParams& params, const GroupedFfnConfig& config,
                     cudaStream_t stream) {
  const GroupedFfnBackwardCudaParams& ffn = params.ffn;
  cudaError_t error =
      grouped_ffn_grad_hidden_sm80<T>(config.tile(GroupedFfnPhase::kGradHidden), params, stream);
  if (error != cudaSuccess) return error;
  if (ffn.grad_rows != nullptr) {
    error = grouped_ffn_grad_rows_sm80<T>(config.tile(GroupedFfnPhase::kGradRows), params, stream);
    if (error != cudaSuccess) return error;
  }
  const GroupedFfnTileId tile = config.tile(GroupedFfnPhase::kGradWeights);
  if (ffn.grad_gate_proj != nullptr || ffn.grad_up_proj != nullptr) {
    error = grouped_ffn_grad_weights_sm80<T>(tile, {params, false}, stream);
    if (error != cudaSuccess) return error;
  }
  if (ffn.grad_down_proj != nullptr) {
    error = grouped_ffn_grad_weights_sm80<T>(tile, {params, true}, stream);
  }
  return error;
}

}  // namespace

std::string grouped_ffn_cuda_refusal(const GroupedFfnCudaParams& params, const DeviceInfo& device) {
  if (params.dtype != DType::kBFloat16 && params.dtype != DType::kFloat16) {
    return "x must be bfloat16 or float16";
  }
  if (device.compute_capability < 80) {
    return must("the device", "have compute capability 80 or more", device.compute_capability);
  }
  if (params.hidden_size % kChunkElements != 0) {
    return must("hidden_size", "be a multiple of 8", params.hidden_size);
  }
  if (params.expert_width % kChunkElements != 0) {
    return must("expert_width", "be a multiple of 8", params.expert_width);
  }
  for (const auto refusal : {size_refusal, blocks_refusal, layout_refusal}) {
    const std::string reason = refusal(params);
    if (!reason.empty()) return reason;
  }
  return config_refusal(params, device);
}

int64_t grouped_ffn_cuda_workspace_bytes(const GroupedFfnCudaParams& params, const DeviceInfo&) {
  return matrix_bytes(params, params.expert_width);
}

int64_t grouped_ffn_backward_cuda_workspace_bytes(const GroupedFfnBackwardCudaParams& params,
                                                  const DeviceInfo&) {
  const int64_t width = params.forward.expert_width;
  return matrix_bytes(params.forward, 2 * width) +
         (params.grad_down_proj == nullptr ? 0 : matrix_bytes(params.forward, width));
}

cudaError_t grouped_ffn_cuda(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                             void* workspace, cudaStream_t stream) {
  if (!grouped_ffn_cuda_refusal(params, device).empty()) return cudaErrorInvalidValue;
  const GroupedFfnForwardKernelParams kernel_params{params, workspace};
  const GroupedFfnConfig config = choose_config(params, device);
  switch (params.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(kernel_params, config, stream);
    case DType::kFloat16:
      return forward<Float16>(kernel_params, config, stream);
    case DType::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t grouped_ffn_backward_cuda(const GroupedFfnBackwardCudaParams& params,
                                      const DeviceInfo& device, void* workspace,
                                      cudaStream_t stream) {
  if (!grouped_ffn_cuda_refusal(params.forward, device).empty()) return cudaErrorInvalidValue;
  auto* bytes = static_cast<unsigned char*>(workspace);
  void* hidden = params.grad_down_proj == nullptr
                     ? nullptr
                     : bytes + matrix_bytes(params.forward, 2 * params.forward.expert_width);
  const GroupedFfnBackwardKernelParams kernel_params{params, bytes, hidden};
  const GroupedFfnConfig config = choose_config(params.forward, device);
  switch (params.forward.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(kernel_params, config, stream);
    case DType::kFloat16:
      return backward<Float16>(kernel_params, config, stream);
    case DType::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace sparse_unified
