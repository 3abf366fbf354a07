// SPDX-License-Identifier: Apache-2.0
// grouped_ffn on CUDA: SwiGLU expert FFN over rows grouped by expert, as two grouped GEMMs with the
// gather in the load and SwiGLU in the epilogue; and its backward.
#pragma once

#include <cstdint>
#include <string>

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/cuda/device_info.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"
#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

// Which neurons of the weights the groups use: group e has the neurons
// [e * width, (e + 1) * width) of a sequence of blocks. Without a list the sequence is the weights'
// own order (experts); with one, it is the kept blocks in the order of the list (pruned_ffn).
struct WidthBlocks {
  const int32_t* kept_blocks;  // [B] on the device, or null
  int64_t num_kept;            // B
  int64_t block_size;          // neurons of a block, a multiple of 16
  int64_t num_blocks;          // I / block_size; a kept block outside ends the kernel with an error
};

struct GroupedFfnCudaParams {
  DType dtype;                    // bf16 or fp16, of all matrices
  Matrix x;                       // [T, D]
  const int32_t* row_token;       // [R]; null: row r is token r
  const int32_t* expert_offsets;  // [E + 1]; null: one group of all rows
  Matrix gate_proj;               // [I, D]
  Matrix up_proj;                 // [I, D]
  Matrix down_proj;               // [D, I]
  WidthBlocks blocks;             //
  int64_t num_rows;               // R
  int64_t num_experts;            // E, groups
  int64_t expert_width;           // h, neurons of a group
  ExpertSpacing spacing;          // without a list of blocks
  void* gate_rows;                // [R, h], kept for backward; null when not wanted
  void* up_rows;                  // [R, h], likewise
  void* y;                        // [R, D]
};

// The weights of rows that combine has summed up to tokens, y[t] = sum_k w[t, k] row(t, k).
struct RowWeights {
  const float* weights;       // [T, K]; null: rows have none
  float offset;               // w = offset + weights
  const int32_t* token_rows;  // [T, K]
  float* grad_weights;        // [T, K]; null when not wanted
};

struct GroupedFfnBackwardCudaParams {
  GroupedFfnCudaParams forward;  // gate_rows and up_rows as forward left them; y is not read
  RowWeights weights;
  const void* grad_y;    // [R, D], of the token of each row: without the weights
  void* grad_rows;       // [R, D]; null when not wanted; may be grad_y itself
  void* grad_gate_proj;  // [I, D]; null when no weight gradient is wanted
  void* grad_up_proj;    // [I, D]
  void* grad_down_proj;  // [D, I], or [E, D, h] where the spacing has rows of down_proj
};

// What a call runs, decided once.
struct GroupedFfnCudaPlan {
  // Why no kernel takes these shapes, strides and addresses on this device, for people to read;
  // empty when one does.
  std::string refusal;
  GroupedFfnConfig config;
  int64_t matrix_bytes;   // of an intermediate matrix, aligned to 256
  int64_t weights_bytes;  // of the weights of the rows and the parts of their gradients, likewise
};
GroupedFfnCudaPlan plan_grouped_ffn_cuda(const GroupedFfnCudaParams& params,
                                         const DeviceInfo& device, bool is_backward);

// fp32 accumulation in a fixed order; hidden and y are rounded once each. Neither reads anything
// back to the host. The workspace is device memory, aligned to 256: one intermediate matrix
// forward; backward two, or three with grad_down_proj, and weights_bytes for rows with weights.
cudaError_t grouped_ffn_cuda(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                             const GroupedFfnCudaPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t grouped_ffn_backward_cuda(const GroupedFfnBackwardCudaParams& params,
                                      const DeviceInfo& device, const GroupedFfnCudaPlan& plan,
                                      void* workspace, cudaStream_t stream);

}  // namespace sparse_unified
