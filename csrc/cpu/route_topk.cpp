// SPDX-License-Identifier: Apache-2.0
// Router GEMM and top-k in one pass over x: 2 T D E operations for T D values read. The packed gate
// [D, E] holds the experts of one hidden value side by side, so a value of x is broadcast against a
// vector of experts, for kTokens tokens at once to hide the latency of the multiply-add. The sum
// over D runs in blocks of kBlock to keep fp32 rounding small, and in the same order for every
// token: the logits of a token do not depend on its neighbours.
#include "sparse_unified/route_topk.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

static_assert(kExpertLanes == kLanes);
constexpr int64_t kTokens = 8;
constexpr int64_t kBlock = 128;
// Experts up to which comparing each with each is faster than a sorted list.
constexpr int64_t kMaxRanked = 64;

// The same columns of the tokens that come next are on their way while these are multiplied.
template <typename T>
SPARSE_UNIFIED_INLINE void prefetch_block(const T* x, int64_t x_stride, int64_t num_tokens) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t d = 0; d < kBlock; d += kLine) __builtin_prefetch(x + t * x_stride + d);
  }
}

// block[t][d] = x[t][d] in fp32.
template <typename T>
SPARSE_UNIFIED_INLINE void widen_block(const T* x, int64_t x_stride, int64_t num_columns,
                                       int64_t num_tokens, float (*block)[kBlock]) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t d = 0; d < num_columns; d += kLanes) {
      const T* source = x + t * x_stride + d;
      const int64_t n = std::min(kLanes, num_columns - d);
      store(block[t] + d, n == kLanes ? load(source) : load(source, n));
    }
  }
}

// sums[t] += <x[t], gate> for kCount tokens and the kExpertLanes experts at `gate_t`.
template <int64_t kCount>
SPARSE_UNIFIED_INLINE void dot_experts(const float* x, int64_t x_stride, const float* gate_t,
                                       int64_t gate_stride, int64_t num_columns, Float* sums) {
  Float acc[kCount] = {};
  for (int64_t d = 0; d < num_columns; ++d) {
    const Float gate = load(gate_t + d * gate_stride);
#pragma GCC unroll 8
    for (int64_t t = 0; t < kCount; ++t) acc[t] += x[t * x_stride + d] * gate;
  }
  for (int64_t t = 0; t < kCount; ++t) sums[t] += acc[t];
}

template <typename T, int64_t kCount>
SPARSE_UNIFIED_INLINE void route_tokens(const RouteTopkParams& params, int64_t token) {
  const T* x = params.x.row<T>(token);
  const int64_t gate_stride = padded_experts(params.gate.rows);
  float block[kCount][kBlock];
  for (int64_t first = 0; first < params.gate.rows; first += kExpertLanes) {
    Float sums[kCount] = {};
    for (int64_t column = 0; column < params.x.columns; column += kBlock) {
      const int64_t num_columns = std::min(kBlock, params.x.columns - column);
      const float* gate_t = params.gate_t + column * gate_stride + first;
      prefetch_block(x + kCount * params.x.stride + column, params.x.stride, kCount);
      if constexpr (std::is_same_v<T, float>) {
        dot_experts<kCount>(x + column, params.x.stride, gate_t, gate_stride, num_columns, sums);
      } else {
        widen_block(x + column, params.x.stride, num_columns, kCount, block);
        dot_experts<kCount>(block[0], kBlock, gate_t, gate_stride, num_columns, sums);
      }
    }
    const int64_t count = std::min(kExpertLanes, params.gate.rows - first);
    for (int64_t t = 0; t < kCount; ++t) {
      store(params.logits + (token + t) * params.gate.rows + first, sums[t], count);
    }
  }
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void route_tokens(const RouteTopkParams& params, int64_t token_begin,
                                              int64_t token_end) {
  int64_t token = token_begin;
  for (; token + kTokens <= token_end; token += kTokens) route_tokens<T, kTokens>(params, token);
  for (; token < token_end; ++token) route_tokens<T, 1>(params, token);
}

// Whether logit a of a lower expert index goes before logit b.
SPARSE_UNIFIED_INLINE bool precedes(float a, float b) {
  if (std::isnan(a)) return true;
  return !std::isnan(b) && a >= b;
}

// Stable insertion into a list of the K best, experts visited in index order.
inline void select_by_insertion(const float* logits, int64_t num_experts, int64_t top_k,
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

// Integers in the order of `precedes`: a larger logit has a larger one, NaN the largest.
SPARSE_UNIFIED_INLINE Int order_keys(const Float& logits) {
  const Int bits = bit_cast<Int>(logits);
  const Int key = logits == 0.0f ? Int{} : bits ^ (bits >> 31 & 0x7fffffff);  // -0 ties with 0
  return logits != logits ? Int{} + 0x7fffffff : key;
}

// The place of an expert is the number of those that precede it, counted for 16 at once; nothing
// here is decided by a branch that random logits would mislead.
SPARSE_UNIFIED_INLINE void select_by_rank(const float* logits, int64_t num_experts, int64_t top_k,
                                          float* topk_logits, int32_t* topk_idx) {
  constexpr Int kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int32_t keys[kMaxRanked];
  for (int64_t first = 0; first < num_experts; first += kLanes) {
    const Int key = order_keys(load(logits + first, std::min(kLanes, num_experts - first)));
    std::memcpy(keys + first, &key, sizeof(key));
  }
  for (int64_t first = 0; first < num_experts; first += kLanes) {
    Int own;
    std::memcpy(&own, keys + first, sizeof(own));
    const Int index = kLane + static_cast<int32_t>(first);
    Int rank = {};
    for (int32_t e = 0; e < num_experts; ++e) {
      // An equal key precedes from a lower index. No key is so small that 1 less would wrap.
      const Int limit = index > e ? own - 1 : own;
      rank = Int{} + keys[e] > limit ? rank + 1 : rank;
    }
    int32_t places[kLanes];
    std::memcpy(places, &rank, sizeof(places));
    const int64_t count = std::min(kLanes, num_experts - first);
    for (int64_t lane = 0; lane < count; ++lane) {
      if (places[lane] >= top_k) continue;
      topk_logits[places[lane]] = logits[first + lane];
      topk_idx[places[lane]] = static_cast<int32_t>(first + lane);
    }
  }
}

SPARSE_UNIFIED_MULTIVERSION void select_topk(const RouteTopkParams& params, int64_t token_begin,
                                             int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const float* logits = params.logits + token * params.gate.rows;
    float* topk_logits = params.topk_logits + token * params.top_k;
    int32_t* topk_idx = params.topk_idx + token * params.top_k;
    if (params.gate.rows <= kMaxRanked) {
      select_by_rank(logits, params.gate.rows, params.top_k, topk_logits, topk_idx);
    } else {
      select_by_insertion(logits, params.gate.rows, params.top_k, topk_logits, topk_idx);
    }
  }
}

// grad_x[t] = sum_e grad[t, e] * gate[e], one vector of columns at a time.
template <typename T>
SPARSE_UNIFIED_MULTIVERSION void backward_x(const RouteTopkBackwardParams& params,
                                            int64_t token_begin, int64_t token_end) {
  const T* gate = params.gate.row<T>(0);
  for (int64_t token = token_begin; token < token_end; ++token) {
    const float* grad = params.grad_logits + token * params.gate.rows;
    T* grad_x = static_cast<T*>(params.grad_x) + token * params.x.columns;
    for (int64_t column = 0; column < params.x.columns; column += kLanes) {
      const int64_t n = std::min(kLanes, params.x.columns - column);
      Float acc = {};
      for (int64_t e = 0; e < params.gate.rows; ++e) {
        const T* source = gate + e * params.gate.stride + column;
        acc += grad[e] * (n == kLanes ? load(source) : load(source, n));
      }
      store(grad_x + column, acc, n);
    }
  }
}

// grad_gate[e] = sum_t grad[t, e] * x[t] for kExperts experts and one vector of columns, summed in
// blocks of tokens to keep fp32 rounding small.
template <typename T>
SPARSE_UNIFIED_MULTIVERSION void backward_gate(const RouteTopkBackwardParams& params,
                                               int64_t column_begin, int64_t column_end) {
  constexpr int64_t kExperts = 8;
  const T* x = params.x.row<T>(0);
  T* grad_gate = static_cast<T*>(params.grad_gate);
  for (int64_t column = column_begin; column < column_end; column += kLanes) {
    const int64_t n = std::min(kLanes, column_end - column);
    for (int64_t first = 0; first < params.gate.rows; first += kExperts) {
      const int64_t count = std::min(kExperts, params.gate.rows - first);
      Float sums[kExperts] = {};
      for (int64_t block = 0; block < params.x.rows; block += kBlock) {
        const int64_t block_end = std::min(block + kBlock, params.x.rows);
        Float acc[kExperts] = {};
        for (int64_t token = block; token < block_end; ++token) {
          const float* grad = params.grad_logits + token * params.gate.rows + first;
          const T* source = x + token * params.x.stride + column;
          const Float value = n == kLanes ? load(source) : load(source, n);
          for (int64_t e = 0; e < count; ++e) acc[e] += grad[e] * value;
        }
        for (int64_t e = 0; e < count; ++e) sums[e] += acc[e];
      }
      for (int64_t e = 0; e < count; ++e) {
        store(grad_gate + (first + e) * params.x.columns + column, sums[e], n);
      }
    }
  }
}

// gate_t [D, padded E] from gate [E, D], a vector of columns at a time.
template <typename T>
void pack(const Matrix& gate, float* gate_t) {
  const int64_t hidden_size = gate.columns;
  const int64_t stride = padded_experts(gate.rows);
  std::fill(gate_t, gate_t + hidden_size * stride, 0.0f);
  for (int64_t e = 0; e < gate.rows; ++e) {
    for (int64_t d = 0; d < hidden_size; d += kLanes) {
      const int64_t n = std::min(kLanes, hidden_size - d);
      float values[kLanes];
      const T* source = gate.row<T>(e) + d;
      store(values, n == kLanes ? load(source) : load(source, n));
      for (int64_t lane = 0; lane < n; ++lane) gate_t[(d + lane) * stride + e] = values[lane];
    }
  }
}

}  // namespace

void pack_gate(DType dtype, const Matrix& gate, float* gate_t) {
  dispatch_dtype(dtype, [&]<typename T>(T) { pack<T>(gate, gate_t); });
}

void route_topk_cpu(const RouteTopkParams& params, int64_t token_begin, int64_t token_end) {
  dispatch_dtype(params.dtype,
                 [&]<typename T>(T) { route_tokens<T>(params, token_begin, token_end); });
  select_topk(params, token_begin, token_end);
}

void route_topk_backward_x_cpu(const RouteTopkBackwardParams& params, int64_t token_begin,
                               int64_t token_end) {
  dispatch_dtype(params.dtype,
                 [&]<typename T>(T) { backward_x<T>(params, token_begin, token_end); });
}

void route_topk_backward_gate_cpu(const RouteTopkBackwardParams& params, int64_t column_begin,
                                  int64_t column_end) {
  dispatch_dtype(params.dtype,
                 [&]<typename T>(T) { backward_gate<T>(params, column_begin, column_end); });
}

}  // namespace sparse_unified
