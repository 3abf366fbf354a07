// SPDX-License-Identifier: Apache-2.0
// How the emulator orders what real threads leave open, and how it reports what went wrong.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sparse_unified::emulation {

// Which thread runs next. Warps and the lanes of a warp, and blocks, go by rising index, by falling
// index, or at random; kPriorities draws an order of the warps that holds for a while, so that one
// warp runs far ahead of the others.
enum class Order { kForward, kReverse, kRandom, kPriorities };

// When an asynchronous copy lands: only when it is waited for, at once, or at some time between.
enum class Copies { kLazy, kEager, kRandom };

struct Schedule {
  uint64_t seed = 1;
  Order order = Order::kForward;
  Copies copies = Copies::kLazy;
};

// The schedule of the launches that follow. At first it is that of the environment variables
// SPARSE_UNIFIED_EMULATION_SEED (a number), _ORDER (forward, reverse, random, priorities) and
// _COPIES (lazy, eager, random), which std::invalid_argument names when they hold something else.
Schedule schedule();
void set_schedule(const Schedule& schedule);

// Whether any of those variables is set.
bool is_schedule_from_environment();

// The schedule as those variables, to run it again.
std::string describe(const Schedule& schedule);

// A kernel did what it must not: what, in which kernel, block and thread, under which schedule.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace sparse_unified::emulation
