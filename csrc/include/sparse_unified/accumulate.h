// SPDX-License-Identifier: Apache-2.0
// accumulate: 16-bit values widened to fp32, summed there and rounded once.
#pragma once

#include <cstdint>

#include "sparse_unified/dtype.h"

namespace sparse_unified {

struct AccumulateParams {
  DType dtype;          // of partial
  const void* partial;  // [n]
  float* sum;           // [n]
  int64_t num_values;   // n
};

// sum += partial.
void accumulate_cpu(const AccumulateParams& params);

// sum = partial.
void widen_cpu(const AccumulateParams& params);

struct RoundParams {
  DType dtype;         // of out
  const float* sum;    // [n]
  void* out;           // [n]
  int64_t num_values;  // n
};

// out = sum, to nearest, ties to even.
void round_cpu(const RoundParams& params);

}  // namespace sparse_unified
