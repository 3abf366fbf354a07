// SPDX-License-Identifier: Apache-2.0
// The asynchronous proxy of sm_90: TMA and wgmma see shared memory by a view of their own. What TMA
// writes is in both views; what threads write, by stores or cp.async, gets into this one at a
// fence.
#pragma once

#include <cstdint>
#include <string>

#include "device/tensor_copy.h"
#include "emulation/block.h"

namespace sparse_unified::emulation {

// Work that ends by itself and signals an mbarrier.
struct Transfer {
  int rank;          // of the block where it arrives
  uint32_t barrier;  // address there
  int thread_idx;    // that issued it
  const void* code;  // likewise
  // A box of this map into `shared`, or, when the map is empty, the arrival of `copies`.
  TensorMap map;
  uint32_t shared;
  int row;
  int column;
  std::vector<PendingCopy> copies;
};

// Hands a transfer over; it ends now or later, as the schedule has it.
void start_transfer(Transfer transfer);
// Ends one, or all, of the transfers under way; false when there are none.
bool finish_a_transfer();
bool finish_all_transfers();

// barrier.cpp: bytes of a transfer have come, and an arrival on behalf of a thread.
void complete_bytes(const Transfer& transfer, int num_bytes);
void arrive_for(const Transfer& transfer);
// What a thread has initialised becomes visible to the asynchronous proxy.
void fence_barriers_of(int thread_idx);
// tensor_copy.cpp: moves the box; returns its bytes.
int load_box_now(const Transfer& transfer);

// A block's view of the asynchronous proxy at an address, checked like shared_pointer.
void* async_pointer(const char* instruction, int rank, uint32_t address, int num_bytes,
                    int alignment);
// Writes through both views.
void write_both(const char* instruction, int rank, uint32_t address, const void* bytes,
                int num_bytes);

// Before a cluster: nothing under way, views alike. After it: what is left under way, or nothing.
void begin_async_cluster();
std::string find_unfinished_work();
// Their parts.
void begin_barriers();
std::string find_unfinished_barriers();
void begin_products();
std::string find_unfinished_products();
void begin_box_stores();
std::string find_unfinished_stores();

}  // namespace sparse_unified::emulation
