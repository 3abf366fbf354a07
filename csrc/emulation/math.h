// SPDX-License-Identifier: Apache-2.0
// Twin of device/math.h: the exact value, rounded; the hardware's may differ in the last two bits.
// Arguments and results below the smallest normal number count as zero.
#pragma once

#include <cmath>

namespace sparse_unified {
namespace emulation {

SPARSE_UNIFIED_DEVICE float flush_to_zero(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}

}  // namespace emulation

SPARSE_UNIFIED_DEVICE float exp2_approx(float value) {
  return emulation::flush_to_zero(std::exp2(emulation::flush_to_zero(value)));
}
SPARSE_UNIFIED_DEVICE float reciprocal_approx(float value) {
  return emulation::flush_to_zero(1.0f / emulation::flush_to_zero(value));
}

}  // namespace sparse_unified
