// SPDX-License-Identifier: Apache-2.0
// Transcendental functions of the special function unit, and SwiGLU made of them. Their error, at
// most 2^-21 relative, is far below a rounding to bf16 (2^-9) or fp16 (2^-12).
#pragma once

#include "device/platform.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/math.h"
#else

namespace sparse_unified {

// ex2.approx.ftz.f32: 2^value; infinity above 128, 0 below -126.
SPARSE_UNIFIED_DEVICE float exp2_approx(float value) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
}

// rcp.approx.ftz.f32: 1 / value; 0 above 2^126.
SPARSE_UNIFIED_DEVICE float reciprocal_approx(float value) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(value));
  return out;
}

}  // namespace sparse_unified

#endif

namespace sparse_unified {

// 1 / (1 + exp(-value)).
SPARSE_UNIFIED_DEVICE float sigmoid(float value) {
  constexpr float kLog2E = 1.44269504f;
  return reciprocal_approx(1.0f + exp2_approx(-kLog2E * value));
}

// silu(gate) * up.
SPARSE_UNIFIED_DEVICE float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

struct SwigluGradient {
  float gate;
  float up;
  float hidden;  // of forward, again
};

SPARSE_UNIFIED_DEVICE SwigluGradient swiglu_gradient(float grad_hidden, float gate, float up) {
  const float s = sigmoid(gate);
  const float silu = gate * s;
  return {grad_hidden * up * s * (1.0f + gate * (1.0f - s)), grad_hidden * silu, silu * up};
}

}  // namespace sparse_unified
