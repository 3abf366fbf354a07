// SPDX-License-Identifier: Apache-2.0
// 16-byte accesses to global and shared memory, and conversions between storage types and fp32.
#pragma once

#include "device/platform.h"
#include "sparse_unified/dtype.h"

namespace sparse_unified {

constexpr int kVectorBytes = 16;

// Sixteen bytes, aligned to sixteen.
struct alignas(kVectorBytes) Vector16 {
  uint32_t words[4];
};

// Elements of T in a Vector16.
template <typename T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

}  // namespace sparse_unified

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/convert.h"
#else

namespace sparse_unified {

SPARSE_UNIFIED_DEVICE Vector16 load_vector(const void* pointer) {
  return *static_cast<const Vector16*>(pointer);
}
SPARSE_UNIFIED_DEVICE void store_vector(void* pointer, const Vector16& value) {
  *static_cast<Vector16*>(pointer) = value;
}

// ld.global.nc.L1::no_allocate.v4.b32: data that nobody writes during the kernel, read once.
SPARSE_UNIFIED_DEVICE Vector16 load_vector_once(const void* pointer) {
  Vector16 v;
  asm("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
      : "l"(pointer));
  return v;
}

// Storage to fp32.
SPARSE_UNIFIED_DEVICE float to_float(float value) { return value; }
SPARSE_UNIFIED_DEVICE float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
SPARSE_UNIFIED_DEVICE float to_float(Float16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
}

// fp32 to storage: cvt.rn, nearest, ties to even.
template <typename T>
SPARSE_UNIFIED_DEVICE T from_float(float value);
template <>
SPARSE_UNIFIED_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
SPARSE_UNIFIED_DEVICE BFloat16 from_float<BFloat16>(float value) {
  BFloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
template <>
SPARSE_UNIFIED_DEVICE Float16 from_float<Float16>(float value) {
  Float16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}

// Two values in one word, `low` in the low half: cvt.rn.{bf16x2,f16x2}.f32.
template <typename T>
SPARSE_UNIFIED_DEVICE uint32_t pack(float low, float high);
template <>
SPARSE_UNIFIED_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <>
SPARSE_UNIFIED_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// exp with an error of 2 units in the last place, as CUDA's expf.
SPARSE_UNIFIED_DEVICE float exponential(float value) { return expf(value); }

}  // namespace sparse_unified

#endif

namespace sparse_unified {

// The two values of a word that `pack` made.
template <typename T>
SPARSE_UNIFIED_DEVICE void unpack(uint32_t word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word & 0xffffu)});
  high = to_float(T{static_cast<uint16_t>(word >> 16)});
}

// A Vector16 as fp32.
template <typename T>
SPARSE_UNIFIED_DEVICE void widen(const Vector16& vector, float (&values)[kVectorElements<T>]) {
  if constexpr (sizeof(T) == 4) {
    const auto* floats = reinterpret_cast<const float*>(vector.words);
    for (int i = 0; i < 4; ++i) values[i] = floats[i];
  } else {
    for (int i = 0; i < 4; ++i) unpack<T>(vector.words[i], values[2 * i], values[2 * i + 1]);
  }
}

// And back, one rounding.
template <typename T>
SPARSE_UNIFIED_DEVICE Vector16 narrow(const float (&values)[kVectorElements<T>]) {
  Vector16 vector;
  if constexpr (sizeof(T) == 4) {
    auto* floats = reinterpret_cast<float*>(vector.words);
    for (int i = 0; i < 4; ++i) floats[i] = values[i];
  } else {
    for (int i = 0; i < 4; ++i) vector.words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  }
  return vector;
}

}  // namespace sparse_unified
