// SPDX-License-Identifier: Apache-2.0
// sort_by_expert on CUDA: stable counting sort of the (token, slot) pairs by expert.
#pragma once

#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/sort_by_expert.h"

namespace sparse_unified {

// Bytes of device memory, aligned to 256, that the launch below works in.
int64_t sort_by_expert_cuda_workspace_bytes(const SortByExpertParams& params);

// The maps of sort_by_expert_cpu, bit for bit; no atomics decide a position. An expert outside
// [0, E) ends the kernel with an error (the host cannot look without waiting). E at most
// kMaxCudaExperts of route_topk.h.
cudaError_t sort_by_expert_cuda(const SortByExpertParams& params, void* workspace,
                                cudaStream_t stream);

}  // namespace sparse_unified
