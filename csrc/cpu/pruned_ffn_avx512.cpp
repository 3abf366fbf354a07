// SPDX-License-Identifier: Apache-2.0
// pruned_ffn for processors with AVX-512.
#define SPARSE_UNIFIED_LEVEL 4
#include "cpu/pruned_ffn_tiles.h"
