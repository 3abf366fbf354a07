// SPDX-License-Identifier: Apache-2.0
// grouped_ffn for processors with AVX2 and FMA.
#define SPARSE_UNIFIED_LEVEL 3
#include "cpu/grouped_ffn_tiles.h"
