// SPDX-License-Identifier: Apache-2.0
// Weighted sum back to tokens. Moves R * D values in and T * D out; a token's columns are summed in
// registers, kColumns at a time, so y is read once and nothing is written twice.
#include "sparse_unified/combine.h"

#include <algorithm>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

constexpr int64_t kColumns = 64;

// acc[0, n) = sum_k weights[k] * y[rows[k]][column, column + n), in the order of k.
template <typename T>
SPARSE_UNIFIED_INLINE void sum_columns(const CombineParams& params, const int32_t* rows,
                                       const float* weights, int64_t column, int64_t n,
                                       float* acc) {
  const T* y = static_cast<const T*>(params.y);
  for (int64_t c = 0; c < n; ++c) acc[c] = 0.0f;
  for (int64_t k = 0; k < params.top_k; ++k) {
    const T* source = y + rows[k] * params.y_stride + column;
    const float weight = weights != nullptr ? weights[k] : 1.0f;
    for (int64_t c = 0; c < n; ++c) acc[c] += weight * to_float(source[c]);
  }
}

template <typename T>
SPARSE_UNIFIED_INLINE void combine(const CombineParams& params, int64_t token_begin,
                                   int64_t token_end) {
  const int64_t hidden_size = params.hidden_size;
  float acc[kColumns];
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int32_t* rows = params.token_rows + token * params.top_k;
    const float* weights =
        params.weights != nullptr ? params.weights + token * params.top_k : nullptr;
    T* out = static_cast<T*>(params.out) + token * hidden_size;
    int64_t column = 0;
    for (; column + kColumns <= hidden_size; column += kColumns) {
      sum_columns<T>(params, rows, weights, column, kColumns, acc);
      for (int64_t c = 0; c < kColumns; ++c) out[column + c] = from_float<T>(acc[c]);
    }
    const int64_t rest = hidden_size - column;
    sum_columns<T>(params, rows, weights, column, rest, acc);
    for (int64_t c = 0; c < rest; ++c) out[column + c] = from_float<T>(acc[c]);
  }
}

// Dot product in kLanes independent sums, folded in a fixed order.
template <typename T>
SPARSE_UNIFIED_INLINE float dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += to_float(a[i + lane]) * to_float(b[i + lane]);
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] += to_float(a[i]) * to_float(b[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename T>
SPARSE_UNIFIED_INLINE void combine_backward(const CombineBackwardParams& params,
                                            int64_t token_begin, int64_t token_end) {
  const int64_t hidden_size = params.hidden_size;
  for (int64_t token = token_begin; token < token_end; ++token) {
    const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_stride;
    for (int64_t k = 0; k < params.top_k; ++k) {
      const int64_t slot = token * params.top_k + k;
      const int64_t row = params.token_rows[slot];
      if (params.grad_weights != nullptr) {
        const T* y = static_cast<const T*>(params.y) + row * params.y_stride;
        params.grad_weights[slot] = dot(grad_out, y, hidden_size);
      }
      if (params.grad_y != nullptr) {
        T* grad_y = static_cast<T*>(params.grad_y) + row * hidden_size;
        const float weight = params.weights[slot];
#pragma GCC ivdep
        for (int64_t c = 0; c < hidden_size; ++c) {
          grad_y[c] = from_float<T>(weight * to_float(grad_out[c]));
        }
      }
    }
  }
}

#define SPARSE_UNIFIED_INSTANTIATE(T, suffix)                                                 \
  SPARSE_UNIFIED_MULTIVERSION void combine_##suffix(const CombineParams& params,              \
                                                    int64_t begin, int64_t end) {             \
    combine<T>(params, begin, end);                                                           \
  }                                                                                           \
  SPARSE_UNIFIED_MULTIVERSION void combine_backward_##suffix(                                 \
      const CombineBackwardParams& params, int64_t begin, int64_t end) {                      \
    combine_backward<T>(params, begin, end);                                                  \
  }
SPARSE_UNIFIED_INSTANTIATE(float, float32)
SPARSE_UNIFIED_INSTANTIATE(BFloat16, bfloat16)
SPARSE_UNIFIED_INSTANTIATE(Float16, float16)
#undef SPARSE_UNIFIED_INSTANTIATE

}  // namespace

void combine_cpu(const CombineParams& params, int64_t token_begin, int64_t token_end) {
  switch (params.dtype) {
    case DType::kFloat32: return combine_float32(params, token_begin, token_end);
    case DType::kBFloat16: return combine_bfloat16(params, token_begin, token_end);
    case DType::kFloat16: return combine_float16(params, token_begin, token_end);
  }
}

void combine_backward_cpu(const CombineBackwardParams& params, int64_t token_begin,
                          int64_t token_end) {
  switch (params.dtype) {
    case DType::kFloat32: return combine_backward_float32(params, token_begin, token_end);
    case DType::kBFloat16: return combine_backward_bfloat16(params, token_begin, token_end);
    case DType::kFloat16: return combine_backward_float16(params, token_begin, token_end);
  }
}

}  // namespace sparse_unified
