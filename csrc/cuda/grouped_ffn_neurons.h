// SPDX-License-Identifier: Apache-2.0
// The neurons of the groups of grouped_ffn as kernels look them up.
#pragma once

#include "device/index_map.h"
#include "sparse_unified/cuda/grouped_ffn.h"

namespace sparse_unified {

// Groups `step` rows or columns apart; with a list of blocks, one behind the other.
SPARSE_UNIFIED_HOST_DEVICE NeuronGroups neuron_groups(const GroupedFfnCudaParams& ffn,
                                                      int64_t step) {
  const WidthBlocks& blocks = ffn.blocks;
  if (blocks.kept_blocks == nullptr) return {nullptr, 1, 1, static_cast<int>(step)};
  return {blocks.kept_blocks, static_cast<int>(blocks.block_size),
          static_cast<int>(blocks.num_blocks), static_cast<int>(ffn.expert_width)};
}

// Rows of gate_proj and up_proj.
SPARSE_UNIFIED_HOST_DEVICE NeuronGroups neuron_rows(const GroupedFfnCudaParams& ffn) {
  return neuron_groups(ffn, ffn.expert_width + ffn.spacing.neuron_gap);
}

// Columns of down_proj, below the rows that the spacing says.
SPARSE_UNIFIED_HOST_DEVICE NeuronGroups neuron_columns(const GroupedFfnCudaParams& ffn) {
  return neuron_groups(ffn, ffn.spacing.down_rows == 0 ? ffn.expert_width : 0);
}

}  // namespace sparse_unified
