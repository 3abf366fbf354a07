// SPDX-License-Identifier: Apache-2.0
// Which kernels would be launched, and with what, without running them: full-size shapes for free.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparse_unified::emulation {

struct RecordedLaunch {
  std::string kernel;    // its name and template arguments, as C++ writes them
  int num_threads;       // of a block
  int64_t shared_bytes;  // dynamic shared memory of a block
};

// From now on launches are recorded instead of run, and those recorded before are forgotten; or
// launches run again.
void record_launches(bool is_recording);
const std::vector<RecordedLaunch>& recorded_launches();

}  // namespace sparse_unified::emulation
