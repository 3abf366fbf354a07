// SPDX-License-Identifier: Apache-2.0
// pruned_ffn for processors with AVX2 and FMA.
#define SPARSE_UNIFIED_LEVEL 3
#include "cpu/pruned_ffn_tiles.h"
