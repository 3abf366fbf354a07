// SPDX-License-Identifier: Apache-2.0
// combine on CUDA and its backward, run by the emulator, against plain loops in double precision.
#include <algorithm>
#include <numeric>

#include "kernel_check.h"
#include "sparse_unified/cuda/combine.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t top_k;
  int64_t hidden_size;
  int64_t padding;  // elements between the rows of y and grad_out
  int64_t lead;     // elements before the first row of every matrix
};

template <typename T>
struct Case {
  Case(const Shape& shape, Random& random)
      : shape(shape),
        num_rows(shape.num_tokens * shape.top_k),
        stride(shape.hidden_size + shape.padding),
        y(rows_size(num_rows), shape.lead),
        grad_out(rows_size(shape.num_tokens), shape.lead),
        weights(num_rows),
        token_rows(num_rows) {
    fill_normal(y, 1.0, random);
    fill_normal(grad_out, 1.0, random);
    fill_normal(weights, 1.0, random);
    std::iota(token_rows.get(), token_rows.get() + num_rows, 0);
    std::shuffle(token_rows.get(), token_rows.get() + num_rows, random);
  }
  int64_t rows_size(int64_t rows) const {
    return rows ? (rows - 1) * (shape.hidden_size + shape.padding) + shape.hidden_size : 0;
  }
  double at(Array<T>& rows, int64_t row, int64_t column) {
    return Traits<T>::value(rows[row * stride + column]);
  }

  Array<T> combine(bool has_weights) {
    Array<T> out(shape.num_tokens * shape.hidden_size, shape.lead);
    poison(out);
    const CombineParams params{Traits<T>::kDType,
                               y.get(),
                               stride,
                               has_weights ? weights.get() : nullptr,
                               token_rows.get(),
                               out.get(),
                               shape.hidden_size,
                               shape.top_k};
    next_schedule();
    check_launch("combine", combine_cuda(params, shape.num_tokens, num_rows, nullptr));
    return out;
  }

  // Null gradients are not wanted.
  void backward(T* grad_y, float* grad_weights) {
    const CombineBackwardParams params{Traits<T>::kDType, grad_out.get(), stride,
                                       y.get(),           stride,         weights.get(),
                                       token_rows.get(),  grad_y,         grad_weights,
                                       shape.hidden_size, shape.top_k};
    next_schedule();
    check_launch("combine_backward",
                 combine_backward_cuda(params, shape.num_tokens, num_rows, nullptr));
  }

  Shape shape;
  int64_t num_rows;
  int64_t stride;
  Array<T> y;
  Array<T> grad_out;
  Array<float> weights;
  Array<int32_t> token_rows;
};

template <typename T>
void test_forward(const Shape& shape, bool has_weights, Random& random) {
  Case<T> c(shape, random);
  Array<T> out = c.combine(has_weights);
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t token = i / shape.hidden_size;
    double expected = 0;
    double scale = 0;
    for (int64_t slot = token * shape.top_k; slot < (token + 1) * shape.top_k; ++slot) {
      const double term = (has_weights ? static_cast<double>(c.weights[slot]) : 1.0) *
                          c.at(c.y, c.token_rows[slot], i % shape.hidden_size);
      expected += term;
      scale += std::abs(term);
    }
    // One rounding to T, and one to fp32 for each term.
    check_close("combine", i, Traits<T>::value(out[i]), expected,
                Traits<T>::kEpsilon * std::abs(expected) +
                    static_cast<double>(shape.top_k) * 0x1p-24 * scale + 0x1p-25);
  }
  Array<T> again = c.combine(has_weights);
  check_bits("combine, repeated", again, out);
}

template <typename T>
void test_backward(const Shape& shape, Random& random) {
  Case<T> c(shape, random);
  Array<T> grad_y(c.num_rows * shape.hidden_size, shape.lead);
  Array<float> grad_weights(c.num_rows);
  poison(grad_y);
  poison(grad_weights);
  c.backward(grad_y.get(), grad_weights.get());
  for (int64_t slot = 0; slot < c.num_rows; ++slot) {
    const int64_t row = c.token_rows[slot];
    double dot = 0;
    double scale = 0;
    for (int64_t d = 0; d < shape.hidden_size; ++d) {
      const double grad = c.at(c.grad_out, slot / shape.top_k, d);
      const double expected = static_cast<double>(c.weights[slot]) * grad;
      check_close("grad_y", row * shape.hidden_size + d,
                  Traits<T>::value(grad_y[row * shape.hidden_size + d]), expected,
                  (Traits<T>::kEpsilon + 0x1p-24) * std::abs(expected) + 0x1p-25);
      dot += grad * c.at(c.y, row, d);
      scale += std::abs(grad * c.at(c.y, row, d));
    }
    check_close("grad_weights", slot, grad_weights[slot], dot,
                static_cast<double>(shape.hidden_size / 32 + 14) * 0x1p-24 * scale + 1e-30);
  }

  // The same bits again, and with one of the gradients alone.
  Array<T> same_grad_y(c.num_rows * shape.hidden_size, shape.lead);
  Array<float> same_grad_weights(c.num_rows);
  poison(same_grad_y);
  poison(same_grad_weights);
  c.backward(same_grad_y.get(), nullptr);
  c.backward(nullptr, same_grad_weights.get());
  check_bits("grad_y, alone", same_grad_y, grad_y);
  check_bits("grad_weights, alone", same_grad_weights, grad_weights);
}

// Alignment chooses the path of a kernel, not the bits.
template <typename T>
void test_alignment(Random& random) {
  Random same = random;
  Case<T> aligned({5, 3, 136, 8, 0}, random);
  Case<T> misaligned({5, 3, 136, 3, 1}, same);
  for (int64_t row = 0; row < aligned.num_rows; ++row) {
    for (int64_t d = 0; d < 136; ++d) {
      misaligned.y[row * misaligned.stride + d] = aligned.y[row * aligned.stride + d];
    }
  }
  std::copy_n(aligned.weights.get(), aligned.num_rows, misaligned.weights.get());
  std::copy_n(aligned.token_rows.get(), aligned.num_rows, misaligned.token_rows.get());
  Array<T> expected = aligned.combine(true);
  Array<T> out = misaligned.combine(true);
  check_bits("combine, misaligned", out, expected);
}

// NaN and infinity stay in the token whose rows hold them.
template <typename T>
void test_special_values(Random& random) {
  Case<T> c({3, 2, 24, 0, 0}, random);
  for (int64_t d = 0; d < 24; ++d) {
    const uint32_t infinity = Traits<T>::kDType == DType::kFloat16 ? 0x7c00 : 0x7f80;
    if constexpr (sizeof(T) == 2) {
      c.y[c.token_rows[2] * 24 + d] = T{static_cast<uint16_t>(infinity | (d % 2 ? 1 : 0))};
    } else {
      c.y[c.token_rows[2] * 24 + d] = d % 2 ? std::nanf("") : INFINITY;
    }
  }
  c.weights[2] = -1.0f;
  Array<T> out = c.combine(true);
  for (int64_t d = 0; d < 24; ++d) {
    check_equal("a special value", d, Traits<T>::value(out[24 + d]), d % 2 ? NAN : -INFINITY);
    check_equal("a finite token", d, std::isfinite(Traits<T>::value(out[d])), 1);
    check_equal("a finite token", 48 + d, std::isfinite(Traits<T>::value(out[48 + d])), 1);
  }
}

void test_bad_row(int32_t bad) {
  Random random(1);
  Case<float> c({4, 2, 8, 0, 0}, random);
  c.token_rows[5] = bad;
  Array<float> grad_y(64);
  check_stops("combine: a row out of range", [&] { c.combine(true); });
  check_stops("combine_backward: a row out of range", [&] { c.backward(grad_y.get(), nullptr); });
}

template <typename T>
void test_all(Random& random) {
  for (const int64_t top_k : {1, 2, 7, 8, 16, 33}) {
    for (const int64_t hidden_size : {1, 24, 37, 264, 520}) {
      for (const int64_t num_tokens : {0, 1, 37}) {
        if (num_tokens * top_k * hidden_size > 60000) continue;
        for (const int64_t lead : {0, 1}) {
          const Shape shape{num_tokens, top_k, hidden_size, lead ? 3 : 8, lead};
          test_forward<T>(shape, lead == 0 || top_k != 8, random);
          test_backward<T>(shape, random);
        }
      }
    }
  }
  // Rows, stride and addresses are whole vectors in every combination but all three.
  for (const Shape& shape : {Shape{5, 3, 264, 3, 0}, Shape{5, 3, 264, 8, 1}, Shape{5, 3, 37, 3, 0},
                             Shape{5, 3, 260, 4, 0}}) {
    test_forward<T>(shape, true, random);
    test_backward<T>(shape, random);
  }
  // More vectors than a block has threads.
  test_forward<T>({2, 8, 3584, 0, 0}, true, random);
  test_backward<T>({2, 8, 3584, 0, 0}, random);
  test_forward<T>({300, 2, 16, 0, 0}, false, random);
  test_alignment<T>(random);
  test_special_values<T>(random);
}

void run_all() {
  Random random(13);
  test_all<float>(random);
  test_all<BFloat16>(random);
  test_all<Float16>(random);
  test_bad_row(-1);
  test_bad_row(8);
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  return sparse_unified::test::run_tests("cuda combine", sparse_unified::test::run_all);
}
