// SPDX-License-Identifier: Apache-2.0
// What the tests of CUDA kernels in the emulator share: a schedule for each launch, poisoned
// outputs, equality of bits, kernels that must refuse their arguments.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "emulation/testing.h"
#include "sparse_unified/cuda/cuda_types.h"

namespace sparse_unified::test {

// Goes on to the next of the emulator's schedules: a test that runs a kernel on many inputs, and
// twice on each, sees all of them.
inline void next_schedule() {
  static size_t next = 0;
  const std::vector<emulation::Schedule> schedules = emulation::schedules();
  emulation::set_schedule(schedules[next++ % schedules.size()]);
}

// Not a number in any floating-point type, and -1.
template <typename T>
void poison(Array<T>& array) {
  if (array.size() > 0) {
    std::memset(static_cast<void*>(array.get()), 0xff, array.size() * sizeof(T));
  }
}

template <typename T>
void check_bits(const char* what, Array<T>& out, Array<T>& expected) {
  for (int64_t i = 0; i < out.size(); ++i) {
    if (std::memcmp(&out[i], &expected[i], sizeof(T)) != 0) {
      fail(what, i, static_cast<double>(Traits<T>::value(out[i])),
           static_cast<double>(Traits<T>::value(expected[i])));
      return;
    }
  }
}

inline void check_launch(const char* what, cudaError_t error) {
  check_equal(what, 0, static_cast<double>(error), static_cast<double>(cudaSuccess));
}

// The kernels that `launch` starts must find an argument out of range.
template <typename Launch>
void check_stops(const char* what, const Launch& launch) {
  std::string error = "no error";
  try {
    launch();
  } catch (const emulation::Error& e) {
    error = e.what();
  }
  if (error.find("device_check failed") != std::string::npos) return;
  ++failures();
  std::fprintf(stderr, "%s: must fail a device_check, got: %s\n", what, error.c_str());
}

// Runs the tests of a program; an error of the emulator, which says where and under which schedule,
// ends them.
template <typename Body>
int run_tests(const char* name, const Body& body) {
  try {
    body();
  } catch (const emulation::Error& e) {
    ++failures();
    std::fprintf(stderr, "%s\n", e.what());
  }
  return finish(name);
}

}  // namespace sparse_unified::test
