// SPDX-License-Identifier: Apache-2.0
// The border between kernels and what runs them: nvcc, or the emulator of csrc/emulation on a
// machine without a GPU. Kernels reach the hardware only through this folder, one function for one
// instruction; each has a twin of the same name and signature in csrc/emulation.
#pragma once

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#define SPARSE_UNIFIED_DEVICE __device__ __forceinline__
#define SPARSE_UNIFIED_HOST_DEVICE __host__ __device__ __forceinline__

namespace sparse_unified {

constexpr int kWarpSize = 32;

// Which index of an operand [M or N, K] of a product is contiguous in memory.
enum class Major { kK, kMN };

#if !defined(SPARSE_UNIFIED_EMULATION)

// The dynamic shared memory of the block, the only kind kernels use: the emulator fills it with NaN
// and guards its end.
SPARSE_UNIFIED_DEVICE unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char sparse_unified_shared_memory[];
  return sparse_unified_shared_memory;
}

// Address of a pointer into shared memory, as instructions take it.
SPARSE_UNIFIED_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// bar.sync 0: all threads of the block.
SPARSE_UNIFIED_DEVICE void sync_threads() { __syncthreads(); }

// bar.warp.sync: all lanes of the warp; orders their memory accesses.
SPARSE_UNIFIED_DEVICE void sync_warp() { __syncwarp(); }

// Ends the kernel with an error: an argument the host could not check without waiting is wrong.
SPARSE_UNIFIED_DEVICE void device_check(bool ok) {
  if (!ok) __trap();
}

// The same pointer, which the compiler keeps where it would compute it again.
template <typename T>
SPARSE_UNIFIED_DEVICE T* kept_pointer(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

#endif

SPARSE_UNIFIED_DEVICE int lane_idx() { return static_cast<int>(threadIdx.x) % kWarpSize; }
SPARSE_UNIFIED_DEVICE int warp_idx() { return static_cast<int>(threadIdx.x) / kWarpSize; }

template <typename T>
SPARSE_UNIFIED_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace sparse_unified
