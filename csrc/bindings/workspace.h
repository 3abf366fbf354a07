// SPDX-License-Identifier: Apache-2.0
// Working memory of the tasks of an op.
#pragma once

#include "bindings/common.h"

namespace sparse_unified {

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

 private:
  Tensor storage_;
  char* base_;
  int64_t stride_;
};

}  // namespace sparse_unified
