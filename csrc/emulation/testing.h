// SPDX-License-Identifier: Apache-2.0
// For tests of emulated kernels: device memory that notices what kernels must not do, and runs
// under many schedules.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "emulation/schedule.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sparse_unified::emulation {

// Builds with sanitizers or race detection take a tenth of the speed: they run small shapes. So do
// the others, unless the environment asks for the deep tests (make test-all).
#if defined(SPARSE_UNIFIED_EMULATION_SMALL)
constexpr bool kIsSmall = true;
#else
inline const bool kIsSmall = std::getenv("SPARSE_UNIFIED_TEST_DEEP") == nullptr;
#endif

// Whether every access of a kernel reaches the race detector.
#if defined(__SANITIZE_THREAD__)
constexpr bool kDetectsRaces = true;
#else
constexpr bool kDetectsRaces = false;
#endif

// Of a shape or a count, the one for this scale.
template <typename T>
T by_scale(T full, T small) {
  return kIsSmall ? small : full;
}

// Schedules that between them show most bugs: every order of threads with every timing of copies,
// then `num_random` further seeds. Small scale takes a few; the environment variables of schedule.h
// leave one.
inline std::vector<Schedule> schedules(int num_random = 2) {
  if (is_schedule_from_environment()) return {schedule()};
  std::vector<Schedule> all;
  if (kIsSmall) {
    all = {{1, Order::kForward, Copies::kLazy},
           {2, Order::kReverse, Copies::kRandom},
           {3, Order::kRandom, Copies::kEager},
           {4, Order::kPriorities, Copies::kRandom}};
    return all;
  }
  uint64_t seed = 1;
  for (const Order order : {Order::kForward, Order::kReverse, Order::kRandom, Order::kPriorities}) {
    for (const Copies copies : {Copies::kLazy, Copies::kEager, Copies::kRandom}) {
      all.push_back({seed++, order, copies});
    }
  }
  for (int i = 0; i < num_random; ++i) {
    all.push_back({seed++, i % 2 ? Order::kPriorities : Order::kRandom, Copies::kRandom});
  }
  return all;
}

// Calls body() under each of the schedules, the first left in place at the end. An Error or a
// failed check ends it: the schedule is printed, and the number of failures returned is not 0.
// `failures` counts the checks that failed so far.
template <typename Failures, typename Body>
int for_each_schedule(const char* name, const std::vector<Schedule>& all, Failures&& failures,
                      Body&& body) {
  const Schedule before = schedule();
  int num_failed = 0;
  for (const Schedule& one : all) {
    const int failures_before = failures();
    set_schedule(one);
    try {
      body();
    } catch (const Error& error) {
      std::fprintf(stderr, "%s: %s\n", name, error.what());
      ++num_failed;
    }
    if (failures() != failures_before) {
      std::fprintf(stderr, "%s: checks failed under %s\n", name, describe(one).c_str());
      ++num_failed;
    }
    if (num_failed) break;
  }
  set_schedule(before);
  return num_failed;
}

// The message of the Error under the first of the schedules in which body() throws one; empty when
// none does.
template <typename Body>
std::string first_error(const std::vector<Schedule>& all, Body&& body) {
  const Schedule before = schedule();
  std::string message;
  for (const Schedule& one : all) {
    set_schedule(one);
    try {
      body();
    } catch (const Error& error) {
      message = error.what();
      break;
    }
  }
  set_schedule(before);
  return message;
}

// `n` values of device memory, aligned as cudaMalloc does, between two guard zones; floating-point
// types start as NaN, integers as 0x7f7f... The address sanitizer sees the zones.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t n) : size_(n), bytes_(2 * kZoneBytes + data_bytes() + kAlignment) {
    memory_ = std::make_unique<unsigned char[]>(bytes_);
    auto address = reinterpret_cast<uintptr_t>(memory_.get()) + kZoneBytes;
    address = (address + kAlignment - 1) / kAlignment * kAlignment;
    data_ = reinterpret_cast<T*>(address);
    std::memset(memory_.get(), kZone, bytes_);
    poison();
    protect();
  }
  ~DeviceArray() { unprotect(); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }

  // All values as if nobody had written them.
  void poison() { std::memset(static_cast<void*>(data_), kUnwritten, data_bytes()); }

  // Index of the first value that nobody has written since, or -1.
  int64_t first_unwritten() const {
    for (int64_t i = 0; i < size_; ++i) {
      const auto* value = reinterpret_cast<const unsigned char*>(data_ + i);
      size_t byte = 0;
      while (byte < sizeof(T) && value[byte] == kUnwritten) ++byte;
      if (byte == sizeof(T)) return i;
    }
    return -1;
  }

  // Throws an Error when something was written before or behind the values.
  void check_guards(const char* name) {
    unprotect();
    const auto* begin = reinterpret_cast<unsigned char*>(data_);
    const auto* end = begin + data_bytes();
    for (const unsigned char* at = memory_.get(); at < memory_.get() + bytes_; ++at) {
      if (at == begin) at = end;
      if (*at == kZone) continue;
      throw Error(std::string(name) + ": a write to byte " + std::to_string(at - begin) + " of " +
                  std::to_string(data_bytes()));
    }
    protect();
  }

 private:
  static constexpr size_t kZoneBytes = 1024;
  static constexpr size_t kAlignment = 256;
  static constexpr int kZone = 0xff;  // NaN to kernels that read it
  static constexpr unsigned char kUnwritten = std::is_integral_v<T> ? 0x7f : 0xff;

  size_t data_bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  void protect() {
#if defined(__SANITIZE_ADDRESS__)
    auto* begin = reinterpret_cast<unsigned char*>(data_);
    __asan_poison_memory_region(memory_.get(), static_cast<size_t>(begin - memory_.get()));
    unsigned char* end = begin + data_bytes();
    __asan_poison_memory_region(end, static_cast<size_t>(memory_.get() + bytes_ - end));
#endif
  }
  void unprotect() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_.get(), bytes_);
#endif
  }

  int64_t size_;
  size_t bytes_;
  std::unique_ptr<unsigned char[]> memory_;
  T* data_ = nullptr;
};

}  // namespace sparse_unified::emulation
