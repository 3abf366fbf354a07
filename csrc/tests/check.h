// SPDX-License-Identifier: Apache-2.0
// The whole test harness: checks that print both values and where, a random source, arrays that end
// where their memory ends, and storage types by name. The arguments of a test program choose among
// its tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "sparse_unified/dtype.h"
#include "sparse_unified/instruction_set.h"

namespace sparse_unified::test {

inline int& failures() {
  static int count = 0;
  return count;
}

// Reports the first few failures in full.
inline void fail(const char* what, int64_t at, double out, double expected) {
  constexpr int kMaxReports = 20;
  if (++failures() > kMaxReports) return;
  std::fprintf(stderr, "%s at %lld: got %.9g, expected %.9g\n", what, static_cast<long long>(at),
               out, expected);
}

// Equal, or both NaN.
inline void check_equal(const char* what, int64_t at, double out, double expected) {
  if (!(out == expected || (std::isnan(out) && std::isnan(expected)))) {
    fail(what, at, out, expected);
  }
}

inline void check_close(const char* what, int64_t at, double out, double expected,
                        double tolerance) {
  if (!(std::abs(out - expected) <= tolerance)) fail(what, at, out, expected);
}

// One test of a program.
struct Test {
  const char* name;
  std::function<void()> run;
};

// Runs the tests with a name that contains an argument of the program, or all without arguments;
// an exception fails its test. What main returns.
inline int run_tests(int argc, char** argv, const std::vector<Test>& tests) {
  int num_run = 0;
  for (const Test& test : tests) {
    const auto names = [&](const char* argument) {
      return std::strstr(test.name, argument) != nullptr;
    };
    if (argc > 1 && std::none_of(argv + 1, argv + argc, names)) continue;
    const int before = failures();
    try {
      test.run();
    } catch (const std::exception& error) {
      ++failures();
      std::fprintf(stderr, "%s\n", error.what());
    }
    if (failures() != before) std::fprintf(stderr, "%s: failed\n", test.name);
    ++num_run;
  }
  std::printf("%d tests, %d failed checks\n", num_run, failures());
  return num_run == 0 || failures() != 0;
}

// Heap memory of exactly n values, so that the address sanitizer sees one value too many. `lead`
// values before the first make it misaligned for vectors.
template <typename T>
class Array {
 public:
  explicit Array(int64_t n, int64_t lead = 0)
      : size_(n), lead_(lead), data_(new T[static_cast<size_t>(n + lead)]()) {}
  T* get() { return data_.get() + lead_; }
  T& operator[](int64_t i) { return get()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  int64_t lead_;
  std::unique_ptr<T[]> data_;
};

// Fields of a binary format: value of a bit pattern by the definition of IEEE 754.
struct Format {
  int exponent_bits;
  int mantissa_bits;
};

inline double decode(const Format& format, uint32_t bits) {
  const uint32_t max_exponent = (1u << format.exponent_bits) - 1;
  const int bias = static_cast<int>(max_exponent / 2);
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1);
  const uint32_t exponent = bits >> format.mantissa_bits & max_exponent;
  const double sign = bits >> (format.exponent_bits + format.mantissa_bits) ? -1.0 : 1.0;
  if (exponent == max_exponent) return mantissa ? std::nan("") : sign * INFINITY;
  const int scale = (exponent ? static_cast<int>(exponent) : 1) - bias - format.mantissa_bits;
  const uint32_t significand = mantissa | (exponent ? 1u << format.mantissa_bits : 0u);
  return sign * std::ldexp(static_cast<double>(significand), scale);
}

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
  static constexpr double kEpsilon = 0x1p-24;  // largest relative error of one rounding
  static double value(float stored) { return stored; }
  static float stored(double value) { return static_cast<float>(value); }
};
template <>
struct Traits<BFloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr double kEpsilon = 0x1p-8;
  static double value(BFloat16 stored) { return decode({8, 7}, stored.bits); }
  // Rounds toward zero: test inputs need not be nearest.
  static BFloat16 stored(double value) {
    const auto wide = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof(bits));
    return {static_cast<uint16_t>(bits >> 16)};
  }
};
template <>
struct Traits<Float16> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr double kEpsilon = 0x1p-11;
  static double value(Float16 stored) { return decode({5, 10}, stored.bits); }
  // Rounds toward zero; values of a normal half only.
  static Float16 stored(double value) {
    if (value == 0) return {0};
    int exponent = 0;  // which frexp sets, unseen by the compiler
    const double fraction = std::frexp(std::abs(value), &exponent);  // [0.5, 1)
    const auto mantissa = static_cast<uint16_t>((2 * fraction - 1) * 1024);
    const auto biased = static_cast<uint16_t>(exponent - 1 + 15);
    return {static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | biased << 10 | mantissa)};
  }
};

// A value as a kernel keeps it between two products, and how far from that it may lie because an
// error of its fp32 sum took it over a rounding boundary.
struct Kept {
  double value;
  double slack;
};

template <typename T>
Kept kept_hidden(double hidden) {
  if (ffn_level(Traits<T>::kDType) < FfnLevel::kAvx512Bf16) return {hidden, 0};
  const auto rounded = [](double value) {
    if (value == 0) return value;
    const double unit = std::ldexp(1.0, std::ilogb(value) - 7);  // of the last bit of a bfloat16
    return std::nearbyint(value / unit) * unit;
  };
  constexpr double kError = 2e-5;
  return {rounded(hidden), rounded(hidden + kError) - rounded(hidden - kError)};
}

using Random = std::mt19937;

// Integers from -limit to limit: sums of their products are exact in fp32.
template <typename T>
void fill_integers(Array<T>& array, int limit, Random& random) {
  std::uniform_int_distribution<int> draw(-limit, limit);
  for (int64_t i = 0; i < array.size(); ++i) array[i] = Traits<T>::stored(draw(random));
}

// Normal values of standard deviation `scale`, those too small for a normal half set to zero.
template <typename T>
void fill_normal(Array<T>& array, double scale, Random& random) {
  std::normal_distribution<double> draw(0.0, scale);
  for (int64_t i = 0; i < array.size(); ++i) {
    const double value = draw(random);
    array[i] = Traits<T>::stored(std::abs(value) < 0x1p-14 ? 0.0 : value);
  }
}

}  // namespace sparse_unified::test
