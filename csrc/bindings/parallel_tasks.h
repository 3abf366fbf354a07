// SPDX-License-Identifier: Apache-2.0
// Dynamic scheduling on top of torch's static parallel_for, and working memory of the tasks.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "bindings/common.h"

namespace sparse_unified {

inline int64_t num_workers(int64_t num_tasks) {
  return std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
}

// Calls run(task, worker) once for each task, next free worker first; worker < num_workers(...).
// Tasks must not depend on each other; then the result does not depend on who ran what.
template <typename F>
void parallel_tasks(int64_t num_tasks, const F& run) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  torch::stable::parallel_for(0, num_workers(num_tasks), 1, [&](int64_t worker, int64_t) {
    try {
      for (int64_t task = next++; task < num_tasks; task = next++) run(task, worker);
    } catch (...) {  // torch would keep nothing of it
      const std::lock_guard lock(error_mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

constexpr int64_t kLineBytes = 64;

constexpr int64_t round_to_line(int64_t bytes) {
  return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// Memory for `num_workers` workers, `bytes` each, on cache-line boundaries.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t num_workers, int64_t bytes)
      : storage_(empty_like_sized(like, {num_workers * round_to_line(bytes) / 4 + kLineBytes},
                                  ScalarType::Float)),
        base_(reinterpret_cast<char*>(
            round_to_line(reinterpret_cast<intptr_t>(storage_.mutable_data_ptr())))),
        stride_(round_to_line(bytes)) {}

  char* get(int64_t worker) const { return base_ + worker * stride_; }
  float* floats(int64_t worker) const { return reinterpret_cast<float*>(get(worker)); }

 private:
  Tensor storage_;
  char* base_;
  int64_t stride_;
};

}  // namespace sparse_unified
