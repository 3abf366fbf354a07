// SPDX-License-Identifier: Apache-2.0
// SwiGLU and its backward against double precision, at every remainder of the vector length.
#include "check.h"
#include "sparse_unified/swiglu.h"

namespace sparse_unified::test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One rounding to T, and the fp32 arithmetic before it: a dozen operations, the exponential's own
// error, and what cancellation in 1 + g * (1 - s) makes of it, relative to `scale`.
template <typename T>
double tolerance(double expected, double scale) {
  return Traits<T>::kEpsilon * std::abs(expected) + 40 * Traits<float>::kEpsilon * scale + 0x1p-25;
}

template <typename T>
void test_forward(int64_t n, int64_t lead, Random& random) {
  Array<T> gate(n, lead), up(n, lead), hidden(n, lead);
  fill_normal(gate, 4.0, random);
  fill_normal(up, 2.0, random);
  swiglu_cpu({Traits<T>::kDType, gate.get(), up.get(), hidden.get(), n});
  for (int64_t i = 0; i < n; ++i) {
    const double g = Traits<T>::value(gate[i]);
    const double expected = g * sigmoid(g) * Traits<T>::value(up[i]);
    check_close(Traits<T>::kName, i, Traits<T>::value(hidden[i]), expected,
                tolerance<T>(expected, std::abs(expected)));
  }

  // In place gives the same bits.
  swiglu_cpu({Traits<T>::kDType, gate.get(), up.get(), gate.get(), n});
  for (int64_t i = 0; i < n; ++i) {
    check_equal("in place", i, Traits<T>::value(gate[i]), Traits<T>::value(hidden[i]));
  }
}

template <typename T>
void test_backward(int64_t n, int64_t lead, bool wants_hidden, Random& random) {
  Array<T> grad_hidden(n, lead), gate(n, lead), up(n, lead);
  Array<T> hidden(n, lead), grad_gate(n, lead), grad_up(n, lead);
  fill_normal(grad_hidden, 1.0, random);
  fill_normal(gate, 4.0, random);
  fill_normal(up, 2.0, random);
  swiglu_backward_cpu({Traits<T>::kDType, grad_hidden.get(), gate.get(), up.get(),
                       wants_hidden ? hidden.get() : nullptr, grad_gate.get(), grad_up.get(), n});
  for (int64_t i = 0; i < n; ++i) {
    const double grad = Traits<T>::value(grad_hidden[i]);
    const double g = Traits<T>::value(gate[i]);
    const double u = Traits<T>::value(up[i]);
    const double s = sigmoid(g);
    const double for_gate = grad * u * s * (1 + g * (1 - s));
    const double for_up = grad * g * s;
    const double scale = std::abs(grad * u * s) * (1 + std::abs(g));
    check_close("grad_gate", i, Traits<T>::value(grad_gate[i]), for_gate,
                tolerance<T>(for_gate, scale));
    check_close("grad_up", i, Traits<T>::value(grad_up[i]), for_up,
                tolerance<T>(for_up, std::abs(for_up)));
    if (wants_hidden) {
      check_close("hidden", i, Traits<T>::value(hidden[i]), g * s * u,
                  tolerance<T>(g * s * u, std::abs(g * s * u)));
    }
  }
}

template <typename T>
void test_all() {
  Random random(2);
  for (int64_t n = 0; n <= 40; ++n) {
    for (const int64_t lead : {0, 1, 5}) {
      test_forward<T>(n, lead, random);
      test_backward<T>(n, lead, true, random);
      test_backward<T>(n, lead, false, random);
    }
  }
  test_forward<T>(4099, 0, random);
  test_backward<T>(4099, 0, true, random);
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
