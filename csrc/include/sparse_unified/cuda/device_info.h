// SPDX-License-Identifier: Apache-2.0
// What the choice of a kernel needs to know of a device.
#pragma once

#include <cstdint>

namespace sparse_unified {

struct DeviceInfo {
  int compute_capability;          // 10 * major + minor: 80, 86, 89, 90, 100, 120
  int num_multiprocessors;         //
  int64_t shared_bytes_block;      // most dynamic shared memory of one block
  int64_t shared_bytes_processor;  // of a multiprocessor
};

}  // namespace sparse_unified
