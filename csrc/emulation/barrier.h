// SPDX-License-Identifier: Apache-2.0
// Twin of device/barrier.h.
#pragma once

namespace sparse_unified {

void barrier_init(uint32_t barrier, int num_arrivals);
void fence_barrier_init();
void barrier_arrive(uint32_t barrier);
void barrier_arrive_cluster(uint32_t barrier);
void barrier_arrive_expect_bytes(uint32_t barrier, int num_bytes);
void barrier_arrive_after_copies(uint32_t barrier);
void barrier_wait(uint32_t barrier, int parity);

}  // namespace sparse_unified
