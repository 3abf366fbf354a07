// SPDX-License-Identifier: Apache-2.0
// Products of a handful of rows against double precision, at every remainder of the vector length.
#include "check.h"
#include "sparse_unified/few_rows.h"

namespace sparse_unified::test {
namespace {

// Rows of b may lie apart, and so may those of out.
void test_product(int64_t n, int64_t m, int64_t k, int64_t gap, Random& random) {
  Array<float> a(n * k), b(m * (k + gap) - gap), out(n * (m + gap) - gap);
  fill_normal(a, 1.0, random);
  fill_normal(b, 1.0, random);
  few_rows_cpu({{a.get(), n, k, k}, {b.get(), m, k, k + gap}, out.get(), m + gap});
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double expected = 0;
      double magnitude = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double product = static_cast<double>(a[i * k + l]) * b[j * (k + gap) + l];
        expected += product;
        magnitude += std::abs(product);
      }
      check_close("product", i * m + j, out[i * (m + gap) + j], expected, 1e-6 * magnitude);
    }
  }
}

void test_all() {
  Random random(1);
  for (int64_t n = 1; n <= kMostFewRows; ++n) {
    for (int64_t k = 1; k <= 50; ++k) test_product(n, 7, k, k % 3, random);
    for (int64_t m = 1; m <= 13; ++m) test_product(n, m, 24, 5, random);
    test_product(n, 11, 896, 0, random);
  }
}

// A row of infinite values gives infinite products alone, wherever its last vector begins.
void test_infinite() {
  Array<float> a(19), b(19), out(1);
  for (int64_t i = 0; i < 19; ++i) a[i] = b[i] = 1;
  b[4] = INFINITY;
  few_rows_cpu({{a.get(), 1, 19, 19}, {b.get(), 1, 19, 19}, out.get(), 1});
  check_equal("infinite", 0, out[0], INFINITY);
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified::test;
  return run_tests(argc, argv, {{"products", test_all}, {"infinite", test_infinite}});
}
