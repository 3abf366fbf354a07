// SPDX-License-Identifier: Apache-2.0
// mbarriers. Their state lies here; the 8 bytes of shared memory hold a mark, so that a barrier
// that was not initialised, or written over, is noticed.
#include "device/barrier.h"

#include <cstdio>
#include <cstdlib>
#include <map>

#include "emulation/async_proxy.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

constexpr int kBarrierBytes = 8;
constexpr uint64_t kMark = 0x6d62617272696572u;
constexpr int kMaxArrivals = (1 << 20) - 1;
constexpr int kMaxBytes = (1 << 20) - 1;

// A wait that has seen the end of a phase.
struct Seen {
  int thread_idx;
  uint32_t time;
};

struct MemoryBarrier {
  int num_arrivals = 0;      // of a phase
  int num_missing = 0;       // arrivals that this phase lacks
  int64_t num_bytes = 0;     // that it still expects
  int64_t phase = 0;         // phases that have ended
  race::Clock of_phase;      // what the arrivals of this phase have done before
  race::Clock of_completed;  // and those of the last one
  std::vector<Seen> seen;    // by waits for the last one
  int initialised_by = 0;    // thread
  bool is_fenced = false;    // visible to the asynchronous proxy and the cluster
  char waits_for[96] = {};   // for the report of a deadlock
};

std::map<uint32_t, MemoryBarrier> barriers[kMaxClusterBlocks];  // by block and address

bool is_marked(const void* memory, uint32_t address) {
  uint64_t mark = 0;
  std::memcpy(&mark, memory, sizeof(mark));
  return mark == (kMark ^ address);
}

// The barrier of block `rank` that a thread uses at `code`.
MemoryBarrier& find(const char* name, int rank, uint32_t address, int thread_idx,
                    const void* code) {
  const void* memory = shared_pointer(name, rank, address, kBarrierBytes, kBarrierBytes);
  const auto found = barriers[rank].find(address);
  if (found == barriers[rank].end()) fail("%s: no barrier was initialised there", name);
  if (!is_marked(memory, address)) fail("%s: the barrier was written over", name);
  race::access(thread_idx, memory, kBarrierBytes, race::Kind::kAtomic, code);
  return found->second;
}
MemoryBarrier& find(const char* name, uint32_t address, const void* code) {
  return find(name, current->rank, address, current->idx, code);
}

void check_is_fenced(const char* name, const MemoryBarrier& barrier) {
  if (barrier.is_fenced) return;
  fail("%s: no fence after barrier_init makes the barrier visible to it", name);
}

void end_phase_if_complete(MemoryBarrier& barrier) {
  if (barrier.num_missing > 0 || barrier.num_bytes != 0) return;
  // A wait that comes after two phases finds the parity of the first again, and waits for a third.
  for (const Seen& seen : barrier.seen) {
    if (race::holds(barrier.of_phase, seen.thread_idx, seen.time)) continue;
    fail(
        "mbarrier: phase %lld ends, and nothing orders that with the wait of %s for the phase "
        "before, which could fall two phases behind",
        static_cast<long long>(barrier.phase), describe_thread(seen.thread_idx).c_str());
  }
  barrier.seen.clear();
  ++barrier.phase;
  barrier.num_missing = barrier.num_arrivals;
  barrier.of_completed = barrier.of_phase;
  notify();
}

void add_bytes(const char* name, MemoryBarrier& barrier, int num_bytes) {
  barrier.num_bytes += num_bytes;
  if (std::abs(barrier.num_bytes) <= kMaxBytes) return;
  fail("%s: a phase may expect %d bytes at a time, not %lld", name, kMaxBytes,
       static_cast<long long>(barrier.num_bytes));
}

void arrive(const char* name, MemoryBarrier& barrier, int thread_idx) {
  if (barrier.num_missing == 0) {
    fail("%s: more than %d arrivals in a phase that still expects %lld bytes", name,
         barrier.num_arrivals, static_cast<long long>(barrier.num_bytes));
  }
  race::release(barrier.of_phase, thread_idx);
  --barrier.num_missing;
  end_phase_if_complete(barrier);
}

}  // namespace

void begin_barriers() {
  for (auto& of_block : barriers) of_block.clear();
}

void fence_barriers_of(int thread_idx) {
  for (auto& of_block : barriers) {
    for (auto& [address, barrier] : of_block) {
      if (barrier.initialised_by == thread_idx) barrier.is_fenced = true;
    }
  }
}

std::string find_unfinished_barriers() {
  for (const auto& of_block : barriers) {
    for (const auto& [address, barrier] : of_block) {
      if (barrier.num_bytes == 0) continue;
      return "mbarrier at " + std::to_string(address) + ": " + std::to_string(barrier.num_bytes) +
             " bytes missing at the end of the block";
    }
  }
  return "";
}

void complete_bytes(const Transfer& transfer, int num_bytes) {
  const char* name = "load_box";
  MemoryBarrier& barrier =
      find(name, transfer.rank, transfer.barrier, transfer.thread_idx, transfer.code);
  check_is_fenced(name, barrier);
  race::release(barrier.of_phase, transfer.thread_idx);
  add_bytes(name, barrier, -num_bytes);
  end_phase_if_complete(barrier);
}

void arrive_for(const Transfer& transfer) {
  const char* name = "barrier_arrive_after_copies";
  arrive(name, find(name, transfer.rank, transfer.barrier, transfer.thread_idx, transfer.code),
         transfer.thread_idx);
}

}  // namespace emulation

void barrier_init(uint32_t address, int num_arrivals) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_init";
  if (num_arrivals < 1 || num_arrivals > kMaxArrivals) {
    fail("%s: num_arrivals must be 1 to %d, got %d", name, kMaxArrivals, num_arrivals);
  }
  const uint64_t mark = kMark ^ address;
  void* memory = shared_pointer(name, address, kBarrierBytes, kBarrierBytes);
  if (is_marked(memory, address)) fail("%s: there is a barrier already", name);
  race::access(current->idx, memory, kBarrierBytes, race::Kind::kWrite,
               __builtin_return_address(0));
  std::memcpy(memory, &mark, sizeof(mark));
  MemoryBarrier barrier;
  barrier.num_arrivals = barrier.num_missing = num_arrivals;
  barrier.initialised_by = current->idx;
  barriers[current->rank][address] = barrier;
}

void fence_barrier_init() {
  const emulation::InEmulator in_emulator;
  emulation::fence_barriers_of(emulation::current->idx);
}

void barrier_arrive(uint32_t address) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_arrive";
  arrive(name, find(name, address, __builtin_return_address(0)), current->idx);
  maybe_yield();
}

void barrier_arrive_cluster(uint32_t address) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_arrive_cluster";
  const ClusterAddress at = cluster_address(name, address);
  MemoryBarrier& barrier =
      find(name, at.rank, at.address, current->idx, __builtin_return_address(0));
  if (at.rank != current->rank) check_is_fenced(name, barrier);
  arrive(name, barrier, current->idx);
  maybe_yield();
}

void barrier_arrive_expect_bytes(uint32_t address, int num_bytes) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_arrive_expect_bytes";
  if (num_bytes < 0 || num_bytes > kMaxBytes) {
    fail("%s: num_bytes must be 0 to %d, got %d", name, kMaxBytes, num_bytes);
  }
  MemoryBarrier& barrier = find(name, address, __builtin_return_address(0));
  add_bytes(name, barrier, num_bytes);
  arrive(name, barrier, current->idx);
  maybe_yield();
}

void barrier_arrive_after_copies(uint32_t address) {
  using namespace emulation;
  const InEmulator in_emulator;
  find("barrier_arrive_after_copies", address, __builtin_return_address(0));
  Transfer transfer{};
  transfer.rank = current->rank;
  transfer.barrier = address;
  transfer.thread_idx = current->idx;
  transfer.copies = std::move(current->copies);
  transfer.code = __builtin_return_address(0);
  current->copies.clear();
  start_transfer(std::move(transfer));
  maybe_yield();
}

void barrier_wait(uint32_t address, int parity) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_wait";
  if (parity != 0 && parity != 1) fail("%s: parity must be 0 or 1, got %d", name, parity);
  maybe_yield();
  while (true) {
    MemoryBarrier& barrier = find(name, address, __builtin_return_address(0));
    // The phase under way has parity phase % 2; the one before, which has ended, the other.
    if (barrier.phase % 2 != parity) {
      race::acquire(barrier.of_completed, current->idx);
      barrier.seen.push_back({current->idx, race::time_of(current->idx)});
      return;
    }
    std::snprintf(barrier.waits_for, sizeof(barrier.waits_for),
                  "mbarrier at %u, phase %lld of parity %d: %d arrivals and %lld bytes missing",
                  address, static_cast<long long>(barrier.phase), parity, barrier.num_missing,
                  static_cast<long long>(barrier.num_bytes));
    wait_for_event(barrier.waits_for);
  }
}

}  // namespace sparse_unified
