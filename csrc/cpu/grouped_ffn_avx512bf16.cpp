// SPDX-License-Identifier: Apache-2.0
// grouped_ffn in bf16 for processors with AVX512_BF16.
#define SPARSE_UNIFIED_LEVEL 5
#include "cpu/grouped_ffn_tiles.h"
