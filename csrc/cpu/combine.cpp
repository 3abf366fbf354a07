// SPDX-License-Identifier: Apache-2.0
// Weighted sum back to tokens. Moves R * D values in and T * D out; a token's columns are summed in
// registers, kColumns at a time, so y is read once and nothing is written twice.
#include "sparse_unified/combine.h"

#include <algorithm>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

constexpr int64_t kVectors = 4;
constexpr int64_t kColumns = kVectors * kLanes;

// The rows of one token and their weights.
template <typename T>
struct TokenRows {
  Matrix y;
  const int32_t* rows;   // [K]
  const float* weights;  // [K]; null means ones
  float weight_offset;
  int64_t top_k;

  const T* row(int64_t k) const { return y.row<T>(rows[k]); }
  float weight(int64_t k) const { return weights != nullptr ? weight_offset + weights[k] : 1.0f; }
};

template <typename T>
SPARSE_UNIFIED_INLINE void sum_rows(const TokenRows<T>& token, T* out, int64_t hidden_size) {
  int64_t column = 0;
  for (; column + kColumns <= hidden_size; column += kColumns) {
    Float acc[kVectors] = {};
    for (int64_t k = 0; k < token.top_k; ++k) {
      const T* source = token.row(k) + column;
      const float weight = token.weight(k);
      for (int64_t v = 0; v < kVectors; ++v) acc[v] += weight * load(source + v * kLanes);
    }
    for (int64_t v = 0; v < kVectors; ++v) store(out + column + v * kLanes, acc[v]);
  }
  for (; column < hidden_size; column += kLanes) {
    const int64_t n = std::min(kLanes, hidden_size - column);
    Float acc = {};
    for (int64_t k = 0; k < token.top_k; ++k) {
      acc += token.weight(k) * load(token.row(k) + column, n);
    }
    store(out + column, acc, n);
  }
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void combine(const CombineParams& params, int64_t token_begin,
                                         int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t slot = token * params.top_k;
    const TokenRows<T> rows{params.y, params.token_rows + slot,
                            params.weights != nullptr ? params.weights + slot : nullptr,
                            params.weight_offset, params.top_k};
    const int64_t hidden_size = params.y.columns;
    sum_rows(rows, static_cast<T*>(params.out) + token * hidden_size, hidden_size);
  }
}

template <typename T>
SPARSE_UNIFIED_INLINE float dot(const T* a, const T* b, int64_t n) {
  Float acc = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(a + i) * load(b + i);
  if (i < n) acc += load(a + i, n - i) * load(b + i, n - i);
  return sum_lanes(acc);
}

template <typename T>
SPARSE_UNIFIED_INLINE void scale(const T* source, float factor, T* target, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(target + i, factor * load(source + i));
  if (i < n) store(target + i, factor * load(source + i, n - i), n - i);
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void combine_backward(const CombineBackwardParams& params) {
  const int64_t hidden_size = params.grad_out.columns;
  for (int64_t row = 0; row < params.num_rows; ++row) {
    const T* grad_out = params.grad_out.row<T>(params.row_token[row]);
    const int64_t first = row * hidden_size;
    if (params.grad_y != nullptr) {
      scale(grad_out, params.weights[row], static_cast<T*>(params.grad_y) + first, hidden_size);
    }
    if (params.grad_weights != nullptr) {
      params.grad_weights[row] =
          dot(grad_out, static_cast<const T*>(params.y) + first, hidden_size);
    }
  }
}

}  // namespace

void combine_cpu(const CombineParams& params, int64_t token_begin, int64_t token_end) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { combine<T>(params, token_begin, token_end); });
}

void combine_backward_cpu(const CombineBackwardParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { combine_backward<T>(params); });
}

}  // namespace sparse_unified
