// SPDX-License-Identifier: Apache-2.0
// One way to start a kernel, under nvcc and in the emulator.
#pragma once

#include <algorithm>

#include "device/platform.h"

namespace sparse_unified {

struct LaunchConfig {
  dim3 grid;
  int num_threads;           // of a block, a multiple of kWarpSize
  int64_t shared_bytes = 0;  // dynamic shared memory of a block
  int64_t shared_limit = 0;  // the most that any launch of the kernel takes, where they differ
  cudaStream_t stream = nullptr;
  // May start before the kernel in front of it has ended (programmatic dependent launch, sm_90 and
  // up); the kernel calls wait_for_previous_kernel before it reads what that one writes.
  bool overlaps_previous = false;
  // Blocks of a cluster (sm_90 and up), neighbours along x, of which the grid is a multiple.
  int cluster_blocks = 1;
};

// run.operator()<value>() for a `value` that is one of kValues, which kernels are compiled for.
template <auto... kValues, typename Value, class Run>
cudaError_t dispatch_value(Value value, const Run& run) {
  cudaError_t error = cudaErrorInvalidValue;
  (void)((value == kValues && (error = run.template operator()<kValues>(), true)) || ...);
  return error;
}

}  // namespace sparse_unified

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/launch.h"
#else

namespace sparse_unified {

// What a block may use without asking the driver for more.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

// Launches kernel(params); an empty grid is no launch. Errors of the launch are returned, those of
// the kernel come with a later synchronisation, as always.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return cudaSuccess;
  // NOTE: the limit is the kernel's, not the launch's: another thread may launch it with less.
  const int64_t limit = std::max(config.shared_bytes, config.shared_limit);
  if (limit > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = dim3(static_cast<unsigned>(config.num_threads));
  launch_config.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch_config.stream = config.stream;
  cudaLaunchAttribute attributes[3] = {};
  launch_config.attrs = attributes;
  if (config.shared_bytes >= kDefaultSharedBytes) {
    // Or the driver may leave room for one block where registers allow several.
    cudaLaunchAttribute& carveout = attributes[launch_config.numAttrs++];
    carveout.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    carveout.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  if (config.overlaps_previous) {
    cudaLaunchAttribute& overlap = attributes[launch_config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster_blocks > 1) {
    cudaLaunchAttribute& cluster = attributes[launch_config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(config.cluster_blocks), 1, 1};
  }
  return cudaLaunchKernelEx(&launch_config, kernel, params);
}

}  // namespace sparse_unified

#endif
