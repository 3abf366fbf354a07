// SPDX-License-Identifier: Apache-2.0
// Twin of device/cluster.h.
#pragma once

namespace sparse_unified {

int cluster_rank();
uint32_t map_to_block(uint32_t shared, int rank);
void sync_cluster();

}  // namespace sparse_unified
