// SPDX-License-Identifier: Apache-2.0
#include "emulation/race.h"

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "emulation/block.h"

namespace sparse_unified::emulation::race {
namespace {

// A warp's products count as a thread of their own, behind those of the cluster.
constexpr int kMaxThreads = Fiber::kMaxFibers + kMaxWarps;
constexpr uintptr_t kWordBytes = 4;
constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kMaxPages = 1 << 14;  // 1 GiB of records

// One access to a word. It counts as long as its cluster is of this launch.
struct Access {
  uint32_t cluster;  // serial number over all launches; 0: no access
  uint32_t clock;    // of the thread, when it took place
  int32_t code;      // address, from `anchor`
  uint16_t thread;
  uint8_t bytes;  // bit i: byte i of the word
  Kind kind;
};

struct Word {
  Access accesses[4];
};

struct Page {
  Word words[kPageBytes / kWordBytes];
};

const char anchor = 0;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_idx = 0;
Page* last_page = nullptr;
uint32_t this_cluster = 0;
uint32_t first_cluster_of_launch = 1;
uint32_t clocks[kMaxThreads][kMaxThreads];  // [thread, other]: what of the other came before

int count_threads() { return cluster.num_threads() + cluster.num_warps(); }

Word& find_word(uintptr_t address) {
  const uintptr_t page_idx = address / kPageBytes;
  if (!last_page || page_idx != last_page_idx) {
    std::unique_ptr<Page>& page = pages[page_idx];
    if (!page) page = std::make_unique<Page>();
    last_page = page.get();
    last_page_idx = page_idx;
  }
  return last_page->words[address % kPageBytes / kWordBytes];
}

bool is_write(const Access& access) {
  return access.kind == Kind::kWrite || access.kind == Kind::kAtomic;
}

bool is_conflict(const Access& a, const Access& b) {
  return (a.bytes & b.bytes) && (is_write(a) || is_write(b)) &&
         !(a.kind == Kind::kAtomic && b.kind == Kind::kAtomic);
}

// Whether `earlier` took place before `later`, by barriers.
bool is_ordered(const Access& earlier, const Access& later) {
  if (earlier.cluster != later.cluster) return false;
  return earlier.thread == later.thread || clocks[later.thread][earlier.thread] >= earlier.clock;
}

// Whether whoever conflicts with the ordered access `earlier` conflicts with `later` as well.
bool is_implied(const Access& earlier, const Access& later) {
  if (earlier.bytes & ~later.bytes) return false;
  return later.kind == earlier.kind || later.kind == Kind::kWrite ||
         (later.kind == Kind::kConstantRead && earlier.kind == Kind::kRead);
}

std::string describe_access(const Access& access) {
  static constexpr const char* kNames[] = {"a read", "a constant read", "a write", "an atomic"};
  const auto* code = &anchor + access.code;
  std::string text = kNames[static_cast<int>(access.kind)];
  const int products = access.thread - cluster.num_threads();
  text += " by ";
  text += products < 0 ? describe_thread(access.thread)
                       : "products of the warp of " + describe_thread(products * kLanes);
  if (access.cluster != this_cluster) text += " of another block";
  return text + " at " + describe_code(code);
}

[[noreturn]] void report(uintptr_t address, const Access& earlier, const Access& later) {
  const auto* pointer = reinterpret_cast<const unsigned char*>(address);
  std::string where = "global memory";
  if (const Block* block = block_of_shared(pointer)) {
    where = "byte " + std::to_string(pointer - block->shared) + " of shared memory";
  }
  fail("race on %s: %s, and nothing orders it with %s", where.c_str(),
       describe_access(later).c_str(), describe_access(earlier).c_str());
}

void record(uintptr_t address, const Access& access) {
  Word& word = find_word(address);
  // Shared memory starts anew with every cluster.
  const bool is_shared = block_of_shared(reinterpret_cast<const void*>(address)) != nullptr;
  const uint32_t first_cluster = is_shared ? this_cluster : first_cluster_of_launch;
  Access* target = nullptr;
  for (Access& slot : word.accesses) {
    if (slot.cluster < first_cluster) {
      target = &slot;
      continue;
    }
    const bool is_before = is_ordered(slot, access);
    const bool is_constant = slot.kind == Kind::kConstantRead || access.kind == Kind::kConstantRead;
    if (is_conflict(slot, access) && (!is_before || is_constant)) report(address, slot, access);
    if (is_before && is_implied(slot, access)) target = &slot;
  }
  if (!target) target = &word.accesses[random_below(4)];
  *target = access;
}

}  // namespace

void begin_launch() {
  first_cluster_of_launch = this_cluster + 1;
  if (pages.size() > kMaxPages) {
    pages.clear();
    last_page = nullptr;
  }
}

void begin_cluster() {
  ++this_cluster;
  for (int t = 0; t < count_threads(); ++t) {
    std::fill_n(clocks[t], count_threads(), 0u);
    clocks[t][t] = 1;
  }
}

void access(int thread_idx, const void* pointer, int num_bytes, Kind kind, const void* code) {
  Access access{};
  access.cluster = this_cluster;
  access.clock = clocks[thread_idx][thread_idx];
  access.code = static_cast<int32_t>(static_cast<const char*>(code) - &anchor);
  access.thread = static_cast<uint16_t>(thread_idx);
  access.kind = kind;
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t end = address + static_cast<uintptr_t>(num_bytes);
  while (address < end) {
    const uintptr_t first = address % kWordBytes;
    const uintptr_t num = std::min(kWordBytes - first, end - address);
    access.bytes = static_cast<uint8_t>(((1u << num) - 1) << first);
    record(address - first, access);
    address += num;
  }
}

void join(const uint32_t* lanes, int first_warp, int num_warps) {
  static uint32_t joined[kMaxThreads];
  const auto num_threads = static_cast<size_t>(count_threads());
  std::fill_n(joined, num_threads, 0u);
  const auto for_each = [&](auto&& visit) {
    for (int w = 0; w < num_warps; ++w) {
      for (uint32_t rest = lanes[w]; rest; rest &= rest - 1) {
        visit((first_warp + w) * kLanes + std::countr_zero(rest));
      }
    }
  };
  for_each([&](int t) {
    for (size_t i = 0; i < num_threads; ++i) joined[i] = std::max(joined[i], clocks[t][i]);
  });
  for_each([&](int t) {
    std::copy_n(joined, num_threads, clocks[t]);
    ++clocks[t][t];
  });
}

void release(Clock& clock, int thread_idx) {
  uint32_t* own = clocks[thread_idx];
  clock.of_thread.resize(static_cast<size_t>(count_threads()));
  for (int t = 0; t < count_threads(); ++t) {
    uint32_t& known = clock.of_thread[static_cast<size_t>(t)];
    known = std::max(known, own[t]);
  }
  ++own[thread_idx];
}

void acquire(const Clock& clock, int thread_idx) {
  uint32_t* own = clocks[thread_idx];
  for (size_t t = 0; t < clock.of_thread.size(); ++t) own[t] = std::max(own[t], clock.of_thread[t]);
}

uint32_t time_of(int thread_idx) { return clocks[thread_idx][thread_idx]; }

bool holds(const Clock& clock, int thread_idx, uint32_t time) {
  const auto t = static_cast<size_t>(thread_idx);
  return t < clock.of_thread.size() && clock.of_thread[t] >= time;
}

int products_of(int warp) { return cluster.num_threads() + warp; }

void order(int earlier_thread, int later_thread) {
  uint32_t* earlier = clocks[earlier_thread];
  uint32_t* later = clocks[later_thread];
  for (int t = 0; t < count_threads(); ++t) later[t] = std::max(later[t], earlier[t]);
  ++earlier[earlier_thread];
}

}  // namespace sparse_unified::emulation::race
