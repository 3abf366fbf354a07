// SPDX-License-Identifier: Apache-2.0
// Which instructions the CPU kernels were compiled for, and which of them run here.
#pragma once

namespace sparse_unified {

// All sets that the library holds, weakest first: "baseline, x86-64-v3, x86-64-v4".
const char* instruction_sets_compiled();

// The one that the kernels run on this machine.
const char* instruction_set_used();

// Whether it runs the fp32 FFN kernels, which need AVX2 and FMA, or AVX-512.
bool ffn_cpu_supported();

}  // namespace sparse_unified
