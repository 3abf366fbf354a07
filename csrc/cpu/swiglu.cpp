// SPDX-License-Identifier: Apache-2.0
// hidden = silu(gate) * up. Elementwise: 3 values moved for about 20 operations.
#include "sparse_unified/swiglu.h"

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void swiglu(const SwigluParams& params) {
  const T* gate = static_cast<const T*>(params.gate);
  const T* up = static_cast<const T*>(params.up);
  T* hidden = static_cast<T*>(params.hidden);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) {
    const Float g = load(gate + i);
    store(hidden + i, g * sigmoid(g) * load(up + i));
  }
  if (const int64_t rest = params.num_values - i; rest > 0) {
    const Float g = load(gate + i, rest);
    store(hidden + i, g * sigmoid(g) * load(up + i, rest), rest);
  }
}

struct SwigluGradient {
  Float gate;
  Float up;
  Float hidden;
};

SPARSE_UNIFIED_INLINE SwigluGradient swiglu_gradient(const Float& grad, const Float& gate,
                                                     const Float& up) {
  const Float s = sigmoid(gate);
  const Float silu = gate * s;
  return {grad * up * s * (1.0f + gate * (1.0f - s)), grad * silu, silu * up};
}

template <typename T, bool kHasHidden>
SPARSE_UNIFIED_INLINE void swiglu_backward(const SwigluBackwardParams& params) {
  const T* grad_hidden = static_cast<const T*>(params.grad_hidden);
  const T* gate = static_cast<const T*>(params.gate);
  const T* up = static_cast<const T*>(params.up);
  T* hidden = static_cast<T*>(params.hidden);
  T* grad_gate = static_cast<T*>(params.grad_gate);
  T* grad_up = static_cast<T*>(params.grad_up);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) {
    const auto value = swiglu_gradient(load(grad_hidden + i), load(gate + i), load(up + i));
    store(grad_gate + i, value.gate);
    store(grad_up + i, value.up);
    if constexpr (kHasHidden) store(hidden + i, value.hidden);
  }
  if (const int64_t rest = params.num_values - i; rest > 0) {
    const auto value =
        swiglu_gradient(load(grad_hidden + i, rest), load(gate + i, rest), load(up + i, rest));
    store(grad_gate + i, value.gate, rest);
    store(grad_up + i, value.up, rest);
    if constexpr (kHasHidden) store(hidden + i, value.hidden, rest);
  }
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void swiglu_backward(const SwigluBackwardParams& params) {
  if (params.hidden != nullptr) {
    swiglu_backward<T, true>(params);
  } else {
    swiglu_backward<T, false>(params);
  }
}

}  // namespace

void swiglu_cpu(const SwigluParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { swiglu<T>(params); });
}

void swiglu_backward_cpu(const SwigluBackwardParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { swiglu_backward<T>(params); });
}

}  // namespace sparse_unified
