// SPDX-License-Identifier: Apache-2.0
// The device that bindings see in the emulator: the limits of one, by its compute capability.
#pragma once

#include "sparse_unified/cuda/device_info.h"

namespace sparse_unified::emulation {

// At first that of SPARSE_UNIFIED_EMULATION_DEVICE (80, 86, 89, 90, 100 or 120; 80 without it).
// std::invalid_argument names a capability that is none of them.
// With `num_multiprocessors` it has so many instead of its own: few make a persistent block compute
// several tiles.
DeviceInfo device_info();
void set_device(int compute_capability, int num_multiprocessors = 0);

}  // namespace sparse_unified::emulation
