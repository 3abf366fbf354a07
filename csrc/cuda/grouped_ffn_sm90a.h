// SPDX-License-Identifier: Apache-2.0
// The GEMMs of grouped_ffn for Hopper: persistent, warp-specialised, wgmma. Borders between their
// launch functions and the op.
#pragma once

#include "cuda/grouped_ffn_row_weights.h"
#include "sparse_unified/cuda/grouped_ffn.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified {

// Whether the library holds these kernels in code for Hopper; asked while such a device is current.
bool grouped_ffn_sm90a_is_compiled();

// Rows of the intermediate buffers: every group padded to whole tiles, whatever the routing.
int64_t grouped_ffn_sm90a_padded_rows(int64_t num_rows, int64_t num_groups);

// hidden [padded rows, h] = silu(x gate^T) * (x up^T), each group from its first tile on, which
// starts at a multiple of kSm90aTileRows; zeros in padding rows.
cudaError_t grouped_ffn_up_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                 const GroupedFfnSm90aOptions& options, void* hidden,
                                 cudaStream_t stream);

// y [R, D] = hidden down^T.
cudaError_t grouped_ffn_down_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                   const GroupedFfnSm90aOptions& options, const void* hidden,
                                   cudaStream_t stream);

// Neurons of a tile of grad_hidden, whose sums over a row are one part.
constexpr int kSm90aPartNeurons = 256;

// grad_gate, grad_up and hidden [padded rows, h], all times the weights, from grad_y down and the
// kept activations; zeros in padding rows; hidden may be null.
cudaError_t grouped_ffn_grad_hidden_sm90a(const GroupedFfnBackwardCudaParams& params,
                                          const DeviceInfo& device,
                                          const GroupedFfnSm90aOptions& options, void* grad_gate,
                                          void* grad_up, void* hidden, const RowFactors& factors,
                                          cudaStream_t stream);

// grad_rows [R, D] = grad_gate gate + grad_up up.
cudaError_t grouped_ffn_grad_rows_sm90a(const GroupedFfnBackwardCudaParams& params,
                                        const DeviceInfo& device,
                                        const GroupedFfnSm90aOptions& options,
                                        const void* grad_gate, const void* grad_up,
                                        cudaStream_t stream);

// grad_gate_proj = grad_gate^T x, grad_up_proj = grad_up^T x, grad_down_proj = grad_y^T hidden,
// each over the rows of an expert.
cudaError_t grouped_ffn_grad_weights_sm90a(const GroupedFfnBackwardCudaParams& params,
                                           const DeviceInfo& device,
                                           const GroupedFfnSm90aOptions& options,
                                           const void* grad_gate, const void* grad_up,
                                           const void* hidden, cudaStream_t stream);

}  // namespace sparse_unified
