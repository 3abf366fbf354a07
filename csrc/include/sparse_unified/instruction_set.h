// SPDX-License-Identifier: Apache-2.0
// Which instructions the CPU kernels were compiled for, and which of them run here.
#pragma once

#include "sparse_unified/dtype.h"

namespace sparse_unified {

// All sets that the library holds, weakest first: "baseline, x86-64-v3, x86-64-v4".
const char* instruction_sets_compiled();

// The one that the kernels run on this machine.
const char* instruction_set_used();

// Whether it runs the FFN kernels, which need AVX2 and FMA, or AVX-512.
bool ffn_cpu_supported();

// Whether its own instructions multiply this type, as torch's GEMMs then do; without them a GEMM of
// 16-bit types takes several times what one of fp32 does.
bool has_arithmetic(DType dtype);

// Whether the FFN kernels are the fastest way here: of fp32, and of what they alone do in fp32.
inline bool prefers_ffn_cpu(DType dtype) {
  return ffn_cpu_supported() && (dtype == DType::kFloat32 || !has_arithmetic(dtype));
}

}  // namespace sparse_unified
