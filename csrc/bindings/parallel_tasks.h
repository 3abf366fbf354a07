// SPDX-License-Identifier: Apache-2.0
// Dynamic scheduling on top of torch's static parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace sparse_unified {

inline int64_t num_workers(int64_t num_tasks) {
  return std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
}

// Calls run(task, worker) once for each task, next free worker first; worker < num_workers(...).
// Tasks must not depend on each other; then the result does not depend on who ran what.
template <typename F>
void parallel_tasks(int64_t num_tasks, const F& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers(num_tasks), 1, [&](int64_t worker, int64_t) {
    for (int64_t task = next++; task < num_tasks; task = next++) run(task, worker);
  });
}

}  // namespace sparse_unified
