// SPDX-License-Identifier: Apache-2.0
// Conversions of 16-bit storage and the exponential, against formulas of their own.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/vector.h"

namespace sparse_unified::test {
namespace {

float widen_one(BFloat16 stored) { return load(&stored, 1)[0]; }
float widen_one(Float16 stored) { return load(&stored, 1)[0]; }

template <typename T>
uint16_t narrow_one(float value) {
  T stored[1];
  store(stored, broadcast(value), 1);
  return stored[0].bits;
}

// Nearest code by search in the ascending list of finite magnitudes, ties to the even code.
class NearestEven {
 public:
  explicit NearestEven(const Format& format)
      : infinity_(((1u << format.exponent_bits) - 1) << format.mantissa_bits),
        sign_(1u << (format.exponent_bits + format.mantissa_bits)) {
    for (uint32_t code = 0; code < infinity_; ++code) magnitudes_.push_back(decode(format, code));
    // Where the next value would be if the exponent range went on.
    magnitudes_.push_back(2 * magnitudes_.back() - magnitudes_[infinity_ - 2]);
  }

  uint32_t operator()(float value) const {
    const double magnitude = std::abs(static_cast<double>(value));
    const uint32_t sign = std::signbit(value) ? sign_ : 0;
    if (magnitude >= magnitudes_.back()) return sign | infinity_;
    const auto above = std::upper_bound(magnitudes_.begin(), magnitudes_.end(), magnitude);
    const auto low = static_cast<uint32_t>(above - magnitudes_.begin()) - 1;
    const double down = magnitude - magnitudes_[low];
    const double up = *above - magnitude;
    const bool rounds_up = up < down || (up == down && low % 2 == 1);
    return sign | (low + (rounds_up ? 1 : 0));
  }

 private:
  uint32_t infinity_;
  uint32_t sign_;
  std::vector<double> magnitudes_;
};

template <typename T>
void test_widen_every_pattern(const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float out = widen_one(T{static_cast<uint16_t>(bits)});
    const double expected = decode(format, bits);
    check_equal("widen", bits, out, expected);
    if (!std::isnan(expected)) check_equal("widen sign", bits, std::signbit(out), bits >> 15);
  }
}

template <typename T>
void check_narrow(const NearestEven& nearest, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  check_equal("narrow of fp32 pattern", bits, narrow_one<T>(value), nearest(value));
}

template <typename T>
void test_narrow(const Format& format) {
  const NearestEven nearest(format);
  const float inf = std::numeric_limits<float>::infinity();

  // Every value, the middle to its neighbour, and what lies next to that middle.
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double value = decode(format, bits);
    const double next = decode(format, (bits + 1) & 0xffff);
    if (!std::isfinite(value)) continue;
    check_equal("round trip", bits, narrow_one<T>(static_cast<float>(value)), bits);
    if (!std::isfinite(next)) continue;
    const auto middle = static_cast<float>((value + next) / 2);
    check_narrow<T>(nearest, middle);
    check_narrow<T>(nearest, std::nextafter(middle, inf));
    check_narrow<T>(nearest, std::nextafter(middle, -inf));
  }

  // Overflow and infinities.
  const double largest =
      decode(format, (((1u << format.exponent_bits) - 1) << format.mantissa_bits) - 1);
  const double step = largest * std::ldexp(1.0, -format.mantissa_bits) / 2;
  for (const double value : {largest, largest + step / 2, largest + step, largest + 2 * step}) {
    check_narrow<T>(nearest, static_cast<float>(value));
    check_narrow<T>(nearest, static_cast<float>(-value));
  }
  check_narrow<T>(nearest, inf);
  check_narrow<T>(nearest, -inf);

  // Random fp32 patterns; NaN must stay NaN.
  Random random(1);
  for (int i = 0; i < 500000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random());
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    if (std::isnan(value)) {
      check_equal("NaN", bits, decode(format, narrow_one<T>(value)), std::nan(""));
    } else {
      check_narrow<T>(nearest, value);
    }
  }
}

// Distance in units in the last place of the expected value.
double ulps(double out, double expected) {
  int exponent;
  std::frexp(expected, &exponent);
  return std::abs(out - expected) / std::ldexp(1.0, exponent - 24);
}

void test_exp_and_sigmoid() {
  double worst_exp = 0;
  double worst_sigmoid = 0;
  constexpr int kSteps = 2000000;
  for (int i = 0; i <= kSteps; ++i) {
    const float x = -87.0f + 174.0f * static_cast<float>(i) / kSteps;
    worst_exp = std::max(worst_exp, ulps(exp(broadcast(x))[3], std::exp(static_cast<double>(x))));
    worst_sigmoid = std::max(
        worst_sigmoid, ulps(sigmoid(broadcast(x))[3], 1 / (1 + std::exp(-static_cast<double>(x)))));
  }
  std::printf("exp: %.2f ulp, sigmoid: %.2f ulp\n", worst_exp, worst_sigmoid);
  check_close("exp, ulp", 0, worst_exp, 0, 2.5);
  // One rounding each for 1 + e and the quotient on top of the exponential's.
  check_close("sigmoid, ulp", 0, worst_sigmoid, 0, 4.5);

  check_equal("exp of NaN", 0, exp(broadcast(std::nanf("")))[0], std::nan(""));
  check_equal("exp of 0", 0, exp(broadcast(0.0f))[0], 1.0);
  check_equal("sigmoid of +inf", 0, sigmoid(broadcast(INFINITY))[0], 1.0);
  // Exactly zero, so that silu of a huge negative value is zero and not a part of it.
  check_equal("sigmoid of -inf", 0, sigmoid(broadcast(-INFINITY))[0], 0.0);
  check_equal("sigmoid of -1e30", 0, sigmoid(broadcast(-1e30f))[0], 0.0);
  check_equal("exp of 88", 0, exp(broadcast(88.0f))[0], static_cast<double>(INFINITY));
  check_equal("sigmoid of NaN", 0, sigmoid(broadcast(std::nanf("")))[0], std::nan(""));
}

void test_sum_lanes() {
  Float value;
  for (int64_t lane = 0; lane < kLanes; ++lane) value[lane] = static_cast<float>(1 << lane);
  check_equal("sum_lanes", 0, sum_lanes(value), 65535.0);
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests(argc, argv,
                   {{"widen bfloat16", [] { test_widen_every_pattern<BFloat16>({8, 7}); }},
                    {"widen float16", [] { test_widen_every_pattern<Float16>({5, 10}); }},
                    {"narrow bfloat16", [] { test_narrow<BFloat16>({8, 7}); }},
                    {"narrow float16", [] { test_narrow<Float16>({5, 10}); }},
                    {"exp and sigmoid", test_exp_and_sigmoid},
                    {"sum_lanes", test_sum_lanes}});
}
