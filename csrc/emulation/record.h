// SPDX-License-Identifier: Apache-2.0
// Which kernels would be launched, and with what, without running them: full-size shapes for free.
// And faults planted in them, for the tests of what must find those.
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

// What a kernel of which a name is part does from now on, until another fault is planted; it then
// leaves its last clusters out, or ends the process, or does not come back.
enum class Fault { kNone, kLostClusters, kAbort, kHang };
void plant_fault(Fault fault, std::string kernel);

}  // namespace sparse_unified::emulation
