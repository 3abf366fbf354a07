// SPDX-License-Identifier: Apache-2.0
// Twin of device/vector.h. Conversions round to nearest, ties to even, keep subnormals, overflow to
// infinity and turn every NaN into 0x7fff, as cvt.rn does.
#pragma once

#include <bit>
#include <cmath>

namespace sparse_unified {
namespace emulation {

// Ends the kernel when `pointer` is not a multiple of `alignment`.
void check_aligned(const char* access, const void* pointer, int alignment);
// A read of data that nobody may write during the kernel.
void check_constant(const void* pointer, int num_bytes);

SPARSE_UNIFIED_DEVICE float half_to_float(uint16_t bits) {
  // The fields in place, then the difference of the exponent biases by an exact product.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  uint32_t out = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if ((bits & 0x7c00u) == 0x7c00u) out |= 0x7f800000u;  // infinity and NaN
  return std::bit_cast<float>(out | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

SPARSE_UNIFIED_DEVICE uint16_t float_to_half(float value) {
  constexpr uint32_t kNan = 0x7fff;
  constexpr uint32_t kInfinity = 0x7c00;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const float magnitude = std::bit_cast<float>(bits & 0x7fffffffu);
  if (magnitude != magnitude) return kNan;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | kInfinity);
  if (magnitude < 0x1p-14f) {
    // Subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits, rounded.
    const uint32_t rounded = std::bit_cast<uint32_t>(magnitude + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - std::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - ((127u - 15u) << 10)));
}

SPARSE_UNIFIED_DEVICE float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

SPARSE_UNIFIED_DEVICE uint16_t float_to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace emulation

SPARSE_UNIFIED_DEVICE Vector16 load_vector(const void* pointer) {
  emulation::check_aligned("load_vector", pointer, kVectorBytes);
  return *static_cast<const Vector16*>(pointer);
}
SPARSE_UNIFIED_DEVICE void store_vector(void* pointer, const Vector16& value) {
  emulation::check_aligned("store_vector", pointer, kVectorBytes);
  *static_cast<Vector16*>(pointer) = value;
}
SPARSE_UNIFIED_DEVICE Vector16 load_vector_once(const void* pointer) {
  emulation::check_aligned("load_vector_once", pointer, kVectorBytes);
  emulation::check_constant(pointer, kVectorBytes);
  return *static_cast<const Vector16*>(pointer);
}

SPARSE_UNIFIED_DEVICE float to_float(float value) { return value; }
SPARSE_UNIFIED_DEVICE float to_float(BFloat16 value) {
  return emulation::bfloat16_to_float(value.bits);
}
SPARSE_UNIFIED_DEVICE float to_float(Float16 value) { return emulation::half_to_float(value.bits); }

template <typename T>
SPARSE_UNIFIED_DEVICE T from_float(float value);
template <>
SPARSE_UNIFIED_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
SPARSE_UNIFIED_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {emulation::float_to_bfloat16(value)};
}
template <>
SPARSE_UNIFIED_DEVICE Float16 from_float<Float16>(float value) {
  return {emulation::float_to_half(value)};
}

template <typename T>
SPARSE_UNIFIED_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

SPARSE_UNIFIED_DEVICE float exponential(float value) { return std::exp(value); }

}  // namespace sparse_unified
