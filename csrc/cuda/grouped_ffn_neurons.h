// SPDX-License-Identifier: Apache-2.0
// The neurons of the groups of grouped_ffn as kernels look them up.
#pragma once

#include "device/index_map.h"
#include "sparse_unified/cuda/grouped_ffn.h"

namespace sparse_unified {

SPARSE_UNIFIED_HOST_DEVICE NeuronGroups neuron_groups(const GroupedFfnCudaParams& ffn) {
  const WidthBlocks& blocks = ffn.blocks;
  const int group_width = static_cast<int>(ffn.expert_width);
  if (blocks.kept_blocks == nullptr) return {nullptr, 1, 1, group_width};
  return {blocks.kept_blocks, static_cast<int>(blocks.block_size),
          static_cast<int>(blocks.num_blocks), group_width};
}

}  // namespace sparse_unified
