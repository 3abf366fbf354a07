// SPDX-License-Identifier: Apache-2.0
#include "emulation/async_proxy.h"

#include <cstring>

#include "device/warpgroup.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

std::vector<unsigned char> views[kMaxClusterBlocks];  // of the asynchronous proxy, by block
std::vector<Transfer> under_way;                      // in the order of issue
std::vector<int> num_fences;                          // by thread

void finish(size_t idx) {
  const Transfer transfer = std::move(under_way[idx]);
  under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(idx));
  if (transfer.map.base != nullptr) {
    complete_bytes(transfer, load_box_now(transfer));
    return;
  }
  for (const PendingCopy& copy : transfer.copies) land_copy(transfer.thread_idx, copy);
  arrive_for(transfer);
}

}  // namespace

void start_transfer(Transfer transfer) {
  under_way.push_back(std::move(transfer));
  switch (cluster.schedule.copies) {
    case Copies::kLazy:
      break;
    case Copies::kEager:
      finish(under_way.size() - 1);
      break;
    case Copies::kRandom:
      while (!under_way.empty() && one_in(2)) finish_a_transfer();
      break;
  }
}

bool finish_a_transfer() {
  if (under_way.empty()) return false;
  finish(cluster.schedule.copies == Copies::kRandom
             ? random_below(static_cast<uint32_t>(under_way.size()))
             : 0);
  return true;
}

bool finish_all_transfers() {
  if (under_way.empty()) return false;
  while (finish_a_transfer()) continue;
  return true;
}

void* async_pointer(const char* instruction, int rank, uint32_t address, int num_bytes,
                    int alignment) {
  const auto* generic = static_cast<const unsigned char*>(
      shared_pointer(instruction, rank, address, num_bytes, alignment));
  return views[rank].data() + (generic - cluster.blocks[rank].shared);
}

void write_both(const char* instruction, int rank, uint32_t address, const void* bytes,
                int num_bytes) {
  std::memcpy(shared_pointer(instruction, rank, address, num_bytes, 1), bytes,
              static_cast<size_t>(num_bytes));
  std::memcpy(async_pointer(instruction, rank, address, num_bytes, 1), bytes,
              static_cast<size_t>(num_bytes));
}

void begin_async_cluster() {
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    const unsigned char* shared = cluster.blocks[rank].shared;
    views[rank].assign(shared, shared + cluster.shared_bytes);
  }
  under_way.clear();
  num_fences.assign(static_cast<size_t>(cluster.num_threads()), 0);
  begin_barriers();
  begin_products();
  begin_box_stores();
}

std::string find_unfinished_work() {
  if (!under_way.empty()) {
    return std::to_string(under_way.size()) +
           " transfers to shared memory under way at the end of the block";
  }
  for (const auto find :
       {find_unfinished_barriers, find_unfinished_products, find_unfinished_stores}) {
    if (std::string text = find(); !text.empty()) return text;
  }
  return "";
}

}  // namespace emulation

// NOTE: what a warp's threads have written, or synchronised with, is not known; so the view takes
// over all of the block's shared memory when the last lane of the warp comes to the fence.
void fence_async_proxy() {
  using namespace emulation;
  const InEmulator in_emulator;
  fence_barriers_of(current->idx);
  const int mine = ++num_fences[static_cast<size_t>(current->idx)];
  const int* lanes = num_fences.data() + current->warp() * kLanes;
  for (int l = 0; l < kLanes; ++l) {
    if (lanes[l] < mine) return;
  }
  std::vector<unsigned char>& view = views[current->rank];
  std::memcpy(view.data(), own_block().shared, view.size());
  maybe_yield();
}

void sync_named(int id, int num_threads) {
  using namespace emulation;
  const InEmulator in_emulator;
  if (id < 1 || id > 15) fail("sync_named: id must be 1 to 15, got %d", id);
  if (num_threads <= 0 || num_threads % kLanes != 0) {
    fail("sync_named: num_threads must be a multiple of 32, got %d", num_threads);
  }
  wait_at_barrier(id, num_threads);
}

bool elect_lane() {
  using namespace emulation;
  const InEmulator in_emulator;
  bool is_elected = false;
  warp_collective<bool>("elect_lane", is_elected, [](bool* lanes) { lanes[0] = true; });
  return is_elected;
}

}  // namespace sparse_unified
