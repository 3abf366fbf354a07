// SPDX-License-Identifier: Apache-2.0
// grouped_ffn: the SwiGLU FFN of one expert over gathered rows, on CPUs with AVX2 or AVX-512. Sums
// are fp32. 16-bit tokens and weights are widened on the way; where the processor multiplies bf16
// faster, they are not, and hidden activations are rounded to bf16 (see ffn_level).
#pragma once

#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

struct GroupedFfnParams {
  DType dtype;           // of x and the weights
  Matrix x;              // [T, D]
  Matrix gate_proj;      // [E * h, D]
  Matrix up_proj;        // [E * h, D]
  Matrix down_proj;      // [D, E * h]
  int64_t expert_width;  // h
  ExpertSpacing spacing;
};

// Rows of one expert and where their results go.
struct GroupedFfnRows {
  int64_t expert;
  int64_t count;             // n
  const int32_t* row_token;  // [n]
  float* out;                // row i of the result belongs at out + target[i] * D,
  const int32_t* target;     // [n]; null means i itself
  const float* weights;      // [n]: out += weight * y; null means out = y
};

// Floats of working memory grouped_ffn_cpu needs, 64-byte aligned.
int64_t grouped_ffn_workspace_floats(DType dtype, int64_t hidden_size, int64_t expert_width);

void grouped_ffn_cpu(const GroupedFfnParams& params, const GroupedFfnRows& rows, float* workspace);

}  // namespace sparse_unified
