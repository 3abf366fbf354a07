// SPDX-License-Identifier: Apache-2.0
// Runs grids, one cluster of blocks after the other, and reports what went wrong.
#include "emulation/block.h"

#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>

#include "device/cluster.h"
#include "device/launch.h"
#include "emulation/async_proxy.h"
#include "emulation/race.h"
#include "emulation/record.h"

namespace sparse_unified {
namespace emulation {

Cluster cluster;
Thread* current = nullptr;
bool is_in_kernel = false;

namespace {

constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of sm_90
constexpr unsigned kMaxGridX = 0x7fffffffu;
constexpr unsigned kMaxGridYZ = 65535;

Fiber host;
const Call* call = nullptr;
int num_running = 0;  // threads of the cluster that have not exited
std::string error;    // of the launch, empty: none
thread_local bool is_launching = false;
bool is_recording = false;
std::vector<RecordedLaunch> launches;
Fault planted = Fault::kNone;
std::string planted_kernel;

void run_thread() {
  Fiber::arrive();
  try {
    is_in_kernel = true;
    call->run(*call);
    is_in_kernel = false;
    current->copies.clear();
    --own_block().num_running;
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
  const dim3 idx = current ? own_block().idx : cluster.blocks[0].idx;
  std::snprintf(place, sizeof(place), "block (%u, %u, %u) of (%u, %u, %u)", idx.x, idx.y, idx.z,
                cluster.grid.x, cluster.grid.y, cluster.grid.z);
  std::string text = "\n  in " + describe_code(call->kernel) + ", ";
  if (!current && cluster.num_blocks > 1) text += "cluster of ";
  text += place;
  if (current) {
    text += ", thread " + std::to_string(thread_idx().x) + " (warp " +
            std::to_string(thread_idx().x / kLanes) + ", lane " + std::to_string(current->lane()) +
            ")";
  }
  return text + "\n  under " + describe(cluster.schedule);
}

void run_cluster() {
  prepare_shared_memory();
  race::begin_cluster();
  begin_async_cluster();
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    cluster.blocks[rank].num_running = cluster.block_threads;
  }
  for (int t = 0; t < cluster.num_threads(); ++t) {
    Thread& thread = cluster.threads[static_cast<size_t>(t)];
    thread.idx = t;
    thread.rank = t / cluster.block_threads;
    thread.has_exited = false;
    thread.num_collectives = 0;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.fiber.prepare(t, run_thread);
  }
  num_running = cluster.num_threads();

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

std::string describe_thread(int idx) {
  const int rank = idx / cluster.block_threads;
  std::string text = "thread " + std::to_string(idx - rank * cluster.block_threads);
  if (cluster.num_blocks > 1) text += " of block " + std::to_string(rank) + " of the cluster";
  return text;
}

dim3 thread_idx() {
  return dim3(static_cast<unsigned>(current->idx - current->rank * cluster.block_threads), 0, 0);
}
dim3 block_idx() { return own_block().idx; }
dim3 block_dim() { return dim3(static_cast<unsigned>(cluster.block_threads)); }
dim3 grid_dim() { return cluster.grid; }

bool is_this_thread_launching() { return is_launching; }

void record_launches(bool is_on) {
  is_recording = is_on;
  if (is_on) launches.clear();
}
const std::vector<RecordedLaunch>& recorded_launches() { return launches; }

void plant_fault(Fault fault, std::string kernel) {
  planted = fault;
  planted_kernel = std::move(kernel);
}

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
  if (config.cluster_blocks < 1 || config.cluster_blocks > kMaxClusterBlocks ||
      grid.x % static_cast<unsigned>(config.cluster_blocks) != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (is_recording) {
    launches.push_back({describe_code(new_call.kernel), config.num_threads, config.shared_bytes});
    return cudaSuccess;
  }

  if (config.cluster_blocks * config.num_threads > Fiber::kMaxFibers) {
    fail("a cluster of %d blocks of %d threads has more than %d in all, which the emulator runs",
         config.cluster_blocks, config.num_threads, Fiber::kMaxFibers);
  }

  const FaultHandler fault_handler;
  cluster.schedule = schedule();
  call = &new_call;
  cluster.grid = grid;
  cluster.num_blocks = config.cluster_blocks;
  cluster.block_threads = config.num_threads;
  cluster.shared_bytes = config.shared_bytes;
  error.clear();
  race::begin_launch();
  const unsigned num_x = grid.x / static_cast<unsigned>(cluster.num_blocks);  // clusters
  std::vector<int64_t> order(static_cast<size_t>(num_x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  seed_random(cluster.schedule.seed, 0);
  if (cluster.schedule.order == Order::kReverse) {
    std::reverse(order.begin(), order.end());
  } else if (cluster.schedule.order != Order::kForward) {
    std::shuffle(order.begin(), order.end(), RandomBits());
  }
  if (planted != Fault::kNone &&
      describe_code(new_call.kernel).find(planted_kernel) != std::string::npos) {
    if (planted == Fault::kAbort) std::abort();
    if (planted == Fault::kHang) pause();
    order.resize(order.size() / 2);
  }
  is_launching = true;
  for (const int64_t idx : order) {
    const auto linear = static_cast<unsigned>(idx);
    for (int rank = 0; rank < cluster.num_blocks; ++rank) {
      const unsigned first_x = linear % num_x * static_cast<unsigned>(cluster.num_blocks);
      cluster.blocks[rank].idx = dim3(first_x + static_cast<unsigned>(rank),
                                      linear / num_x % grid.y, linear / num_x / grid.y);
    }
    seed_random(cluster.schedule.seed, static_cast<uint64_t>(idx) + 1);
    run_cluster();
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
  emulation::wait_at_barrier(0, emulation::cluster.block_threads);
}

void sync_cluster() {
  const emulation::InEmulator in_emulator;
  emulation::wait_at_cluster_barrier();
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
