// SPDX-License-Identifier: Apache-2.0
// Lets Python choose how the emulator runs the CUDA kernels that this library puts behind the ops:
// torch.ops.sparse_unified_emulation.
#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "emulation/device.h"
#include "emulation/record.h"
#include "emulation/schedule.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified::emulation {
namespace {

// `order` and `copies` are indices of the enums of schedule.h.
void set_schedule_by_index(int64_t seed, int64_t order, int64_t copies) {
  set_schedule(
      {static_cast<uint64_t>(seed), static_cast<Order>(order), static_cast<Copies>(copies)});
}

void set_device_by_capability(int64_t compute_capability, int64_t num_multiprocessors) {
  set_device(static_cast<int>(compute_capability), static_cast<int>(num_multiprocessors));
}

// `fault` is an index of the enum of record.h.
void plant_fault_by_index(int64_t fault, std::string kernel) {
  plant_fault(static_cast<Fault>(fault), std::move(kernel));
}

void set_rules(std::string text) { set_grouped_ffn_rules(text); }

// A line for each: threads, bytes of shared memory, kernel.
std::string recorded_launches_as_text() {
  std::string text;
  for (const RecordedLaunch& launch : recorded_launches()) {
    text += std::to_string(launch.num_threads) + " " + std::to_string(launch.shared_bytes) + " " +
            launch.kernel + "\n";
  }
  return text;
}

}  // namespace
}  // namespace sparse_unified::emulation

STABLE_TORCH_LIBRARY(sparse_unified_emulation, m) {
  m.def("set_schedule(int seed, int order, int copies) -> ()");
  m.def("set_device(int compute_capability, int num_multiprocessors=0) -> ()");
  m.def("record_launches(bool is_recording) -> ()");
  m.def("recorded_launches() -> str");
  m.def("set_rules(str text) -> ()");
  m.def("plant_fault(int fault, str kernel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_unified_emulation, CompositeExplicitAutograd, m) {
  m.impl("set_schedule", TORCH_BOX(&sparse_unified::emulation::set_schedule_by_index));
  m.impl("set_device", TORCH_BOX(&sparse_unified::emulation::set_device_by_capability));
  m.impl("record_launches", TORCH_BOX(&sparse_unified::emulation::record_launches));
  m.impl("plant_fault", TORCH_BOX(&sparse_unified::emulation::plant_fault_by_index));
  m.impl("set_rules", TORCH_BOX(&sparse_unified::emulation::set_rules));
  m.impl("recorded_launches", TORCH_BOX(&sparse_unified::emulation::recorded_launches_as_text));
}
