// SPDX-License-Identifier: Apache-2.0
// mbarriers. Their state lies here; the 8 bytes of shared memory hold a mark, so that a barrier
// that was not initialised, or written over, is noticed.
#include "device/barrier.h"

#include <cstdio>
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

struct MemoryBarrier {
  int num_arrivals = 0;      // of a phase
  int num_missing = 0;       // arrivals that this phase lacks
  int64_t num_bytes = 0;     // that it still expects
  int64_t phase = 0;         // phases that have ended
  race::Clock of_phase;      // what the arrivals of this phase have done before
  race::Clock of_completed;  // and those of the last one
  char waits_for[96] = {};   // for the report of a deadlock
};

std::map<uint32_t, MemoryBarrier> barriers;

MemoryBarrier& find(const char* name, uint32_t address) {
  uint64_t mark = 0;
  std::memcpy(&mark, shared_pointer(name, address, kBarrierBytes, kBarrierBytes), sizeof(mark));
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("%s: no barrier was initialised there", name);
  if (mark != (kMark ^ address)) fail("%s: the barrier was written over", name);
  return found->second;
}

void end_phase_if_complete(MemoryBarrier& barrier) {
  if (barrier.num_missing > 0 || barrier.num_bytes != 0) return;
  ++barrier.phase;
  barrier.num_missing = barrier.num_arrivals;
  barrier.of_completed = barrier.of_phase;
  notify();
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

void begin_barriers() { barriers.clear(); }

void complete_bytes(const Transfer& transfer, int num_bytes) {
  MemoryBarrier& barrier = find("load_box", transfer.barrier);
  race::release(barrier.of_phase, transfer.thread_idx);
  barrier.num_bytes -= num_bytes;
  end_phase_if_complete(barrier);
}

void arrive_for(const Transfer& transfer) {
  const char* name = "barrier_arrive_after_copies";
  arrive(name, find(name, transfer.barrier), transfer.thread_idx);
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
  race::access(current->idx, memory, kBarrierBytes, race::Kind::kWrite,
               __builtin_return_address(0));
  std::memcpy(memory, &mark, sizeof(mark));
  MemoryBarrier barrier;
  barrier.num_arrivals = barrier.num_missing = num_arrivals;
  barriers[address] = barrier;
}

void fence_barrier_init() {}

void barrier_arrive(uint32_t address) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_arrive";
  arrive(name, find(name, address), current->idx);
  maybe_yield();
}

void barrier_arrive_expect_bytes(uint32_t address, int num_bytes) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "barrier_arrive_expect_bytes";
  if (num_bytes < 0 || num_bytes > kMaxBytes) {
    fail("%s: num_bytes must be 0 to %d, got %d", name, kMaxBytes, num_bytes);
  }
  MemoryBarrier& barrier = find(name, address);
  barrier.num_bytes += num_bytes;
  arrive(name, barrier, current->idx);
  maybe_yield();
}

void barrier_arrive_after_copies(uint32_t address) {
  using namespace emulation;
  const InEmulator in_emulator;
  find("barrier_arrive_after_copies", address);
  Transfer transfer{};
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
    MemoryBarrier& barrier = find(name, address);
    // The phase under way has parity phase % 2; the one before, which has ended, the other.
    if (barrier.phase % 2 != parity) {
      race::acquire(barrier.of_completed, current->idx);
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
