// SPDX-License-Identifier: Apache-2.0
// Warp collectives: all 32 lanes must take part.
#pragma once

#include "device/platform.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/warp.h"
#else

namespace sparse_unified {

constexpr uint32_t kFullMask = 0xffffffffu;

// shfl.sync.{bfly,idx,up}.b32 of a 32-bit value.
template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(kFullMask, value, lane_mask);
}
template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle(T value, int source_lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(kFullMask, value, source_lane);
}
// Lanes below `delta` keep their own value.
template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle_up(T value, int delta) {
  static_assert(sizeof(T) == 4);
  return __shfl_up_sync(kFullMask, value, delta);
}

// vote.sync.ballot.b32: bit i is lane i's predicate.
SPARSE_UNIFIED_DEVICE uint32_t ballot(bool predicate) {
  return __ballot_sync(kFullMask, predicate);
}

// Number of set bits; index of the lowest set bit, from 1, or 0 without any.
SPARSE_UNIFIED_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
SPARSE_UNIFIED_DEVICE int find_first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)); }

}  // namespace sparse_unified

#endif

namespace sparse_unified {

// Sum over kLanes neighbouring lanes, a power of two, in the fixed order of a butterfly; each of
// them gets it.
template <int kLanes = kWarpSize>
SPARSE_UNIFIED_DEVICE float warp_sum(float value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace sparse_unified
