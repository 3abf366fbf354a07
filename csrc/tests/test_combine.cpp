// SPDX-License-Identifier: Apache-2.0
// combine, its backward and permute against plain loops.
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "sparse_unified/combine.h"
#include "sparse_unified/permute.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t top_k;
  int64_t hidden_size;
  int64_t padding;  // elements between rows
  int64_t lead;     // elements before the first row
};

template <typename T>
struct Case {
  Case(const Shape& shape, Random& random)
      : num_rows(shape.num_tokens * shape.top_k),
        stride(shape.hidden_size + shape.padding),
        y(num_rows ? (num_rows - 1) * stride + shape.hidden_size : 0, shape.lead),
        weights(num_rows),
        token_rows(num_rows) {
    fill_normal(y, 1.0, random);
    fill_normal(weights, 1.0, random);
    std::iota(token_rows.get(), token_rows.get() + num_rows, 0);
    std::shuffle(token_rows.get(), token_rows.get() + num_rows, random);
  }
  double at(int64_t row, int64_t column) { return Traits<T>::value(y[row * stride + column]); }

  int64_t num_rows;
  int64_t stride;
  Array<T> y;
  Array<float> weights;
  Array<int32_t> token_rows;
};

template <typename T>
void test_forward(const Shape& shape, bool has_weights, Random& random) {
  constexpr float kOffset = 0.25f;
  Case<T> c(shape, random);
  Array<T> out(shape.num_tokens * shape.hidden_size, shape.lead);
  const CombineParams params{.dtype = Traits<T>::kDType,
                             .y = {c.y.get(), c.num_rows, shape.hidden_size, c.stride},
                             .weights = has_weights ? c.weights.get() : nullptr,
                             .weight_offset = kOffset,
                             .token_rows = c.token_rows.get(),
                             .out = out.get(),
                             .num_tokens = shape.num_tokens,
                             .top_k = shape.top_k};
  // Two calls, as two threads would make them.
  combine_cpu(params, 0, shape.num_tokens / 2);
  combine_cpu(params, shape.num_tokens / 2, shape.num_tokens);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    for (int64_t d = 0; d < shape.hidden_size; ++d) {
      double expected = 0;
      double scale = 0;
      for (int64_t slot = t * shape.top_k; slot < (t + 1) * shape.top_k; ++slot) {
        const double term =
            (has_weights ? kOffset + c.weights[slot] : 1.0f) * c.at(c.token_rows[slot], d);
        expected += term;
        scale += std::abs(term);
      }
      const double tolerance = Traits<T>::kEpsilon * std::abs(expected) +
                               static_cast<double>(shape.top_k + 1) * 0x1p-23 * scale + 0x1p-25;
      check_close("combine", t * shape.hidden_size + d,
                  Traits<T>::value(out[t * shape.hidden_size + d]), expected, tolerance);
    }
  }
}

template <typename T>
void test_backward(const Shape& shape, Random& random) {
  Case<T> c({shape.num_tokens, shape.top_k, shape.hidden_size, 0, shape.lead}, random);
  const int64_t stride = shape.hidden_size + shape.padding;
  Array<T> grad_out(c.num_rows ? shape.num_tokens * stride - shape.padding : 0, shape.lead);
  Array<T> grad_y(c.num_rows * shape.hidden_size);
  Array<float> grad_weights(c.num_rows);
  Array<int32_t> row_token(c.num_rows);
  fill_normal(grad_out, 1.0, random);
  for (int64_t slot = 0; slot < c.num_rows; ++slot) {
    row_token[c.token_rows[slot]] = static_cast<int32_t>(slot / shape.top_k);
  }
  combine_backward_cpu({.dtype = Traits<T>::kDType,
                        .grad_out = {grad_out.get(), shape.num_tokens, shape.hidden_size, stride},
                        .row_token = row_token.get(),
                        .weights = c.weights.get(),
                        .grad_y = grad_y.get(),
                        .y = c.y.get(),
                        .grad_weights = grad_weights.get(),
                        .num_rows = c.num_rows});
  for (int64_t row = 0; row < c.num_rows; ++row) {
    double dot = 0;
    double scale = 0;
    for (int64_t d = 0; d < shape.hidden_size; ++d) {
      const double grad = Traits<T>::value(grad_out[row_token[row] * stride + d]);
      const double expected = c.weights[row] * grad;
      check_close("grad_y", row * shape.hidden_size + d,
                  Traits<T>::value(grad_y[row * shape.hidden_size + d]), expected,
                  (Traits<T>::kEpsilon + 0x1p-24) * std::abs(expected) + 0x1p-25);
      dot += grad * c.at(row, d);
      scale += std::abs(grad * c.at(row, d));
    }
    check_close("grad_weights", row, grad_weights[row], dot,
                static_cast<double>(shape.hidden_size / 16 + 6) * 0x1p-24 * scale + 1e-30);
  }
}

template <typename T>
void test_permute(const Shape& shape, Random& random) {
  const int64_t stride = shape.hidden_size + shape.padding;
  const int64_t num_rows = shape.num_tokens * shape.top_k;
  Array<T> x(shape.num_tokens ? shape.num_tokens * stride - shape.padding : 0, shape.lead);
  Array<T> y(num_rows * shape.hidden_size, shape.lead);
  Array<int32_t> row_token(num_rows);
  fill_normal(x, 1.0, random);
  for (int64_t r = 0; r < num_rows; ++r) {
    row_token[r] = static_cast<int32_t>(random() % static_cast<uint64_t>(shape.num_tokens));
  }
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  PermuteParams params{
      .x = {x.get(), shape.num_tokens, shape.hidden_size * kBytes, stride * kBytes},
      .row_token = row_token.get(),
      .token_rows = nullptr,
      .y = y.get(),
      .num_rows = num_rows,
      .top_k = shape.top_k};
  gather_rows_cpu(params);
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t token = row_token[i / shape.hidden_size];
    check_equal("gather_rows", i, Traits<T>::value(y[i]),
                Traits<T>::value(x[token * stride + i % shape.hidden_size]));
  }

  // Slot i goes to row num_rows - 1 - i.
  Array<int32_t> token_rows(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) token_rows[i] = static_cast<int32_t>(num_rows - 1 - i);
  params.token_rows = token_rows.get();
  permute_cpu(params, 0, shape.num_tokens);
  for (int64_t i = 0; i < y.size(); ++i) {
    const int64_t token = (num_rows - 1 - i / shape.hidden_size) / shape.top_k;
    check_equal("permute", i, Traits<T>::value(y[i]),
                Traits<T>::value(x[token * stride + i % shape.hidden_size]));
  }
}

template <typename T>
void test_all() {
  Random random(3);
  for (const int64_t hidden_size : {1, 15, 16, 17, 63, 64, 65, 79, 80, 200}) {
    for (const int64_t top_k : {1, 3, 8}) {
      for (const int64_t num_tokens : {0, 1, 5}) {
        for (const int64_t padding : {0, 3}) {
          const Shape shape{num_tokens, top_k, hidden_size, padding, padding ? 1 : 0};
          test_forward<T>(shape, true, random);
          test_forward<T>(shape, false, random);
          test_backward<T>(shape, random);
          test_permute<T>(shape, random);
        }
      }
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
