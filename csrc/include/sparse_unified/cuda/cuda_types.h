// SPDX-License-Identifier: Apache-2.0
// cudaError_t and cudaStream_t for the declarations of the launch functions. A build without CUDA
// (SPARSE_UNIFIED_WITH_CUDA is not defined) has the declarations and calls none of them.
#pragma once

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/cuda.h"
#elif defined(SPARSE_UNIFIED_WITH_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
enum cudaError_t { cudaSuccess };
using cudaStream_t = struct CUstream_st*;
#endif
