// SPDX-License-Identifier: Apache-2.0
// What a warp-specialised kernel of sm_90a needs beside its copies and products: registers moved
// between warpgroups, barriers of a part of the block, fences between the generic and the
// asynchronous proxy, and the order of dependent kernels.
#pragma once

#include "device/platform.h"

namespace sparse_unified {

constexpr int kWarpgroupSize = 128;

}  // namespace sparse_unified

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/warpgroup.h"
#else

namespace sparse_unified {

// setmaxnreg.{inc,dec}.sync.aligned.u32: registers of each thread of this warpgroup, a multiple of
// 8. The kernel needs __launch_bounds__(threads, 1).
template <int kRegisters>
SPARSE_UNIFIED_DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SPARSE_UNIFIED_DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// bar.sync id, count: the threads of some warps; id from 1 to 15 (0 is sync_threads).
SPARSE_UNIFIED_DEVICE void sync_named(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// fence.proxy.async.shared::cta: what this thread wrote, or has synchronised with, by ordinary
// stores or cp.async becomes visible to wgmma and TMA.
SPARSE_UNIFIED_DEVICE void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// elect.sync: true in one lane of a full warp, always the same one.
SPARSE_UNIFIED_DEVICE bool elect_lane() {
  uint32_t elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// griddepcontrol.wait: until the kernels before this one in the stream have ended and their
// writes are visible; at once when the launch did not ask to overlap with them.
SPARSE_UNIFIED_DEVICE void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// griddepcontrol.launch_dependents: the next kernel may start; it must wait as above.
SPARSE_UNIFIED_DEVICE void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace sparse_unified

#endif
