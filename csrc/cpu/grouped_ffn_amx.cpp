// SPDX-License-Identifier: Apache-2.0
// grouped_ffn in bf16 for processors with AMX_BF16.
#define SPARSE_UNIFIED_LEVEL 6
#include "cpu/grouped_ffn_tiles.h"
