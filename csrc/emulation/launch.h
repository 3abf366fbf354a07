// SPDX-License-Identifier: Apache-2.0
// Twin of device/launch.h: runs the kernel before it returns.
#pragma once

namespace sparse_unified {
namespace emulation {

// One kernel with its parameters, types forgotten.
struct Call {
  const void* kernel;
  void (*run)(const Call& call);
  const void* params;
};

cudaError_t run_grid(const Call& call, const LaunchConfig& config);

}  // namespace emulation

// Throws emulation::Error when the kernel does what it must not.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config, const Params& params) {
  const auto run = [](const emulation::Call& call) {
    reinterpret_cast<void (*)(Params)>(const_cast<void*>(call.kernel))(
        *static_cast<const Params*>(call.params));
  };
  return emulation::run_grid({reinterpret_cast<const void*>(kernel), run, &params}, config);
}

}  // namespace sparse_unified
