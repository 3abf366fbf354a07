// SPDX-License-Identifier: Apache-2.0
// pruned_ffn: the SwiGLU FFN over kept blocks of its width, on CPUs with AVX2 or AVX-512, in the
// arithmetic of grouped_ffn; outputs are rounded once.
#pragma once

#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

struct PrunedFfnParams {
  DType dtype;                 // of x, the weights and y
  Matrix x;                    // [T, D]
  Matrix gate_proj;            // [I, D]
  Matrix up_proj;              // [I, D]
  Matrix down_proj;            // [D, I]
  const int32_t* kept_blocks;  // [B], block b holds the neurons [b * block_size, (b + 1) * ...)
  int64_t num_kept;            // B, at least 1
  int64_t block_size;          // from 1 to kMaxPrunedBlock
  void* y;                     // [T, D]
};

constexpr int64_t kMaxPrunedBlock = 128;

// Floats of working memory pruned_ffn_cpu needs, 64-byte aligned.
int64_t pruned_ffn_workspace_floats(DType dtype, int64_t hidden_size);

// y[t] = sum over the kept blocks, in the order of the list, of
// down_b(silu(gate_b x[t]) * up_b x[t]), for tokens [token_begin, token_end).
void pruned_ffn_cpu(const PrunedFfnParams& params, int64_t token_begin, int64_t token_end,
                    float* workspace);

}  // namespace sparse_unified
