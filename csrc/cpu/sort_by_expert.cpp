// SPDX-License-Identifier: Apache-2.0
// Counting sort: histogram, exclusive scan, stable placement. Two passes over R int32, all in cache
// (R = 32768 at BAGEL's 4096 tokens), so one thread does it faster than several could agree.
#include "sparse_unified/sort_by_expert.h"

#include <vector>

namespace sparse_unified {

int64_t find_bad_expert(const SortByExpertParams& params) {
  for (int64_t i = 0; i < params.num_rows; ++i) {
    if (params.topk_idx[i] < 0 || params.topk_idx[i] >= params.num_experts) return i;
  }
  return -1;
}

void sort_by_expert_cpu(const SortByExpertParams& params) {
  // Histogram, shifted by one so that the scan below leaves start offsets.
  for (int64_t e = 0; e <= params.num_experts; ++e) params.expert_offsets[e] = 0;
  for (int64_t i = 0; i < params.num_rows; ++i) ++params.expert_offsets[params.topk_idx[i] + 1];
  for (int64_t e = 0; e < params.num_experts; ++e) {
    params.expert_offsets[e + 1] += params.expert_offsets[e];
  }

  // Flat order within an expert makes the sort stable.
  std::vector<int32_t> next(params.expert_offsets, params.expert_offsets + params.num_experts);
  for (int64_t token = 0, i = 0; i < params.num_rows; ++token) {
    for (int64_t k = 0; k < params.top_k; ++k, ++i) {
      const int32_t row = next[params.topk_idx[i]]++;
      params.row_token[row] = static_cast<int32_t>(token);
      params.token_rows[i] = row;
    }
  }
}

}  // namespace sparse_unified
