// SPDX-License-Identifier: Apache-2.0
// Router GEMM and top-k in one pass over x: 2 T D E operations for T D values read. The packed gate
// [D, E] holds the experts of one hidden value side by side, so a value of x is broadcast against a
// vector of experts, for kTokens tokens at once to hide the latency of the multiply-add. The sum
// over D runs in blocks of kBlock to keep fp32 rounding small, and in the same order for every
// token: the logits of a token do not depend on its neighbours.
#include "sparse_unified/route_topk.h"

#include <algorithm>
#include <cmath>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

constexpr int64_t kTokens = 8;
constexpr int64_t kBlock = 128;

// sums[t][e] = <x[t], gate[e]> for kCount tokens and the kExpertLanes experts at `gate_t`.
template <typename T, int64_t kCount>
SPARSE_UNIFIED_INLINE void dot_experts(const T* x, int64_t x_stride, const float* gate_t,
                                       int64_t gate_stride, int64_t hidden_size,
                                       float (*sums)[kExpertLanes]) {
  for (int64_t t = 0; t < kCount; ++t) {
    for (int64_t e = 0; e < kExpertLanes; ++e) sums[t][e] = 0.0f;
  }
  for (int64_t block = 0; block < hidden_size; block += kBlock) {
    const int64_t block_end = std::min(block + kBlock, hidden_size);
    float acc[kCount][kExpertLanes] = {};
    for (int64_t d = block; d < block_end; ++d) {
      const float* gate = gate_t + d * gate_stride;
      for (int64_t t = 0; t < kCount; ++t) {
        const float value = to_float(x[t * x_stride + d]);
        for (int64_t e = 0; e < kExpertLanes; ++e) acc[t][e] += value * gate[e];
      }
    }
    for (int64_t t = 0; t < kCount; ++t) {
      for (int64_t e = 0; e < kExpertLanes; ++e) sums[t][e] += acc[t][e];
    }
  }
}

// Whether logit a of a lower expert index goes before logit b.
SPARSE_UNIFIED_INLINE bool precedes(float a, float b) {
  if (std::isnan(a)) return true;
  return !std::isnan(b) && a >= b;
}

// Stable insertion into a list of the K best, experts visited in index order.
inline void select_topk(const float* logits, int64_t num_experts, int64_t top_k,
                        float* topk_logits, int32_t* topk_idx) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const float logit = logits[e];
    if (count == top_k && precedes(topk_logits[count - 1], logit)) continue;
    int64_t place = count < top_k ? count++ : top_k - 1;
    for (; place > 0 && !precedes(topk_logits[place - 1], logit); --place) {
      topk_logits[place] = topk_logits[place - 1];
      topk_idx[place] = topk_idx[place - 1];
    }
    topk_logits[place] = logit;
    topk_idx[place] = static_cast<int32_t>(e);
  }
}

template <typename T, int64_t kCount>
SPARSE_UNIFIED_INLINE void route_tokens(const RouteTopkParams& params, int64_t token) {
  const T* x = static_cast<const T*>(params.x) + token * params.x_stride;
  const int64_t gate_stride = padded_experts(params.num_experts);
  float sums[kCount][kExpertLanes];
  for (int64_t first = 0; first < params.num_experts; first += kExpertLanes) {
    dot_experts<T, kCount>(x, params.x_stride, params.gate_t + first, gate_stride,
                           params.hidden_size, sums);
    const int64_t count = std::min(kExpertLanes, params.num_experts - first);
    for (int64_t t = 0; t < kCount; ++t) {
      float* logits = params.logits + (token + t) * params.num_experts + first;
      for (int64_t e = 0; e < count; ++e) logits[e] = sums[t][e];
    }
  }
}

template <typename T>
SPARSE_UNIFIED_INLINE void route_topk(const RouteTopkParams& params, int64_t token_begin,
                                      int64_t token_end) {
  int64_t token = token_begin;
  for (; token + kTokens <= token_end; token += kTokens) route_tokens<T, kTokens>(params, token);
  for (; token < token_end; ++token) route_tokens<T, 1>(params, token);
}

template <typename T>
SPARSE_UNIFIED_INLINE void backward_x(const RouteTopkBackwardParams& params, int64_t token_begin,
                                      int64_t token_end) {
  constexpr int64_t kColumns = 64;
  const T* gate = static_cast<const T*>(params.gate);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const float* grad = params.grad_logits + token * params.num_experts;
    T* grad_x = static_cast<T*>(params.grad_x) + token * params.hidden_size;
    for (int64_t column = 0; column < params.hidden_size; column += kColumns) {
      const int64_t n = std::min(kColumns, params.hidden_size - column);
      float acc[kColumns] = {};
      for (int64_t e = 0; e < params.num_experts; ++e) {
        const T* source = gate + e * params.gate_stride + column;
        for (int64_t c = 0; c < n; ++c) acc[c] += grad[e] * to_float(source[c]);
      }
      for (int64_t c = 0; c < n; ++c) grad_x[column + c] = from_float<T>(acc[c]);
    }
  }
}

template <typename T>
SPARSE_UNIFIED_INLINE void backward_gate(const RouteTopkBackwardParams& params,
                                         int64_t column_begin, int64_t column_end) {
  constexpr int64_t kColumns = 32;
  constexpr int64_t kExperts = 4;
  const T* x = static_cast<const T*>(params.x);
  T* grad_gate = static_cast<T*>(params.grad_gate);
  for (int64_t column = column_begin; column < column_end; column += kColumns) {
    const int64_t n = std::min(kColumns, column_end - column);
    for (int64_t first = 0; first < params.num_experts; first += kExperts) {
      const int64_t count = std::min(kExperts, params.num_experts - first);
      float sums[kExperts][kColumns] = {};
      for (int64_t block = 0; block < params.num_tokens; block += kBlock) {
        const int64_t block_end = std::min(block + kBlock, params.num_tokens);
        float acc[kExperts][kColumns] = {};
        for (int64_t token = block; token < block_end; ++token) {
          const float* grad = params.grad_logits + token * params.num_experts + first;
          const T* source = x + token * params.x_stride + column;
          for (int64_t e = 0; e < count; ++e) {
            for (int64_t c = 0; c < n; ++c) acc[e][c] += grad[e] * to_float(source[c]);
          }
        }
        for (int64_t e = 0; e < count; ++e) {
          for (int64_t c = 0; c < n; ++c) sums[e][c] += acc[e][c];
        }
      }
      for (int64_t e = 0; e < count; ++e) {
        T* target = grad_gate + (first + e) * params.hidden_size + column;
        for (int64_t c = 0; c < n; ++c) target[c] = from_float<T>(sums[e][c]);
      }
    }
  }
}

template <typename T>
void pack(const T* gate, int64_t gate_stride, int64_t num_experts, int64_t hidden_size,
          float* gate_t) {
  const int64_t stride = padded_experts(num_experts);
  std::fill(gate_t, gate_t + hidden_size * stride, 0.0f);
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t d = 0; d < hidden_size; ++d) {
      gate_t[d * stride + e] = to_float(gate[e * gate_stride + d]);
    }
  }
}

#define SPARSE_UNIFIED_INSTANTIATE(T, suffix)                                                   \
  SPARSE_UNIFIED_MULTIVERSION void route_topk_##suffix(const RouteTopkParams& params,           \
                                                       int64_t begin, int64_t end) {            \
    route_topk<T>(params, begin, end);                                                          \
  }                                                                                             \
  SPARSE_UNIFIED_MULTIVERSION void backward_x_##suffix(const RouteTopkBackwardParams& params,   \
                                                       int64_t begin, int64_t end) {            \
    backward_x<T>(params, begin, end);                                                          \
  }                                                                                             \
  SPARSE_UNIFIED_MULTIVERSION void backward_gate_##suffix(                                      \
      const RouteTopkBackwardParams& params, int64_t begin, int64_t end) {                      \
    backward_gate<T>(params, begin, end);                                                       \
  }
SPARSE_UNIFIED_INSTANTIATE(float, float32)
SPARSE_UNIFIED_INSTANTIATE(BFloat16, bfloat16)
SPARSE_UNIFIED_INSTANTIATE(Float16, float16)
#undef SPARSE_UNIFIED_INSTANTIATE

}  // namespace

void pack_gate(DType dtype, const void* gate, int64_t gate_stride, int64_t num_experts,
               int64_t hidden_size, float* gate_t) {
  switch (dtype) {
    case DType::kFloat32:
      return pack(static_cast<const float*>(gate), gate_stride, num_experts, hidden_size, gate_t);
    case DType::kBFloat16:
      return pack(static_cast<const BFloat16*>(gate), gate_stride, num_experts, hidden_size,
                  gate_t);
    case DType::kFloat16:
      return pack(static_cast<const Float16*>(gate), gate_stride, num_experts, hidden_size,
                  gate_t);
  }
}

void route_topk_cpu(const RouteTopkParams& params, int64_t token_begin, int64_t token_end) {
  switch (params.dtype) {
    case DType::kFloat32: route_topk_float32(params, token_begin, token_end); break;
    case DType::kBFloat16: route_topk_bfloat16(params, token_begin, token_end); break;
    case DType::kFloat16: route_topk_float16(params, token_begin, token_end); break;
  }
  for (int64_t token = token_begin; token < token_end; ++token) {
    select_topk(params.logits + token * params.num_experts, params.num_experts, params.top_k,
                params.topk_logits + token * params.top_k, params.topk_idx + token * params.top_k);
  }
}

void route_topk_backward_x_cpu(const RouteTopkBackwardParams& params, int64_t token_begin,
                               int64_t token_end) {
  switch (params.dtype) {
    case DType::kFloat32: return backward_x_float32(params, token_begin, token_end);
    case DType::kBFloat16: return backward_x_bfloat16(params, token_begin, token_end);
    case DType::kFloat16: return backward_x_float16(params, token_begin, token_end);
  }
}

void route_topk_backward_gate_cpu(const RouteTopkBackwardParams& params, int64_t column_begin,
                                  int64_t column_end) {
  switch (params.dtype) {
    case DType::kFloat32: return backward_gate_float32(params, column_begin, column_end);
    case DType::kBFloat16: return backward_gate_bfloat16(params, column_begin, column_end);
    case DType::kFloat16: return backward_gate_float16(params, column_begin, column_end);
  }
}

}  // namespace sparse_unified
