// SPDX-License-Identifier: Apache-2.0
// What every CUDA binding needs around a launch: the device and stream of the caller, memory from
// torch's allocator, and errors with the name of the op.
#pragma once

#include <optional>

#include "bindings/common.h"
#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/cuda/device_info.h"

#if !defined(SPARSE_UNIFIED_EMULATION)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace sparse_unified::cuda {

// Makes the device of `like` current for its lifetime; launches go to its current stream.
class Context {
 public:
  Context(const char* op, const Tensor& like);

  cudaStream_t stream() const { return stream_; }
  const DeviceInfo& device() const { return device_; }

  // Throws when `error`, from a launch of this op, is one.
  void check(cudaError_t error) const;

  // Uninitialised bytes that live at least until the launches of this call have run.
  Tensor workspace(int64_t bytes) const;

 private:
  const char* op_;
  Tensor like_;
#if !defined(SPARSE_UNIFIED_EMULATION)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_;
  DeviceInfo device_;
};

// The tensor itself when its rows are dense and start at multiples of 16 bytes, as kernels load
// them; a contiguous copy otherwise.
Tensor with_vector_rows(const Tensor& tensor);

// The same without gaps between the rows.
Tensor contiguous_vector_rows(const Tensor& tensor);

}  // namespace sparse_unified::cuda
