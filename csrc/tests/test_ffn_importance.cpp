// SPDX-License-Identifier: Apache-2.0
// Sums of |h|, h^2 and |h| > threshold against double precision, at every remainder of the vectors.
#include <vector>

#include "check.h"
#include "sparse_unified/ffn_importance.h"

namespace sparse_unified::test {
namespace {

constexpr double kThreshold = 0.25;

template <typename T>
void test_sums(int64_t num_tokens, int64_t width, bool has_weights, Random& random) {
  const int64_t stride = width + 3;
  const int64_t size = num_tokens ? num_tokens * stride - 3 : 0;
  Array<T> gate(size, 1);
  Array<T> up(size, 1);
  fill_normal(gate, 1.0, random);
  fill_normal(up, 1.0, random);
  Array<float> weights(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    weights[t] = static_cast<float>(t % 3) / 2;
    // What weighs nothing may hold anything.
    for (int64_t i = 0; has_weights && t % 3 == 0 && i < width; ++i) {
      gate[t * stride + i] = Traits<T>::stored(1e4);
    }
  }
  Array<double> sums(3 * width);
  for (int64_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<double>(i);
  FfnImportanceParams params{};
  params.dtype = Traits<T>::kDType;
  params.gate = {gate.get(), num_tokens, width, stride};
  params.up = {up.get(), num_tokens, width, stride};
  params.token_weights = has_weights ? weights.get() : nullptr;
  params.threshold = static_cast<float>(kThreshold);
  params.sum_abs = sums.get();
  params.sum_squares = sums.get() + width;
  params.num_fired = sums.get() + 2 * width;
  // In two calls, as two threads would.
  ffn_importance_cpu(params, 0, width / 2);
  ffn_importance_cpu(params, width / 2, width);

  for (int64_t i = 0; i < width; ++i) {
    double expected[3] = {};
    double near = 0;  // weight of tokens whose rounding decides whether they fire
    for (int64_t t = 0; t < num_tokens; ++t) {
      const double w = has_weights ? static_cast<double>(weights[t]) : 1;
      const double g = Traits<T>::value(gate[t * stride + i]);
      const double h = std::abs(g / (1 + std::exp(-g)) * Traits<T>::value(up[t * stride + i]));
      expected[0] += w * h;
      expected[1] += w * h * h;
      expected[2] += w * (h > kThreshold);
      near += w * (std::abs(h - kThreshold) < 1e-5);
    }
    const auto tokens = static_cast<double>(num_tokens);
    const double tolerances[3] = {1e-5 * (1 + tokens), 1e-4 * (1 + tokens), near + 1e-6};
    for (int64_t s = 0; s < 3; ++s) {
      const int64_t at = s * width + i;
      check_close("sum", at, sums[at], static_cast<double>(at) + expected[s], tolerances[s]);
    }
  }
}

template <typename T>
void test_all() {
  Random random(9);
  for (const int64_t num_tokens : {0, 1, 31, 32, 33, 100}) {
    for (const int64_t width : {0, 1, 15, 16, 17, 40, 64}) {
      test_sums<T>(num_tokens, width, false, random);
      test_sums<T>(num_tokens, width, true, random);
    }
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests(argc, argv,
                   {{"float32", test_all<float>},
                    {"bfloat16", test_all<BFloat16>},
                    {"float16", test_all<Float16>}});
}
