// SPDX-License-Identifier: Apache-2.0
// grouped_ffn for processors with AVX-512.
#define SPARSE_UNIFIED_LEVEL 4
#include "cpu/grouped_ffn_tiles.h"
