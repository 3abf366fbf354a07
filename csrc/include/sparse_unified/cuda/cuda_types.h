// SPDX-License-Identifier: Apache-2.0
// cudaError_t and cudaStream_t for the declarations of the launch functions.
#pragma once

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/cuda.h"
#else
#include <cuda_runtime_api.h>
#endif
