// SPDX-License-Identifier: Apache-2.0
// route_topk on CUDA: router GEMM and top-k of the raw logits in one kernel, and its backward.
#pragma once

#include <cstdint>

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/dtype.h"

namespace sparse_unified {

// Experts a router may have on CUDA.
constexpr int64_t kMaxCudaExperts = 256;

struct RouteTopkCudaParams {
  DType dtype;          // of x and gate
  const void* x;        // [T, D], rows x_stride elements apart
  int64_t x_stride;     //
  const void* gate;     // [E, D], rows gate_stride elements apart
  int64_t gate_stride;  //
  float* logits;        // [T, E]
  float* topk_logits;   // [T, K]
  int32_t* topk_idx;    // [T, K]
  int64_t num_tokens;   // T
  int64_t hidden_size;  // D
  int64_t num_experts;  // E, at most kMaxCudaExperts
  int64_t top_k;        // K
};

// Order of the selection: larger logit first, NaN before everything, equal logits by lower index.
// Any D, stride and alignment; a token's result does not depend on the other tokens.
cudaError_t route_topk_cuda(const RouteTopkCudaParams& params, cudaStream_t stream);

struct RouteTopkBackwardCudaParams {
  DType dtype;                    // of x, gate, grad_x and grad_gate
  const float* grad_logits;       // [T, E]
  const float* grad_topk_logits;  // [T, K], adds to the logits that topk_idx names
  const int32_t* topk_idx;        // [T, K]
  const void* x;                  // [T, D], rows x_stride elements apart
  int64_t x_stride;               //
  const void* gate;               // [E, D], rows gate_stride elements apart
  int64_t gate_stride;            //
  void* grad_x;                   // [T, D]; null when not wanted
  void* grad_gate;                // [E, D]; null when not wanted
  int64_t num_tokens;             // T
  int64_t hidden_size;            // D
  int64_t num_experts;            // E
  int64_t top_k;                  // K
};

// Bytes of device memory, aligned to 256, that the launch below works in.
int64_t route_topk_backward_cuda_workspace_bytes(const RouteTopkBackwardCudaParams& params);

// grad_x[t] = sum_e g[t, e] * gate[e], grad_gate[e] = sum_t g[t, e] * x[t], where g is grad_logits
// with grad_topk_logits added; fp32 sums in a fixed order, one rounding.
cudaError_t route_topk_backward_cuda(const RouteTopkBackwardCudaParams& params, void* workspace,
                                     cudaStream_t stream);

}  // namespace sparse_unified
