// SPDX-License-Identifier: Apache-2.0
// The fused expert FFN against double precision, at every remainder of its tiles and panels, in
// every dtype.
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "sparse_unified/grouped_ffn.h"
#include "sparse_unified/instruction_set.h"

namespace sparse_unified::test {
namespace {

constexpr int64_t kNumExperts = 3;

struct Shape {
  int64_t count;  // rows of the expert
  int64_t hidden_size;
  int64_t expert_width;
  int64_t padding;  // elements between rows of x and of the weights
};

// Weights of all experts, tokens, and the exact result for every row of one expert.
template <typename T>
struct Case {
  Case(const Shape& shape, int64_t expert, Random& random)
      : shape(shape),
        expert(expert),
        num_tokens(shape.count + 2),
        neurons(kNumExperts * shape.expert_width),
        x_stride(shape.hidden_size + shape.padding),
        down_stride(neurons + shape.padding),
        x(rows_size(num_tokens, shape.hidden_size), lead()),
        gate(rows_size(neurons, shape.hidden_size), lead()),
        up(rows_size(neurons, shape.hidden_size), lead()),
        down(rows_size(shape.hidden_size, neurons), lead()),
        row_token(shape.count) {
    const double d = std::max<double>(1, static_cast<double>(shape.hidden_size));
    const double h = std::max<double>(1, static_cast<double>(shape.expert_width));
    fill_normal(x, 1.0, random);
    fill_normal(gate, 1 / std::sqrt(d), random);
    fill_normal(up, 1 / std::sqrt(d), random);
    fill_normal(down, 1 / std::sqrt(h), random);
    // Ascending with gaps, as in a block of tokens of which not all chose the expert.
    for (int64_t i = 0; i < shape.count; ++i) {
      row_token[i] = static_cast<int32_t>(i + (i > shape.count / 2 ? 2 : 0));
    }
  }

  int64_t lead() const { return shape.padding ? 1 : 0; }
  int64_t rows_size(int64_t rows, int64_t columns) const {
    return rows ? rows * (columns + shape.padding) - shape.padding : 0;
  }

  GroupedFfnParams params() {
    const int64_t d = shape.hidden_size;
    return {Traits<T>::kDType,
            {x.get(), num_tokens, d, x_stride},
            {gate.get(), neurons, d, x_stride},
            {up.get(), neurons, d, x_stride},
            {down.get(), d, neurons, down_stride},
            shape.expert_width,
            {0, 0}};
  }

  // [count, D]; adds to `slack` what each may differ by.
  std::vector<double> exact(std::vector<double>& slack) {
    const int64_t d = shape.hidden_size;
    const int64_t h = shape.expert_width;
    std::vector<double> out(static_cast<size_t>(shape.count * d), 0.0);
    slack.assign(out.size(), 0.0);
    for (int64_t i = 0; i < shape.count; ++i) {
      const T* token = x.get() + row_token[i] * x_stride;
      for (int64_t j = expert * h; j < (expert + 1) * h; ++j) {
        double g = 0;
        double u = 0;
        for (int64_t k = 0; k < d; ++k) {
          g += Traits<T>::value(gate[j * x_stride + k]) * Traits<T>::value(token[k]);
          u += Traits<T>::value(up[j * x_stride + k]) * Traits<T>::value(token[k]);
        }
        const Kept hidden = kept_hidden<T>(g / (1 + std::exp(-g)) * u);
        for (int64_t k = 0; k < d; ++k) {
          const double weight = Traits<T>::value(down[k * down_stride + j]);
          out[static_cast<size_t>(i * d + k)] += hidden.value * weight;
          slack[static_cast<size_t>(i * d + k)] += hidden.slack * std::abs(weight);
        }
      }
    }
    return out;
  }

  Shape shape;
  int64_t expert;
  int64_t num_tokens;
  int64_t neurons;
  int64_t x_stride;
  int64_t down_stride;
  Array<T> x;
  Array<T> gate;
  Array<T> up;
  Array<T> down;
  Array<int32_t> row_token;
};

// Outputs are of about unit size; sums of up to 600 terms, in blocks, leave some dozen roundings.
constexpr double kTolerance = 100 * 0x1p-24;

template <typename T>
void test_rows(const Shape& shape, int64_t expert, Random& random) {
  Case<T> c(shape, expert, random);
  std::vector<double> slack;
  const std::vector<double> exact = c.exact(slack);
  Array<float> workspace(
      grouped_ffn_workspace_floats(Traits<T>::kDType, shape.hidden_size, shape.expert_width));
  const int64_t d = shape.hidden_size;

  // Stored in the order of the rows.
  Array<float> out(shape.count * d, c.lead());
  GroupedFfnRows rows{expert, shape.count, c.row_token.get(), out.get(), nullptr, nullptr};
  grouped_ffn_cpu(c.params(), rows, workspace.get());
  for (int64_t i = 0; i < out.size(); ++i) {
    const auto at = static_cast<size_t>(i);
    check_close("rows", i, out[i], exact[at], kTolerance + slack[at]);
  }

  // Added with weights to the tokens' rows; other tokens stay as they are.
  Array<float> tokens(c.num_tokens * d, c.lead());
  Array<float> weights(shape.count);
  fill_normal(tokens, 1.0, random);
  fill_normal(weights, 1.0, random);
  std::vector<double> expected(tokens.get(), tokens.get() + tokens.size());
  std::vector<double> tolerance(expected.size(), 5 * kTolerance);
  for (int64_t i = 0; i < shape.count * d; ++i) {
    const auto at = static_cast<size_t>(c.row_token[i / d] * d + i % d);
    expected[at] += weights[i / d] * exact[static_cast<size_t>(i)];
    tolerance[at] += std::abs(weights[i / d]) * slack[static_cast<size_t>(i)];
  }
  rows.out = tokens.get();
  rows.target = c.row_token.get();
  rows.weights = weights.get();
  grouped_ffn_cpu(c.params(), rows, workspace.get());
  for (int64_t i = 0; i < tokens.size(); ++i) {
    const auto at = static_cast<size_t>(i);
    check_close("tokens", i, tokens[i], expected[at], tolerance[at]);
  }
}

template <typename T>
void test_remainders() {
  Random random(6);
  for (const int64_t count : {0, 1, 15, 16, 17, 31, 32, 33, 48, 49, 100}) {
    for (const int64_t hidden_size : {0, 1, 13, 16, 29, 48}) {
      for (const int64_t expert_width : {0, 1, 6, 7, 8, 15}) {
        const int64_t padding = (count + hidden_size + expert_width) % 2 * 3;
        test_rows<T>({count, hidden_size, expert_width, padding}, count % kNumExperts, random);
      }
    }
  }
}

template <typename T>
void test_blocks() {
  Random random(7);
  test_rows<T>({700, 40, 20, 0}, 1, random);   // several chunks of rows
  test_rows<T>({40, 1300, 9, 3}, 2, random);   // several blocks of a sum, in and out
  test_rows<T>({40, 20, 1100, 0}, 0, random);  // the same for the down-projection
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  if (!prefers_ffn_cpu(DType::kFloat32)) {
    std::printf("grouped_ffn: this machine lacks AVX2\n");
    return 77;  // ctest counts it as skipped
  }
  return run_tests(argc, argv,
                   {{"remainders", test_remainders<float>},
                    {"blocks", test_blocks<float>},
                    {"remainders bf16", test_remainders<BFloat16>},
                    {"blocks bf16", test_blocks<BFloat16>},
                    {"blocks fp16", test_blocks<Float16>}});
}
