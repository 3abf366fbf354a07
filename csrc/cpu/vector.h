// SPDX-License-Identifier: Apache-2.0
// What every CPU kernel is written with: vectors of 16 fp32 lanes in the compiler's own vector
// types, conversions from and to storage, and one attribute that compiles a function for several
// instruction sets and chooses among them at run time.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_unified/dtype.h"

// NOTE: a wheel runs on machines older than the one that built it, so -march=native is out. ifunc
// resolvers run before the sanitizers are ready, so sanitized builds take the baseline.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !defined(SPARSE_UNIFIED_SINGLE_VERSION)  // set by tests that fix the instruction set
#define SPARSE_UNIFIED_HAS_MULTIVERSION
#define SPARSE_UNIFIED_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPARSE_UNIFIED_MULTIVERSION
#endif

#define SPARSE_UNIFIED_INLINE inline __attribute__((always_inline))

namespace sparse_unified {

constexpr int64_t kLanes = 16;
constexpr int64_t kHalfLanes = kLanes / 2;

using Float = float __attribute__((vector_size(4 * kLanes)));
using HalfFloat = float __attribute__((vector_size(4 * kHalfLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using UInt = uint32_t __attribute__((vector_size(4 * kLanes)));
using UShort = uint16_t __attribute__((vector_size(2 * kLanes)));

template <typename To, typename From>
SPARSE_UNIFIED_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

SPARSE_UNIFIED_INLINE Float broadcast(float v) {
  return Float{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}

// Storage bits of 16-bit types to fp32 and back, nearest, ties to even.
SPARSE_UNIFIED_INLINE Float widen(BFloat16, const UInt& bits) {
  return bit_cast<Float>(bits << 16);
}

SPARSE_UNIFIED_INLINE Float widen(Float16, const UInt& bits) {
  // Half and float differ by 112 in exponent bias; the multiplication also lifts subnormals.
  const UInt magnitude = (bits & 0x7fffu) << 13;
  const UInt scaled = bit_cast<UInt>(bit_cast<Float>(magnitude) * 0x1p112f);
  const UInt special = magnitude | 0x7f800000u;  // infinity or NaN
  const UInt value = magnitude >= 0x0f800000u ? special : scaled;
  return bit_cast<Float>((bits & 0x8000u) << 16 | value);
}

SPARSE_UNIFIED_INLINE UInt narrow(BFloat16, const Float& value) {
  const UInt bits = bit_cast<UInt>(value);
  const UInt rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInt nan = UInt{} + 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

SPARSE_UNIFIED_INLINE UInt narrow(Float16, const Float& value) {
  const UInt bits = bit_cast<UInt>(value);
  const UInt magnitude = bits & 0x7fffffffu;
  // Normal result: drop 13 bits and move the exponent bias from 127 to 15.
  const UInt normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Subnormal result: adding 0.5 makes the hardware round at the last bit a half keeps.
  const UInt subnormal = bit_cast<UInt>(bit_cast<Float>(magnitude) + 0.5f) - 0x3f000000u;
  const UInt infinity = UInt{} + 0x7c00u;
  const UInt nan = UInt{} + 0x7e00u;
  UInt result = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  result = magnitude >= 0x477ff000u ? infinity : result;       // 65520 and more
  result = magnitude > 0x7f800000u ? nan : result;
  return (bits >> 16 & 0x8000u) | result;
}

// 16 values, or the first n of them with zeros behind.
SPARSE_UNIFIED_INLINE Float load(const float* source) {
  Float value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename T>
SPARSE_UNIFIED_INLINE Float load(const T* source) {
  UShort bits;
  std::memcpy(&bits, source, sizeof(bits));
  return widen(T{}, __builtin_convertvector(bits, UInt));
}

template <typename T>
SPARSE_UNIFIED_INLINE Float load(const T* source, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, source, static_cast<size_t>(n) * sizeof(T));
  return load(padded);
}

SPARSE_UNIFIED_INLINE void store(float* target, const Float& value) {
  std::memcpy(target, &value, sizeof(value));
}

template <typename T>
SPARSE_UNIFIED_INLINE void store(T* target, const Float& value) {
  const UShort bits = __builtin_convertvector(narrow(T{}, value), UShort);
  std::memcpy(target, &bits, sizeof(bits));
}

template <typename T>
SPARSE_UNIFIED_INLINE void store(T* target, const Float& value, int64_t n) {
  T padded[kLanes];
  store(padded, value);
  std::memcpy(target, padded, static_cast<size_t>(n) * sizeof(T));
}

// Sum of the lanes, folded in halves.
SPARSE_UNIFIED_INLINE float sum_lanes(const Float& value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// e^x to about 2 ulp; infinity above 87, e^-87 below -87, NaN stays NaN.
SPARSE_UNIFIED_INLINE Float exp(Float x) {
  constexpr float kLog2e = 1.442695041f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Int is_large = x > 87.0f;
  x = is_large ? broadcast(87.0f) : x;
  x = x < -87.0f ? broadcast(-87.0f) : x;
  const Float shifted = x * kLog2e + kRound;
  const Float n = shifted - kRound;
  const Float r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor polynomial of degree 7 on |r| <= ln(2) / 2, truncation error below 6e-9.
  Float p = broadcast(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  constexpr uint32_t kBias = 0x4b400000u - 127u;  // bits of kRound, less the exponent bias
  const Float value = p * bit_cast<Float>((bit_cast<UInt>(shifted) - kBias) << 23);
  return is_large ? broadcast(__builtin_inff()) : value;
}

SPARSE_UNIFIED_INLINE Float sigmoid(const Float& x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace sparse_unified
