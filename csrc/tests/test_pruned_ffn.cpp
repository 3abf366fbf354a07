// SPDX-License-Identifier: Apache-2.0
// The FFN over kept blocks against double precision, at every remainder of its tiles, panels and
// slices, in every dtype; and the elementwise sums of its 16-bit path.
#include <algorithm>
#include <vector>

#include "check.h"
#include "sparse_unified/accumulate.h"
#include "sparse_unified/instruction_set.h"
#include "sparse_unified/pruned_ffn.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_blocks;
  int64_t block_size;
  int64_t padding;  // elements between rows of x and of the weights
};

// Outputs are of about unit size; sums of up to 1300 terms, in blocks, leave some dozen roundings.
constexpr double kTolerance = 100 * 0x1p-24;
// And the one rounding of an output.
template <typename T>
constexpr double kRounding = 0;
template <>
constexpr double kRounding<BFloat16> = 0x1p-8;
template <>
constexpr double kRounding<Float16> = 0x1p-11;

template <typename T>
void test_blocks(const Shape& shape, const std::vector<int32_t>& kept, Random& random) {
  const int64_t d = shape.hidden_size;
  const int64_t width = shape.num_blocks * shape.block_size;
  const int64_t lead = shape.padding ? 1 : 0;
  const int64_t stride = d + shape.padding;
  const int64_t down_stride = width + shape.padding;
  const auto rows_size = [&](int64_t rows, int64_t columns) {
    return rows ? rows * (columns + shape.padding) - shape.padding : 0;
  };
  Array<T> x(rows_size(shape.num_tokens, d), lead);
  Array<T> gate(rows_size(width, d), lead);
  Array<T> up(rows_size(width, d), lead);
  Array<T> down(rows_size(d, width), lead);
  const double fan_in = 1 / std::sqrt(std::max<double>(1, static_cast<double>(d)));
  const auto kept_width = static_cast<double>(kept.size()) * static_cast<double>(shape.block_size);
  fill_normal(x, 1.0, random);
  fill_normal(gate, fan_in, random);
  fill_normal(up, fan_in, random);
  fill_normal(down, 1 / std::sqrt(std::max<double>(1, kept_width)), random);
  Array<int32_t> blocks(static_cast<int64_t>(kept.size()));
  std::copy(kept.begin(), kept.end(), blocks.get());

  Array<T> y(shape.num_tokens * d, lead);
  std::fill_n(y.get(), y.size(), Traits<T>::stored(std::nan("")));
  Array<float> workspace(pruned_ffn_workspace_floats(Traits<T>::kDType, d));
  PrunedFfnParams params{};
  params.dtype = Traits<T>::kDType;
  params.x = {x.get(), shape.num_tokens, d, stride};
  params.gate_proj = {gate.get(), width, d, stride};
  params.up_proj = {up.get(), width, d, stride};
  params.down_proj = {down.get(), d, width, down_stride};
  params.kept_blocks = blocks.get();
  params.num_kept = blocks.size();
  params.block_size = shape.block_size;
  params.y = y.get();
  // In two calls, as two threads would.
  const int64_t middle = shape.num_tokens / 3;
  pruned_ffn_cpu(params, 0, middle, workspace.get());
  pruned_ffn_cpu(params, middle, shape.num_tokens, workspace.get());

  std::vector<double> exact(static_cast<size_t>(d));
  std::vector<double> slack(exact.size());
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    std::fill(exact.begin(), exact.end(), 0.0);
    std::fill(slack.begin(), slack.end(), 0.0);
    for (const int32_t block : kept) {
      for (int64_t j = block * shape.block_size; j < (block + 1) * shape.block_size; ++j) {
        double g = 0;
        double u = 0;
        for (int64_t k = 0; k < d; ++k) {
          const double token = Traits<T>::value(x[t * stride + k]);
          g += Traits<T>::value(gate[j * stride + k]) * token;
          u += Traits<T>::value(up[j * stride + k]) * token;
        }
        const Kept hidden = kept_hidden<T>(g / (1 + std::exp(-g)) * u);
        for (int64_t k = 0; k < d; ++k) {
          const double weight = Traits<T>::value(down[k * down_stride + j]);
          exact[static_cast<size_t>(k)] += hidden.value * weight;
          slack[static_cast<size_t>(k)] += hidden.slack * std::abs(weight);
        }
      }
    }
    for (int64_t k = 0; k < d; ++k) {
      const double expected = exact[static_cast<size_t>(k)];
      check_close("y", t * d + k, Traits<T>::value(y[t * d + k]), expected,
                  kTolerance + slack[static_cast<size_t>(k)] + kRounding<T> * std::abs(expected));
    }
  }
}

template <typename T>
void test_accumulate(Random& random) {
  for (const int64_t n : {0, 1, 15, 16, 17, 50}) {
    for (const int64_t lead : {0, 1}) {
      Array<T> partial(n, lead);
      Array<T> out(n, lead);
      Array<float> sum(n, lead);
      fill_integers(partial, 7, random);
      fill_integers(sum, 7, random);
      const std::vector<float> before(sum.get(), sum.get() + n);
      accumulate_cpu({Traits<T>::kDType, partial.get(), sum.get(), n});
      round_cpu({Traits<T>::kDType, sum.get(), out.get(), n});
      for (int64_t i = 0; i < n; ++i) {
        const double expected = before[static_cast<size_t>(i)] + Traits<T>::value(partial[i]);
        check_equal("sum", i, sum[i], expected);
        check_equal("rounded sum", i, Traits<T>::value(out[i]), expected);
      }
    }
  }
}

void test_accumulates() {
  Random random(8);
  test_accumulate<float>(random);
  test_accumulate<BFloat16>(random);
  test_accumulate<Float16>(random);
}

template <typename T>
void test_remainders() {
  Random random(9);
  for (const int64_t num_tokens : {0, 1, 15, 16, 17, 33, 48, 49, 100}) {
    for (const int64_t hidden_size : {0, 1, 13, 14, 15, 29, 48}) {
      for (const int64_t block_size : {1, 7, 16, 32}) {
        const int64_t padding = (num_tokens + hidden_size + block_size) % 2 * 3;
        test_blocks<T>({num_tokens, hidden_size, 6, block_size, padding}, {4, 1, 2, 5}, random);
      }
    }
  }
}

template <typename T>
void test_slices() {
  Random random(10);
  std::vector<int32_t> many;  // several slices, the last not full; runs short and long
  for (int32_t block = 0; block < 80; ++block) {
    if (block < 30 || block % 2 == 1) many.push_back(block);
  }
  test_blocks<T>({40, 20, 80, 16, 0}, many, random);
  test_blocks<T>({40, 20, 9, 128, 3}, {8, 0, 1, 2, 3, 5}, random);
  test_blocks<T>({40, 1300, 3, 16, 3}, {2, 0}, random);  // several blocks of a sum
  test_blocks<T>({700, 40, 3, 16, 0}, {2, 0}, random);   // several chunks of tokens
  test_blocks<T>({5, 6, 1, 16, 0}, {0}, random);
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  std::vector<Test> tests{{"accumulate", test_accumulates}};
  if (prefers_ffn_cpu(DType::kFloat32)) {
    tests.push_back({"remainders", test_remainders<float>});
    tests.push_back({"slices", test_slices<float>});
    tests.push_back({"remainders bf16", test_remainders<BFloat16>});
    tests.push_back({"slices bf16", test_slices<BFloat16>});
    tests.push_back({"slices fp16", test_slices<Float16>});
  }
  return run_tests(argc, argv, tests);
}
