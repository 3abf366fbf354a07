// SPDX-License-Identifier: Apache-2.0
// sort_by_expert: stable counting sort of the (token, slot) pairs by expert.
#pragma once

#include <cstdint>

#include "sparse_unified/cuda/cuda_types.h"

namespace sparse_unified {

struct SortByExpertParams {
  const int32_t* topk_idx;  // [T, K]
  int32_t* expert_offsets;  // [E + 1], rows of expert e are [offsets[e], offsets[e + 1])
  int32_t* row_token;       // [R], token of each row, R = T * K
  int32_t* token_rows;      // [T, K], row of each (token, slot)
  int64_t num_rows;         // R
  int64_t num_experts;      // E
  int64_t top_k;            // K
};

// Returns the first flat index whose expert is not in [0, E), or -1 if all are.
int64_t find_bad_expert(const SortByExpertParams& params);

// Rows of one expert keep the order of the flat (token, slot) index.
void sort_by_expert_cpu(const SortByExpertParams& params);

// Bytes of device memory, aligned to 256, that the launch below works in.
int64_t sort_by_expert_cuda_workspace_bytes(const SortByExpertParams& params);

// The same maps, bit for bit; no atomics decide a position. An expert outside [0, E) ends the
// kernel with an error (the host cannot look without waiting). E at most kMaxCudaExperts of
// route_topk.h.
cudaError_t sort_by_expert_cuda(const SortByExpertParams& params, void* workspace,
                                cudaStream_t stream);

}  // namespace sparse_unified
