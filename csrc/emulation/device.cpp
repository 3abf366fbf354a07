// SPDX-License-Identifier: Apache-2.0
#include "emulation/device.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sparse_unified::emulation {
namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors
// of an A100, RTX 3090, RTX 4090, H200, B200 and RTX 5090.
constexpr DeviceInfo kDevices[] = {
    {80, 108, 163 * 1024, 164 * 1024},  {86, 82, 99 * 1024, 100 * 1024},
    {89, 128, 99 * 1024, 100 * 1024},   {90, 132, 227 * 1024, 228 * 1024},
    {100, 148, 227 * 1024, 228 * 1024}, {120, 170, 99 * 1024, 100 * 1024},
};

DeviceInfo find_device(const std::string& name) {
  for (const DeviceInfo& device : kDevices) {
    if (name == std::to_string(device.compute_capability)) return device;
  }
  throw std::invalid_argument(
      "emulation: SPARSE_UNIFIED_EMULATION_DEVICE must be 80, 86, 89, 90, 100 or 120, got " + name);
}

DeviceInfo& current() {
  static DeviceInfo device = [] {
    const char* name = std::getenv("SPARSE_UNIFIED_EMULATION_DEVICE");
    return find_device(name == nullptr ? "80" : name);
  }();
  return device;
}

}  // namespace

DeviceInfo device_info() { return current(); }

void set_device(int compute_capability, int num_multiprocessors) {
  current() = find_device(std::to_string(compute_capability));
  if (num_multiprocessors > 0) current().num_multiprocessors = num_multiprocessors;
}

}  // namespace sparse_unified::emulation
