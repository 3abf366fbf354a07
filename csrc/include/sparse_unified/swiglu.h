// SPDX-License-Identifier: Apache-2.0
// swiglu: the activation between the two GEMMs of grouped_ffn.
#pragma once

#include <cstdint>

#include "sparse_unified/dtype.h"

namespace sparse_unified {

struct SwigluParams {
  DType dtype;         // of all three
  const void* gate;    // [n]
  const void* up;      // [n]
  void* hidden;        // [n]; may be `gate` itself
  int64_t num_values;  // n
};

// hidden = silu(gate) * up, fp32 inside, one rounding.
void swiglu_cpu(const SwigluParams& params);

struct SwigluBackwardParams {
  DType dtype;              // of all six
  const void* grad_hidden;  // [n]
  const void* gate;         // [n]
  const void* up;           // [n]
  void* hidden;             // [n]; null when not wanted
  void* grad_gate;          // [n]; may be `grad_hidden` itself
  void* grad_up;            // [n]
  int64_t num_values;       // n
};

void swiglu_backward_cpu(const SwigluBackwardParams& params);

}  // namespace sparse_unified
