// SPDX-License-Identifier: Apache-2.0
// Checks of plain vector accesses; the accesses themselves are the kernel's own.
#include "device/vector.h"
#include "emulation/block.h"
#include "emulation/race.h"

namespace sparse_unified::emulation {

void check_aligned(const char* access, const void* pointer, int alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(alignment) == 0) return;
  const InEmulator in_emulator;
  fail("%s: misaligned address %p, not a multiple of %d", access, pointer, alignment);
}

void check_constant(const void* pointer, int num_bytes) {
  if (!current) return;
  const InEmulator in_emulator;
  race::access(current->idx, pointer, num_bytes, race::Kind::kConstantRead,
               __builtin_return_address(0));
}

}  // namespace sparse_unified::emulation
