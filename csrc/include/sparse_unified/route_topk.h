// SPDX-License-Identifier: Apache-2.0
// route_topk: router GEMM and top-k of the raw logits in one pass over x.
#pragma once

#include <cstdint>

#include "sparse_unified/dtype.h"

namespace sparse_unified {

struct RouteTopkParams {
  DType dtype;          // of x
  const void* x;        // [T, D], rows x_stride elements apart
  int64_t x_stride;     //
  const float* gate_t;  // [D, E rounded up to kExpertLanes], zero padded: see pack_gate
  float* logits;        // [T, E]
  float* topk_logits;   // [T, K]
  int32_t* topk_idx;    // [T, K]
  int64_t hidden_size;  // D
  int64_t num_experts;  // E
  int64_t top_k;        // K
};

// Experts are handled in groups of this many, one vector register wide on AVX-512.
constexpr int64_t kExpertLanes = 16;

constexpr int64_t padded_experts(int64_t num_experts) {
  return (num_experts + kExpertLanes - 1) / kExpertLanes * kExpertLanes;
}

// Transposes gate [E, D] (rows gate_stride elements apart) to fp32 [D, padded E].
void pack_gate(DType dtype, const void* gate, int64_t gate_stride, int64_t num_experts,
               int64_t hidden_size, float* gate_t);

// Routes tokens [token_begin, token_end). Order of the selection: larger logit first, NaN before
// everything, equal logits by lower expert index.
void route_topk_cpu(const RouteTopkParams& params, int64_t token_begin, int64_t token_end);

struct RouteTopkBackwardParams {
  DType dtype;               // of x, gate, grad_x and grad_gate
  const float* grad_logits;  // [T, E], gradients of topk_logits already added
  const void* x;             // [T, D], rows x_stride elements apart
  int64_t x_stride;          //
  const void* gate;          // [E, D], rows gate_stride elements apart
  int64_t gate_stride;       //
  void* grad_x;              // [T, D]
  void* grad_gate;           // [E, D]
  int64_t num_tokens;        // T
  int64_t hidden_size;       // D
  int64_t num_experts;       // E
};

// grad_x[t] = sum_e grad_logits[t, e] * gate[e], for tokens [token_begin, token_end).
void route_topk_backward_x_cpu(const RouteTopkBackwardParams& params, int64_t token_begin,
                               int64_t token_end);

// grad_gate[e] = sum_t grad_logits[t, e] * x[t], for columns [column_begin, column_end) of D.
void route_topk_backward_gate_cpu(const RouteTopkBackwardParams& params, int64_t column_begin,
                                  int64_t column_end);

}  // namespace sparse_unified
