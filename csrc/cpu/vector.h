// SPDX-License-Identifier: Apache-2.0
// What every CPU kernel is written with: conversions the compiler can vectorise, and one attribute
// that compiles a function for several instruction sets and chooses among them at run time.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_unified/dtype.h"

// NOTE: a wheel runs on machines older than the one that built it, so -march=native is out. ifunc
// resolvers run before the sanitizers are ready, so sanitized builds take the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SPARSE_UNIFIED_MULTIVERSION \
  __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define SPARSE_UNIFIED_MULTIVERSION
#endif

#define SPARSE_UNIFIED_INLINE inline __attribute__((always_inline))

namespace sparse_unified {

SPARSE_UNIFIED_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SPARSE_UNIFIED_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

SPARSE_UNIFIED_INLINE float to_float(float value) { return value; }

SPARSE_UNIFIED_INLINE float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}

SPARSE_UNIFIED_INLINE float to_float(Float16 value) {
  // Half and float differ by 112 in exponent bias; the multiplication also lifts subnormals.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t scaled = float_bits(bits_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity or NaN
  return bits_float(sign | (magnitude >= 0x0f800000u ? special : scaled));
}

template <typename T>
T from_float(float value);

template <>
SPARSE_UNIFIED_INLINE float from_float<float>(float value) {
  return value;
}

template <>
SPARSE_UNIFIED_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
SPARSE_UNIFIED_INLINE Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal result: drop 13 bits, nearest, ties to even, and move the exponent bias from 127 to 15.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal result: adding 0.5 makes the hardware round at the last bit a half keeps.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;  // 2^-14
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;            // 65520 rounds to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;             // NaN
  return Float16{static_cast<uint16_t>(sign | result)};
}

// e^x to about 2 ulp; arguments beyond +-87 are clamped there, NaN stays NaN.
SPARSE_UNIFIED_INLINE float exp_float(float x) {
  constexpr float kLog2e = 1.442695041f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor polynomial of degree 7 on |r| <= ln(2) / 2, truncation error below 6e-9.
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (float_bits(shifted) - float_bits(kRound) + 127u) << 23;
  return p * bits_float(exponent);
}

SPARSE_UNIFIED_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_float(-x)); }

}  // namespace sparse_unified
