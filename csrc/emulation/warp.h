// SPDX-License-Identifier: Apache-2.0
// Twin of device/warp.h.
#pragma once

#include <bit>

namespace sparse_unified {
namespace emulation {

// The value that lane `source_lane` of the warp brings.
uint32_t exchange(const char* name, uint32_t value, int source_lane);
uint32_t vote(bool predicate);

template <typename T>
SPARSE_UNIFIED_DEVICE T exchange_as(const char* name, T value, int source_lane) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(exchange(name, std::bit_cast<uint32_t>(value), source_lane));
}

}  // namespace emulation

template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle_xor(T value, int lane_mask) {
  return emulation::exchange_as("shuffle_xor", value, lane_idx() ^ lane_mask);
}
template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle(T value, int source_lane) {
  return emulation::exchange_as("shuffle", value, source_lane % kWarpSize);
}
template <typename T>
SPARSE_UNIFIED_DEVICE T shuffle_up(T value, int delta) {
  const int source_lane = lane_idx() - delta;
  return emulation::exchange_as("shuffle_up", value, source_lane < 0 ? lane_idx() : source_lane);
}

SPARSE_UNIFIED_DEVICE uint32_t ballot(bool predicate) { return emulation::vote(predicate); }

SPARSE_UNIFIED_DEVICE int count_bits(uint32_t bits) { return std::popcount(bits); }
SPARSE_UNIFIED_DEVICE int find_first_bit(uint32_t bits) {
  return bits ? std::countr_zero(bits) + 1 : 0;
}

}  // namespace sparse_unified
