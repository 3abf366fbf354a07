// SPDX-License-Identifier: Apache-2.0
// Which thread of the cluster runs next, and what threads wait for.
#include <algorithm>
#include <numeric>

#include "emulation/async_proxy.h"
#include "emulation/block.h"
#include "emulation/race.h"

namespace sparse_unified::emulation {
namespace {

constexpr const char* kClusterBarrierName = "the barrier of the cluster (sync_cluster)";
constexpr const char* kBarrierNames[kNumBarriers] = {"barrier 0 (sync_threads)",
                                                     "barrier 1",
                                                     "barrier 2",
                                                     "barrier 3",
                                                     "barrier 4",
                                                     "barrier 5",
                                                     "barrier 6",
                                                     "barrier 7",
                                                     "barrier 8",
                                                     "barrier 9",
                                                     "barrier 10",
                                                     "barrier 11",
                                                     "barrier 12",
                                                     "barrier 13",
                                                     "barrier 14",
                                                     "barrier 15"};

uint64_t random_state = 1;
uint32_t ready_warps = 0;   // warps with ready lanes
int last_warp = 0;          //
int warp_order[kMaxWarps];  // by falling priority

int random_bit(uint32_t bits) {
  const int turn = static_cast<int>(random_below(32));
  return (std::countr_zero(std::rotr(bits, turn)) + turn) % 32;
}

int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }
int highest_bit(uint32_t bits) { return 31 - std::countl_zero(bits); }

int pick_warp() {
  switch (cluster.schedule.order) {
    case Order::kForward:
      return lowest_bit(ready_warps);
    case Order::kReverse:
      return highest_bit(ready_warps);
    case Order::kRandom:
      if (ready_warps >> last_warp & 1 && !one_in(16)) return last_warp;
      return random_bit(ready_warps);
    case Order::kPriorities:
      break;
  }
  if (one_in(512)) std::shuffle(warp_order, warp_order + cluster.num_warps(), RandomBits());
  return *std::find_if(warp_order, warp_order + kMaxWarps,
                       [](int warp) { return (ready_warps >> warp & 1) != 0; });
}

int pick_lane(uint32_t lanes) {
  if (cluster.schedule.order == Order::kForward) return lowest_bit(lanes);
  if (cluster.schedule.order == Order::kReverse) return highest_bit(lanes);
  return random_bit(lanes);
}

void make_ready(int warp, uint32_t lanes) {
  cluster.warps[warp].ready |= lanes;
  if (lanes) ready_warps |= 1u << warp;
}

// "lanes 0-15, 31" of a warp.
std::string describe_lanes(uint32_t lanes) {
  std::string text;
  for (int l = 0; l < kLanes; ++l) {
    if (!(lanes >> l & 1)) continue;
    int end = l;
    while (end + 1 < kLanes && lanes >> (end + 1) & 1) ++end;
    if (!text.empty()) text += ", ";
    text += std::to_string(l);
    if (end > l) text.append("-").append(std::to_string(end));
    l = end;
  }
  return text;
}

std::string describe_warp(int warp) {
  const int rank = warp / cluster.block_warps();
  const std::string text = "warp " + std::to_string(warp - rank * cluster.block_warps());
  return cluster.num_blocks == 1 ? text : "block " + std::to_string(rank) + ", " + text;
}

// Who is missing at a barrier; nothing when nobody has come.
std::string describe_barrier(const char* name, const Barrier& barrier) {
  if (barrier.num_arrived == 0) return "";
  return std::string("\n    ") + name + ": " + std::to_string(barrier.num_arrived) + " of " +
         std::to_string(barrier.num_expected) + " threads have come";
}

[[noreturn]] void fail_deadlock() {
  std::string text = "deadlock: no thread can run";
  for (int w = 0; w < cluster.num_warps(); ++w) {
    uint32_t rest = kAllLanes;
    while (rest) {
      const auto state = [&](int lane) {
        const Thread& thread = cluster.threads[static_cast<size_t>(w * kLanes + lane)];
        return std::string(thread.has_exited ? "has exited" : thread.waits_for);
      };
      const std::string first = state(lowest_bit(rest));
      uint32_t lanes = 0;
      for (int l = 0; l < kLanes; ++l) {
        if (rest >> l & 1 && state(l) == first) lanes |= 1u << l;
      }
      rest &= ~lanes;
      text.append("\n    ").append(describe_warp(w)).append(", lanes ");
      text.append(describe_lanes(lanes)).append(": ").append(first);
    }
  }
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    for (int id = 0; id < kNumBarriers; ++id) {
      text += describe_barrier(kBarrierNames[id], cluster.blocks[rank].barriers[id]);
    }
  }
  text += describe_barrier(kClusterBarrierName, cluster.barrier);
  fail("%s", text.c_str());
}

// The ready thread whose turn it is; it is ready no more.
Thread& take_next() {
  // Lazy transfers end when nothing else can go on, random ones at the latest then.
  while (!ready_warps && finish_a_transfer()) continue;
  if (!ready_warps) fail_deadlock();
  last_warp = pick_warp();
  uint32_t& ready = cluster.warps[last_warp].ready;
  const int lane = pick_lane(ready);
  ready &= ~(1u << lane);
  if (!ready) ready_warps &= ~(1u << last_warp);
  return cluster.threads[static_cast<size_t>(last_warp * kLanes + lane)];
}

// Continues another thread, or this one when it is ready and its turn.
void run_next(bool is_last = false) {
  Thread& self = *current;
  current = &take_next();
  if (current != &self) Fiber::switch_between(self.fiber, current->fiber, is_last);
}

void wait(const char* waits_for) {
  current->waits_for = waits_for;
  if (!current->copies.empty()) land_copies_by_chance(*current);
  run_next();
}

void arrive_at(Barrier& barrier) {
  barrier.arrived[current->warp()] |= 1u << current->lane();
  ++barrier.num_arrived;
}

bool is_barrier_complete(const Barrier& barrier) {
  return barrier.num_arrived > 0 && barrier.num_arrived >= barrier.num_expected;
}

// All who have come, this thread among them, may go on.
void end_barrier(const Barrier& barrier) {
  race::join(barrier.arrived, 0, cluster.num_warps());
  for (int w = 0; w < cluster.num_warps(); ++w) make_ready(w, barrier.arrived[w]);
}

void end_cluster_barrier() {
  end_barrier(cluster.barrier);
  const int num_expected = cluster.barrier.num_expected;
  cluster.barrier = {};
  cluster.barrier.num_expected = num_expected;
}

// The last to come lets the others go, and goes on when it is its turn.
void yield() {
  make_ready(current->warp(), 1u << current->lane());
  wait("its turn");
}

}  // namespace

void seed_random(uint64_t seed, uint64_t stream) {
  random_state = (seed + 1) * 0x9e3779b97f4a7c15u ^ (stream + 1) * 0xd1b54a32d192ed03u;
  if (random_state == 0) random_state = 1;
  for (int i = 0; i < 8; ++i) random_below(2);
}

uint32_t random_below(uint32_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * bound >> 32);
}

Thread& start_threads() {
  std::iota(warp_order, warp_order + kMaxWarps, 0);
  std::shuffle(warp_order, warp_order + cluster.num_warps(), RandomBits());
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    for (Barrier& barrier : cluster.blocks[rank].barriers) barrier = {};
  }
  cluster.barrier = {};
  cluster.barrier.num_expected = cluster.num_threads();
  ready_warps = 0;
  for (int w = 0; w < cluster.num_warps(); ++w) {
    Warp& warp = cluster.warps[w];
    warp.ready = warp.waiting = warp.collectives[0].arrived = warp.collectives[1].arrived = 0;
    make_ready(w, kAllLanes);
  }
  return take_next();
}

void exit_thread() {
  current->has_exited = true;
  --cluster.barrier.num_expected;
  if (is_barrier_complete(cluster.barrier)) end_cluster_barrier();
  run_next(true);
}

void maybe_yield() {
  if (cluster.schedule.order == Order::kRandom && one_in(8)) yield();
}

Collective& reach_collective(const char* name) {
  Thread& self = *current;
  Collective& collective = cluster.warps[self.warp()].collectives[self.num_collectives++ % 2];
  if (collective.arrived == 0) {
    collective.name = name;
  } else if (collective.name != name && std::strcmp(collective.name, name) != 0) {
    fail("divergent collective: %s, while lanes %s of the warp are at %s", name,
         describe_lanes(collective.arrived).c_str(), collective.name);
  }
  collective.arrived |= 1u << self.lane();
  return collective;
}

void wait_in_collective(Collective& collective) { wait(collective.name); }

void end_collective(Collective& collective) {
  collective.arrived = 0;
  make_ready(current->warp(), kAllLanes & ~(1u << current->lane()));
  yield();
}

void wait_at_barrier(int id, int num_threads) {
  Barrier& barrier = own_block().barriers[id];
  if (barrier.num_arrived == 0) barrier.num_expected = num_threads;
  if (barrier.num_expected != num_threads) {
    fail("%s: %d threads expected, and %d by a thread before", kBarrierNames[id], num_threads,
         barrier.num_expected);
  }
  arrive_at(barrier);
  if (!is_barrier_complete(barrier)) return wait(kBarrierNames[id]);
  end_barrier(barrier);
  barrier = {};
  wait("its turn");
}

void wait_at_cluster_barrier() {
  arrive_at(cluster.barrier);
  if (!is_barrier_complete(cluster.barrier)) return wait(kClusterBarrierName);
  end_cluster_barrier();
  wait("its turn");
}

void wait_for_event(const char* waits_for) {
  cluster.warps[current->warp()].waiting |= 1u << current->lane();
  wait(waits_for);
}

void notify() {
  for (int w = 0; w < cluster.num_warps(); ++w) {
    make_ready(w, cluster.warps[w].waiting);
    cluster.warps[w].waiting = 0;
  }
}

}  // namespace sparse_unified::emulation
