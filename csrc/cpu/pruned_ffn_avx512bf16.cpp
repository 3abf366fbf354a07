// SPDX-License-Identifier: Apache-2.0
// pruned_ffn in bf16 for processors with AVX512_BF16.
#define SPARSE_UNIFIED_LEVEL 5
#include "cpu/pruned_ffn_tiles.h"
