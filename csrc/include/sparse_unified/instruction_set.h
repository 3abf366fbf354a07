// SPDX-License-Identifier: Apache-2.0
// Which instructions the CPU kernels were compiled for, and which of them run here.
#pragma once

#include "sparse_unified/dtype.h"

namespace sparse_unified {

// All sets that the library holds, weakest first: "baseline, x86-64-v3, x86-64-v4".
const char* instruction_sets_compiled();

// The one that the kernels run on this machine.
const char* instruction_set_used();

// The kernels of an FFN, weakest first.
enum class FfnLevel { kNone, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Which of them run it in this type: the strongest that this processor has, and at most the one
// that the environment variable SPARSE_UNIFIED_CPU_FFN names: none, avx2, avx512, avx512bf16 or
// amx.
FfnLevel ffn_level(DType dtype);

// "AMX", as processors are described.
const char* ffn_level_name(FfnLevel level);

// Whether its own instructions multiply this type, as torch's GEMMs then do; without them a GEMM of
// 16-bit types takes several times what one of fp32 does.
bool has_arithmetic(DType dtype);

// Whether the FFN kernels are the fastest way here.
inline bool prefers_ffn_cpu(DType dtype) { return ffn_level(dtype) != FfnLevel::kNone; }

}  // namespace sparse_unified
