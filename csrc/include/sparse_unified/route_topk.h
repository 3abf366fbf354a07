// SPDX-License-Identifier: Apache-2.0
// route_topk: router GEMM and top-k of the raw logits in one pass over x, and its backward.
#pragma once

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

// Experts a router may have on CUDA.
constexpr int64_t kMaxCudaExperts = 256;

struct RouteTopkParams {
  DType dtype;          // of x and gate
  Matrix x;             // [T, D]
  Matrix gate;          // [E, D]
  const float* gate_t;  // [D, E rounded up to kExpertLanes], what pack_gate made; on the CPU alone
  float* logits;        // [T, E]
  float* topk_logits;   // [T, K]
  int32_t* topk_idx;    // [T, K]
  int64_t top_k;        // K
};

// Experts are handled in groups of this many, one vector register wide on AVX-512.
constexpr int64_t kExpertLanes = 16;

constexpr int64_t padded_experts(int64_t num_experts) {
  return (num_experts + kExpertLanes - 1) / kExpertLanes * kExpertLanes;
}

// Transposes gate [E, D] to fp32 [D, padded E], with zeros in the padding.
void pack_gate(DType dtype, const Matrix& gate, float* gate_t);

// Order of the selection: larger logit first, NaN before everything, equal logits by lower expert
// index. A token's result does not depend on the other tokens. On the CPU for tokens [token_begin,
// token_end); on CUDA for all, with at most kMaxCudaExperts experts, any stride and alignment.
void route_topk_cpu(const RouteTopkParams& params, int64_t token_begin, int64_t token_end);
cudaError_t route_topk_cuda(const RouteTopkParams& params, cudaStream_t stream);

struct RouteTopkBackwardParams {
  DType dtype;                    // of x, gate, grad_x and grad_gate
  const float* grad_logits;       // [T, E]; on the CPU with grad_topk_logits already added
  const float* grad_topk_logits;  // [T, K], adds to the logits that topk_idx names; on CUDA alone
  const int32_t* topk_idx;        // [T, K]; likewise
  Matrix x;                       // [T, D]
  Matrix gate;                    // [E, D]
  void* grad_x;                   // [T, D]; null when not wanted
  void* grad_gate;                // [E, D]; null when not wanted
  int64_t top_k;                  // K
};

// With g = grad_logits + grad_topk_logits: grad_x[t] = sum_e g[t, e] * gate[e] and
// grad_gate[e] = sum_t g[t, e] * x[t]; fp32 sums in a fixed order, one rounding.
// On the CPU for tokens [token_begin, token_end) and for columns [column_begin, column_end) of D.
void route_topk_backward_x_cpu(const RouteTopkBackwardParams& params, int64_t token_begin,
                               int64_t token_end);
void route_topk_backward_gate_cpu(const RouteTopkBackwardParams& params, int64_t column_begin,
                                  int64_t column_end);

// Bytes of device memory, aligned to 256, that the launch below works in.
int64_t route_topk_backward_cuda_workspace_bytes(const RouteTopkBackwardParams& params);
cudaError_t route_topk_backward_cuda(const RouteTopkBackwardParams& params, void* workspace,
                                     cudaStream_t stream);

}  // namespace sparse_unified
