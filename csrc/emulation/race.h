// SPDX-License-Identifier: Apache-2.0
// Detects accesses that nothing orders: every thread has a vector clock, every word of memory the
// last accesses to it. Barriers order; shuffles and ballots do not, neither do
// blocks but by barriers of their cluster. Built with
// SPARSE_UNIFIED_EMULATION_RACE; otherwise nothing is recorded.
#pragma once

#include <cstdint>
#include <vector>

namespace sparse_unified::emulation::race {

// kConstantRead: nobody may write the memory during the kernel, ordered or not.
enum class Kind : uint8_t { kRead, kConstantRead, kWrite, kAtomic };

// What the threads that released to it had done before.
struct Clock {
  std::vector<uint32_t> of_thread;
};

#if defined(SPARSE_UNIFIED_EMULATION_RACE)

void begin_launch();
void begin_cluster();

// Records an access of thread `thread_idx` of the running cluster, at `code`; fails the launch when
// an earlier one conflicts with it.
void access(int thread_idx, const void* pointer, int num_bytes, Kind kind, const void* code);

// Orders what the threads did before with what each of them does after: bit l of lanes[w] is lane l
// of warp w.
void join(const uint32_t* lanes, int first_warp, int num_warps);

// Adds what the thread did so far to the clock; orders what the clock holds before what the thread
// does from now on.
void release(Clock& clock, int thread_idx);
void acquire(const Clock& clock, int thread_idx);

// The time of a thread, and whether the clock holds what it did up to then.
uint32_t time_of(int thread_idx);
bool holds(const Clock& clock, int thread_idx, uint32_t time);

// The thread that stands for the products of a warp; and: what one thread did so far comes before
// what another does from now on.
int products_of(int warp);
void order(int earlier_thread, int later_thread);

#else

inline void begin_launch() {}
inline void begin_cluster() {}
inline void access(int, const void*, int, Kind, const void*) {}
inline void join(const uint32_t*, int, int) {}
inline void release(Clock&, int) {}
inline void acquire(const Clock&, int) {}
inline uint32_t time_of(int) { return 0; }
inline bool holds(const Clock&, int, uint32_t) { return true; }
inline int products_of(int) { return 0; }
inline void order(int, int) {}

#endif

}  // namespace sparse_unified::emulation::race
