// SPDX-License-Identifier: Apache-2.0
// Where an op runs, and what a launch on CUDA needs: the device and stream of the caller, memory
// from torch's allocator, and errors with the name of the op.
#pragma once

#include <optional>

#include "bindings/common.h"
#include "sparse_unified/cuda/cuda_types.h"
#include "sparse_unified/cuda/device_info.h"

#if !defined(SPARSE_UNIFIED_EMULATION)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace sparse_unified {

#if defined(SPARSE_UNIFIED_WITH_CUDA) || defined(SPARSE_UNIFIED_EMULATION)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Whether the CUDA kernels take an op on this tensor: those of the emulator take everything.
bool runs_on_cuda(const Tensor& tensor);

// On CUDA, makes the device of `like` current for its lifetime; launches go to its current stream.
class Context {
 public:
  Context(const char* op, const Tensor& like);

  bool is_cuda() const { return is_cuda_; }
  const DeviceInfo& device() const { return device_; }

  // On CUDA, calls launch(stream) -> cudaError_t, throws when that is an error, and returns true.
  // NOTE: a build without CUDA has no launch functions, and must not name them in other ways.
  template <class Launch>
  bool launch(const Launch& launch) const {
    if constexpr (kHasCuda) {
      if (is_cuda_) check(launch(stream_));
    }
    return is_cuda_;
  }

  // Uninitialised bytes that live at least until the launches of this call have run.
  Tensor workspace(int64_t bytes) const;

 private:
  void check(cudaError_t error) const;

  const char* op_;
  Tensor like_;
  bool is_cuda_;
#if !defined(SPARSE_UNIFIED_EMULATION)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  cudaStream_t stream_ = nullptr;
  DeviceInfo device_{};
};

// Indices as an op looks at them and then uses them: contiguous, and on the CPU always a copy, so
// that no other thread can change them in between.
Tensor own_indices(const Tensor& indices);

// The tensor itself when its rows are dense and start at multiples of 16 bytes, as kernels load
// them; a contiguous copy otherwise.
Tensor with_vector_rows(const Tensor& tensor);

// The same without gaps between the rows.
Tensor contiguous_vector_rows(const Tensor& tensor);

}  // namespace sparse_unified
