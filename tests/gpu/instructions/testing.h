// SPDX-License-Identifier: Apache-2.0
// What the tests of single instructions share: memory that host and device see, checks that print
// both values, and one line a test. Built by nvcc they run on the device; with
// SPARSE_UNIFIED_EMULATION they run in the emulator, which tries the tests where no device is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "device/platform.h"
#include "sparse_unified/dtype.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/testing.h"
#endif

namespace sparse_unified::instructions {

#if defined(SPARSE_UNIFIED_EMULATION)
constexpr bool kIsEmulated = true;
template <typename T>
using DeviceArray = emulation::DeviceArray<T>;
inline void synchronize() {}
#else
constexpr bool kIsEmulated = false;

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // The context is lost: nothing that follows would mean anything.
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::fflush(stdout);
  std::_Exit(1);
}

// What `synchronize` brings back to the host.
class Mirror {
 public:
  Mirror() { all().push_back(this); }
  virtual ~Mirror() { all().erase(std::find(all().begin(), all().end(), this)); }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  virtual void download() = 0;

  static std::vector<Mirror*>& all() {
    static std::vector<Mirror*> mirrors;
    return mirrors;
  }
};

// `n` values that start as NaN, or 0x7f7f... of integers, on the host and on the device: `get`
// sends what the host wrote and gives the device's address, `synchronize` fetches what kernels
// wrote.
template <typename T>
class DeviceArray : public Mirror {
 public:
  explicit DeviceArray(int64_t n) : host_(new T[static_cast<size_t>(n)]), size_(n) {
    require(cudaMalloc(&device_, bytes()), "cudaMalloc");
    std::memset(static_cast<void*>(host_.get()), std::is_integral_v<T> ? 0x7f : 0xff, bytes());
  }
  ~DeviceArray() override { cudaFree(device_); }

  T* get() {
    require(cudaMemcpy(device_, host_.get(), bytes(), cudaMemcpyHostToDevice), "copy to device");
    return device_;
  }
  void download() override {
    require(cudaMemcpy(host_.get(), device_, bytes(), cudaMemcpyDeviceToHost), "copy to host");
  }
  T& operator[](int64_t i) { return host_[static_cast<size_t>(i)]; }
  int64_t size() const { return size_; }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

  std::unique_ptr<T[]> host_;
  int64_t size_;
  T* device_ = nullptr;
};

// Before the host reads what a kernel wrote.
inline void synchronize() {
  require(cudaGetLastError(), "launch");
  require(cudaDeviceSynchronize(), "kernel");
  for (Mirror* mirror : Mirror::all()) mirror->download();
}
#endif

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check_launch(cudaError_t error) {
  if (error == cudaSuccess) return;
  ++failures();
  std::printf("  launch: %s\n", cudaGetErrorString(error));
}

// Equal, or both NaN; the first few that are not are printed.
inline void check_equal(const char* what, int64_t at, double out, double expected) {
  if (out == expected || (std::isnan(out) && std::isnan(expected))) return;
  constexpr int kMaxReports = 5;
  if (++failures() <= kMaxReports) {
    std::printf("  %s at %lld: got %.9g, expected %.9g\n", what, static_cast<long long>(at), out,
                expected);
  }
}

// Value of a 16-bit pattern by the definition of IEEE 754.
inline double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t max_exponent = (1u << exponent_bits) - 1;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const uint32_t exponent = bits >> mantissa_bits & max_exponent;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == max_exponent) return mantissa ? std::nan("") : sign * INFINITY;
  const int scale = static_cast<int>(exponent ? exponent : 1) - static_cast<int>(max_exponent / 2) -
                    mantissa_bits;
  return sign * std::ldexp(mantissa | (exponent ? 1u << mantissa_bits : 0u), scale);
}

template <typename T>
struct Half;
template <>
struct Half<BFloat16> {
  static constexpr const char* kName = "bf16";
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kExponentBits = 8, kMantissaBits = 7;
};
template <>
struct Half<Float16> {
  static constexpr const char* kName = "fp16";
  static constexpr DType kDType = DType::kFloat16;
  static constexpr int kExponentBits = 5, kMantissaBits = 10;
};

template <typename T>
double value(T stored) {
  return decode(stored.bits, Half<T>::kExponentBits, Half<T>::kMantissaBits);
}

// The stored form of a small integer.
template <typename T>
T stored(int integer) {
  if (integer == 0) return {0};
  const int magnitude = std::abs(integer);
  int exponent = 0;
  while (magnitude >> (exponent + 1)) ++exponent;
  const int mantissa =
      (magnitude << Half<T>::kMantissaBits >> exponent) & ((1 << Half<T>::kMantissaBits) - 1);
  const int biased = exponent + (1 << (Half<T>::kExponentBits - 1)) - 1;
  return {static_cast<uint16_t>((integer < 0 ? 0x8000 : 0) | biased << Half<T>::kMantissaBits |
                                mantissa)};
}

// Integers from -3 to 3: sums of their products are exact. The same for the same `at`.
inline int draw(int64_t at) {
  auto h = static_cast<uint32_t>(at) * 2654435761u;
  h = (h ^ h >> 15) * 2246822519u;
  return static_cast<int>((h ^ h >> 13) % 7) - 3;
}

// Runs a test and prints "PASS name" or "FAIL name" on a line of its own.
template <typename Body>
void test(const char* name, const Body& body) {
  const int before = failures();
  const char* why = "";
#if defined(SPARSE_UNIFIED_EMULATION)
  static std::string text;
  try {
    body();
  } catch (const std::exception& error) {
    ++failures();
    text = error.what();
    why = text.c_str();
  }
#else
  body();
#endif
  std::printf("%s %s %s\n", failures() == before ? "PASS" : "FAIL", name, why);
  std::fflush(stdout);
}

}  // namespace sparse_unified::instructions
