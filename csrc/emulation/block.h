// SPDX-License-Identifier: Apache-2.0
// The cluster of blocks that runs, most often of one block, for the twins of instructions: its
// threads, what they wait for, its shared memory, and the ways to wait and to fail. Only code of
// csrc/emulation includes this.
#pragma once

#include <cstdint>
#include <vector>

#include "emulation/cuda.h"
#include "emulation/fiber.h"
#include "emulation/schedule.h"

namespace sparse_unified::emulation {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
constexpr int kNumBarriers = 16;
constexpr int kMaxClusterBlocks = 8;  // that every device of sm_90 takes
constexpr uint32_t kAllLanes = 0xffffffffu;

// A copy to shared memory that nobody has waited for.
struct PendingCopy {
  void* target;
  const void* source;
  int num_bytes;     // read; the rest of the 16 is zeros
  int group;         // of the issuing thread
  bool has_landed;   //
  const void* code;  // that issued it
};

struct Thread {
  Fiber fiber;
  int idx = 0;   // in the cluster: those of block 0 first
  int rank = 0;  // of its block
  bool has_exited = false;
  uint32_t num_collectives = 0;     // of its warp, that it has reached
  const char* waits_for = nullptr;  // for the report of a deadlock
  std::vector<PendingCopy> copies;  // in the order of issue
  int copy_group = 0;               // that the next copy belongs to

  int warp() const { return idx / kLanes; }
  int lane() const { return idx % kLanes; }
};

// What the lanes of a warp bring to a collective and take from it. A warp has two: a lane may reach
// the next one before all have left this one, but not the one after that.
struct Collective {
  static constexpr int kMaxBytes = 64;
  const char* name = nullptr;
  uint32_t arrived = 0;
  alignas(64) unsigned char data[kLanes * kMaxBytes];
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t waiting = 0;  // lanes in wait_for_event
  Collective collectives[2];
};

// bar.sync: 0 for the whole block, others for parts of it.
struct Barrier {
  int num_expected = 0;
  int num_arrived = 0;
  uint32_t arrived[kMaxWarps] = {};
};

struct Block {
  dim3 idx;
  unsigned char* shared = nullptr;  // dynamic shared memory
  int num_running = 0;              // threads that have not exited
  Barrier barriers[kNumBarriers];
};

// Threads and warps are numbered through all blocks, which have the same number of them.
struct Cluster {
  dim3 grid;
  int num_blocks = 1;
  int block_threads = 0;     // of a block
  int64_t shared_bytes = 0;  // of a block
  Schedule schedule;         // of this launch
  Block blocks[kMaxClusterBlocks];
  std::vector<Thread> threads = std::vector<Thread>(Fiber::kMaxFibers);
  Warp warps[kMaxWarps];
  Barrier barrier;  // of the whole cluster

  int num_threads() const { return num_blocks * block_threads; }
  int num_warps() const { return num_threads() / kLanes; }
  int block_warps() const { return block_threads / kLanes; }
};

extern Cluster cluster;
// The thread that runs, null on the host.
extern Thread* current;
// The block of the thread that runs.
inline Block& own_block() { return cluster.blocks[current->rank]; }
// True while the kernel's own instructions run, and not the emulator's.
extern bool is_in_kernel;

// At the start of every function that kernels call: what follows is not the kernel's doing.
class InEmulator {
 public:
  InEmulator() : was_in_kernel_(is_in_kernel) { is_in_kernel = false; }
  ~InEmulator() { is_in_kernel = was_in_kernel_; }
  InEmulator(const InEmulator&) = delete;
  InEmulator& operator=(const InEmulator&) = delete;

 private:
  bool was_in_kernel_;
};

// Throws an Error with the message, where, and how to run it again; it ends the launch.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Ends the launch with that Error at once, where none can be thrown; outside of any handler.
[[noreturn]] void abandon(std::string message);

// The collective of the warp that the current lane reaches, by what it is called; the caller leaves
// its contribution in it. Lanes that do not come last wait in it, the last one ends it.
Collective& reach_collective(const char* name);
void wait_in_collective(Collective& collective);
void end_collective(Collective& collective);

// All lanes of the warp bring a `lane`; when the last has come, `complete` turns the 32 of them
// into what each takes back. `name` must be the same in all lanes.
template <typename Lane>
void warp_collective(const char* name, Lane& lane, void (*complete)(Lane* lanes)) {
  static_assert(sizeof(Lane) <= Collective::kMaxBytes && std::is_trivially_copyable_v<Lane>);
  Collective& collective = reach_collective(name);
  Lane* lanes = reinterpret_cast<Lane*>(collective.data);
  Lane& mine = lanes[current->lane()];
  mine = lane;
  if (collective.arrived == kAllLanes) {
    complete(lanes);
    end_collective(collective);
  } else {
    wait_in_collective(collective);
  }
  lane = mine;
}

// Arrives at barrier `id` of the block and waits for `num_threads` threads in all.
void wait_at_barrier(int id, int num_threads);
// Arrives at the barrier of the cluster and waits for all threads that have not exited.
void wait_at_cluster_barrier();

// Waits until somebody calls notify(); `waits_for` names the cause in a deadlock's report. The
// caller looks again at what it waits for.
void wait_for_event(const char* waits_for);
void notify();

// Random numbers of the schedule: below `bound`; true once in `n` times; for std::shuffle.
void seed_random(uint64_t seed, uint64_t stream);
uint32_t random_below(uint32_t bound);
inline bool one_in(uint32_t n) { return random_below(n) == 0; }
struct RandomBits {
  using result_type = uint32_t;
  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return 0xfffffffeu; }
  uint32_t operator()() { return random_below(0xffffffffu); }
};

// Makes the threads of the cluster ready; returns the first that runs.
Thread& start_threads();
// Lets others run; the thread does not come back.
void exit_thread();

// The thread lets others run where the order is random, as it might between two instructions.
void maybe_yield();

// Block `rank`'s shared memory at an address of csrc/device, which is of that block itself, checked
// for bounds and alignment; without a rank, that of the thread's own block.
void* shared_pointer(const char* instruction, int rank, uint32_t address, int num_bytes,
                     int alignment);
inline void* shared_pointer(const char* instruction, uint32_t address, int num_bytes,
                            int alignment) {
  return shared_pointer(instruction, current->rank, address, num_bytes, alignment);
}
// An address that map_to_block may have given, as block and address there. Fails when that block
// has ended.
struct ClusterAddress {
  int rank;
  uint32_t address;
};
ClusterAddress cluster_address(const char* instruction, uint32_t address);
void check_has_not_exited(const char* instruction, int rank);
// Whether the address sanitizer, if there is one, knows the memory.
void check_global(const char* instruction, const void* pointer, int num_bytes);

// async_copy.cpp: moves the bytes of a copy, unless that was done, and tells the race detector.
void land_copy(int thread_idx, PendingCopy copy);
// Lets some copies of the thread land, where copies land at random.
void land_copies_by_chance(Thread& thread);

// shared_memory.cpp: the blocks' memory, filled with NaN; and what was written beside it, or
// nothing.
void prepare_shared_memory();
std::string find_write_beside_shared_memory();
// The block in whose shared memory, or close to it, a pointer lies; null: none.
const Block* block_of_shared(const void* pointer);

// "thread 3", and of which block where there are several.
std::string describe_thread(int idx);

// Whether the running cluster belongs to this thread of the system; there is one launch at a time.
bool is_this_thread_launching();

// fault.cpp: turns invalid accesses into failures for as long as it lives.
class FaultHandler {
 public:
  FaultHandler();
  ~FaultHandler();
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
};

// symbols.cpp: function, file and line of an address, as well as the program's symbols tell.
std::string describe_code(const void* address);

}  // namespace sparse_unified::emulation
