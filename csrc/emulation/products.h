// SPDX-License-Identifier: Apache-2.0
// The arithmetic of tensor-core instructions, apart from the rest because every variant compiles it
// optimised and without sanitizers.
#pragma once

#include <cstdint>

namespace sparse_unified::emulation {

// Registers of a lane for mma.m16n8k16.
struct ProductLane {
  float d[4];
  uint32_t a[4];
  uint32_t b[2];
};

// The product of a warp's 32 lanes. T: BFloat16 or Float16. Sums are fp32, in the order of k.
template <typename T>
void multiply(ProductLane* lanes);

// The part of a warp of wgmma: d [16, n] (+)= a^T b for a [16 k, 16 m] and b [16 k, n].
constexpr int kWgmmaRows = 16;
constexpr int kWgmmaMaxN = 256;
void multiply_rows(bool is_accumulating, int n, const float (*a)[kWgmmaRows],
                   const float (*b)[kWgmmaMaxN], float (*d)[kWgmmaMaxN]);

}  // namespace sparse_unified::emulation
