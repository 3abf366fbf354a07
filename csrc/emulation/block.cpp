// SPDX-License-Identifier: Apache-2.0
// Runs grids: one block after the other, the threads of a block as fibers that switch only where
// they wait.
#include "emulation/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <numeric>

#include "device/launch.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {

Block block;
Thread* current = nullptr;
bool is_in_kernel = false;

namespace {

constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of sm_90
constexpr unsigned kMaxGridX = 0x7fffffffu;
constexpr unsigned kMaxGridYZ = 65535;

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

Fiber host;
const Call* call = nullptr;
uint64_t random_state = 1;
int num_running = 0;        // threads of the block that have not exited
uint32_t ready_warps = 0;   // warps with ready lanes
int last_warp = 0;          //
int warp_order[kMaxWarps];  // by falling priority
std::string error;          // of the launch, empty: none

void seed_random(uint64_t a, uint64_t b) {
  random_state = (a + 1) * 0x9e3779b97f4a7c15u ^ (b + 1) * 0xd1b54a32d192ed03u;
  if (random_state == 0) random_state = 1;
  for (int i = 0; i < 8; ++i) random_below(2);
}

template <typename T>
void shuffle_order(T* values, int num) {
  for (int i = num - 1; i > 0; --i) {
    std::swap(values[i], values[random_below(static_cast<uint32_t>(i + 1))]);
  }
}

int random_bit(uint32_t bits) {
  const int turn = static_cast<int>(random_below(32));
  return (std::countr_zero(std::rotr(bits, turn)) + turn) % 32;
}

int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }
int highest_bit(uint32_t bits) { return 31 - std::countl_zero(bits); }

int pick_warp() {
  switch (block.schedule.order) {
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
  if (one_in(512)) shuffle_order(warp_order, block.num_threads / kLanes);
  return *std::find_if(warp_order, warp_order + kMaxWarps,
                       [](int warp) { return (ready_warps >> warp & 1) != 0; });
}

int pick_lane(uint32_t lanes) {
  if (block.schedule.order == Order::kForward) return lowest_bit(lanes);
  if (block.schedule.order == Order::kReverse) return highest_bit(lanes);
  return random_bit(lanes);
}

void make_ready(int warp, uint32_t lanes) {
  block.warps[warp].ready |= lanes;
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

[[noreturn]] void fail_deadlock() {
  std::string text = "deadlock: no thread can run";
  for (int w = 0; w < block.num_threads / kLanes; ++w) {
    uint32_t rest = kAllLanes;
    while (rest) {
      const auto state = [&](int lane) {
        const Thread& thread = block.threads[static_cast<size_t>(w * kLanes + lane)];
        return std::string(thread.has_exited ? "has exited" : thread.waits_for);
      };
      const std::string first = state(lowest_bit(rest));
      uint32_t lanes = 0;
      for (int l = 0; l < kLanes; ++l) {
        if (rest >> l & 1 && state(l) == first) lanes |= 1u << l;
      }
      rest &= ~lanes;
      text.append("\n    warp ").append(std::to_string(w)).append(", lanes ");
      text.append(describe_lanes(lanes)).append(": ").append(first);
    }
  }
  for (int id = 0; id < kNumBarriers; ++id) {
    const Barrier& barrier = block.barriers[id];
    if (barrier.num_arrived == 0) continue;
    text.append("\n    ").append(kBarrierNames[id]).append(": ");
    text.append(std::to_string(barrier.num_arrived)).append(" of ");
    text.append(std::to_string(barrier.num_expected)).append(" threads have come");
  }
  fail("%s", text.c_str());
}

// Continues another thread, or this one when it is ready and its turn.
void run_next(bool is_last = false) {
  if (!ready_warps) fail_deadlock();
  Thread& self = *current;
  const int warp = pick_warp();
  uint32_t& ready = block.warps[warp].ready;
  const int lane = pick_lane(ready);
  ready &= ~(1u << lane);
  if (!ready) ready_warps &= ~(1u << warp);
  last_warp = warp;
  current = &block.threads[static_cast<size_t>(warp * kLanes + lane)];
  if (current != &self) Fiber::switch_between(self.fiber, current->fiber, is_last);
}

void wait(const char* waits_for) {
  current->waits_for = waits_for;
  if (!current->copies.empty()) land_copies_by_chance(*current);
  run_next();
}

// The last to come lets the others go, and goes on when it is its turn.
void yield() {
  make_ready(current->warp(), 1u << current->lane());
  wait("its turn");
}

void run_thread() {
  Fiber::arrive();
  try {
    is_in_kernel = true;
    call->run(*call);
    is_in_kernel = false;
    current->has_exited = true;
    current->copies.clear();
    if (--num_running > 0) run_next(true);
  } catch (const Error& failure) {
    error = failure.what();
    is_in_kernel = false;
  }
  Thread& self = *current;
  current = nullptr;
  Fiber::switch_between(self.fiber, host, true);
}

void run_block() {
  prepare_shared_memory();
  race::begin_block();
  for (Barrier& barrier : block.barriers) barrier = {};
  std::iota(warp_order, warp_order + kMaxWarps, 0);
  shuffle_order(warp_order, block.num_threads / kLanes);
  ready_warps = 0;
  for (int w = 0; w < block.num_threads / kLanes; ++w) {
    Warp& warp = block.warps[w];
    warp.ready = warp.waiting = warp.collectives[0].arrived = warp.collectives[1].arrived = 0;
    make_ready(w, kAllLanes);
  }
  for (int t = 0; t < block.num_threads; ++t) {
    Thread& thread = block.threads[static_cast<size_t>(t)];
    thread.idx = t;
    thread.has_exited = false;
    thread.num_collectives = 0;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.prepare(t, run_thread);
  }
  num_running = block.num_threads;

  // The host takes part as a thread that is never ready.
  Thread starter;
  current = &starter;
  const int warp = pick_warp();
  const int lane = pick_lane(block.warps[warp].ready);
  block.warps[warp].ready &= ~(1u << lane);
  last_warp = warp;
  current = &block.threads[static_cast<size_t>(warp * kLanes + lane)];
  Fiber::switch_between(host, current->fiber);
  current = nullptr;
  if (error.empty()) check_shared_memory();
}

std::string describe_place() {
  char place[256];
  std::snprintf(place, sizeof(place), ", block (%u, %u, %u) of (%u, %u, %u)", block.idx.x,
                block.idx.y, block.idx.z, block.grid.x, block.grid.y, block.grid.z);
  std::string text = "\n  in " + describe_code(call->kernel) + place;
  if (current) {
    text += ", thread " + std::to_string(current->idx) + " (warp " +
            std::to_string(current->warp()) + ", lane " + std::to_string(current->lane()) + ")";
  }
  return text + "\n  under " + describe(block.schedule);
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  va_list again;
  va_copy(again, arguments);
  const int size = std::vsnprintf(nullptr, 0, format, arguments);
  std::string message(static_cast<size_t>(size), '\0');
  std::vsnprintf(message.data(), message.size() + 1, format, again);
  va_end(again);
  va_end(arguments);
  if (call) message += describe_place();
  throw Error(message);
}

void abandon(std::string message) {
  error = std::move(message);
  is_in_kernel = false;
  // The stacks of the block are left as they are.
  Thread& self = *current;
  current = nullptr;
  Fiber::switch_between(self.fiber, host, true);
  __builtin_unreachable();
}

uint32_t random_below(uint32_t bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * bound >> 32);
}

void maybe_yield() {
  if (block.schedule.order == Order::kRandom && one_in(8)) yield();
}

Collective& reach_collective(const char* name) {
  Thread& self = *current;
  Collective& collective = block.warps[self.warp()].collectives[self.num_collectives++ % 2];
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
  Thread& self = *current;
  Barrier& barrier = block.barriers[id];
  if (barrier.num_arrived == 0) barrier.num_expected = num_threads;
  if (barrier.num_expected != num_threads) {
    fail("%s: %d threads expected, and %d by a thread before", kBarrierNames[id], num_threads,
         barrier.num_expected);
  }
  barrier.arrived[self.warp()] |= 1u << self.lane();
  if (++barrier.num_arrived < num_threads) return wait(kBarrierNames[id]);
  const int num_warps = block.num_threads / kLanes;
  race::join(barrier.arrived, 0, num_warps);
  barrier.arrived[self.warp()] &= ~(1u << self.lane());
  for (int w = 0; w < num_warps; ++w) make_ready(w, barrier.arrived[w]);
  barrier = {};
  yield();
}

void wait_for_event(const char* waits_for) {
  block.warps[current->warp()].waiting |= 1u << current->lane();
  wait(waits_for);
}

void notify() {
  for (int w = 0; w < block.num_threads / kLanes; ++w) {
    make_ready(w, block.warps[w].waiting);
    block.warps[w].waiting = 0;
  }
}

dim3 thread_idx() { return dim3(static_cast<unsigned>(current->idx), 0, 0); }
dim3 block_idx() { return block.idx; }
dim3 block_dim() { return dim3(static_cast<unsigned>(block.num_threads)); }
dim3 grid_dim() { return block.grid; }

cudaError_t run_grid(const Call& new_call, const LaunchConfig& config) {
  static std::mutex mutex;
  if (current) fail("a kernel launches another");
  const std::lock_guard lock(mutex);
  const dim3 grid = config.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.num_threads <= 0 || config.num_threads > kMaxWarps * kLanes ||
      config.num_threads % kLanes != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.shared_bytes < 0 || config.shared_bytes > kMaxSharedBytes) {
    return cudaErrorInvalidValue;
  }

  const FaultHandler fault_handler;
  block.schedule = schedule();
  call = &new_call;
  block.grid = grid;
  block.num_threads = config.num_threads;
  block.shared_bytes = config.shared_bytes;
  error.clear();
  race::begin_launch();
  std::vector<int64_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  seed_random(block.schedule.seed, 0);
  if (block.schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (block.schedule.order == Order::kRandom || block.schedule.order == Order::kPriorities) {
    shuffle_order(order.data(), static_cast<int>(order.size()));
  }
  for (const int64_t idx : order) {
    const auto linear = static_cast<unsigned>(idx);
    block.idx = dim3(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    seed_random(block.schedule.seed, static_cast<uint64_t>(idx) + 1);
    run_block();
    if (!error.empty()) break;
  }
  call = nullptr;
  if (!error.empty()) throw Error(error);
  return cudaSuccess;
}

}  // namespace emulation

void sync_threads() {
  const emulation::InEmulator in_emulator;
  emulation::wait_at_barrier(0, emulation::block.num_threads);
}

void sync_warp() {
  const emulation::InEmulator in_emulator;
  uint8_t nothing = 0;
  emulation::warp_collective<uint8_t>("sync_warp", nothing, [](uint8_t*) {
    emulation::race::join(&emulation::kAllLanes, emulation::current->warp(), 1);
  });
}

void device_check(bool ok) {
  if (ok) return;
  const emulation::InEmulator in_emulator;
  emulation::fail("device_check failed at %s",
                  emulation::describe_code(__builtin_return_address(0)).c_str());
}

}  // namespace sparse_unified
