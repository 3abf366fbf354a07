// SPDX-License-Identifier: Apache-2.0
// Runs grids, one block after the other, and reports what went wrong.
#include "emulation/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <numeric>

#include "device/launch.h"
#include "emulation/async_proxy.h"
#include "emulation/race.h"
#include "emulation/record.h"

namespace sparse_unified {
namespace emulation {

Block block;
Thread* current = nullptr;
bool is_in_kernel = false;

namespace {

constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of sm_90
constexpr unsigned kMaxGridX = 0x7fffffffu;
constexpr unsigned kMaxGridYZ = 65535;

Fiber host;
const Call* call = nullptr;
int num_running = 0;  // threads of the block that have not exited
std::string error;    // of the launch, empty: none
thread_local bool is_launching = false;
bool is_recording = false;
std::vector<RecordedLaunch> launches;

void run_thread() {
  Fiber::arrive();
  try {
    is_in_kernel = true;
    call->run(*call);
    is_in_kernel = false;
    current->copies.clear();
    if (--num_running > 0) exit_thread();
  } catch (const Error& failure) {
    error = failure.what();
    is_in_kernel = false;
  }
  Thread& self = *current;
  current = nullptr;
  Fiber::switch_between(self.fiber, host, true);
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

void run_block() {
  prepare_shared_memory();
  race::begin_block();
  begin_async_block();
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

  current = &start_threads();
  Fiber::switch_between(host, current->fiber);
  current = nullptr;
  if (!error.empty()) return Fiber::abandon_stacks();
  error = find_unfinished_work();
  if (error.empty()) error = find_write_beside_shared_memory();
  if (!error.empty()) error += describe_place();
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
  Thread& self = *current;
  current = nullptr;
  Fiber::switch_between(self.fiber, host, true);
  __builtin_unreachable();
}

dim3 thread_idx() { return dim3(static_cast<unsigned>(current->idx), 0, 0); }
dim3 block_idx() { return block.idx; }
dim3 block_dim() { return dim3(static_cast<unsigned>(block.num_threads)); }
dim3 grid_dim() { return block.grid; }

bool is_this_thread_launching() { return is_launching; }

void record_launches(bool is_on) {
  is_recording = is_on;
  if (is_on) launches.clear();
}
const std::vector<RecordedLaunch>& recorded_launches() { return launches; }

cudaError_t run_grid(const Call& new_call, const LaunchConfig& config) {
  static std::mutex mutex;
  if (is_launching) fail("a kernel launches another");
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
  if (is_recording) {
    launches.push_back({describe_code(new_call.kernel), config.num_threads, config.shared_bytes});
    return cudaSuccess;
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
    std::shuffle(order.begin(), order.end(), RandomBits());
  }
  is_launching = true;
  for (const int64_t idx : order) {
    const auto linear = static_cast<unsigned>(idx);
    block.idx = dim3(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    seed_random(block.schedule.seed, static_cast<uint64_t>(idx) + 1);
    run_block();
    if (!error.empty()) break;
  }
  is_launching = false;
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
  static std::string where;  // static: a thread that fails never leaves this function
  where = emulation::describe_code(__builtin_return_address(0));
  emulation::fail("device_check failed at %s", where.c_str());
}

}  // namespace sparse_unified
