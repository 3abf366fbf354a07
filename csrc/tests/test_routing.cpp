// SPDX-License-Identifier: Apache-2.0
// route_topk, its backward and sort_by_expert against plain loops. The data are small integers, so
// that every sum is exact and logits, selections and gradients must agree to the last bit.
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "sparse_unified/route_topk.h"
#include "sparse_unified/sort_by_expert.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t top_k;
  int64_t padding;  // elements between rows of x and gate
};

template <typename T>
struct Router {
  explicit Router(const Shape& shape)
      : shape(shape),
        stride(shape.hidden_size + shape.padding),
        x(rows_size(shape.num_tokens), shape.padding ? 1 : 0),
        gate(rows_size(shape.num_experts), shape.padding ? 1 : 0),
        logits(shape.num_tokens * shape.num_experts),
        topk_logits(shape.num_tokens * shape.top_k),
        topk_idx(shape.num_tokens * shape.top_k) {}

  int64_t rows_size(int64_t rows) const {
    return rows ? rows * (shape.hidden_size + shape.padding) - shape.padding : 0;
  }

  void run() {
    Array<float> gate_t(shape.hidden_size * padded_experts(shape.num_experts));
    const RouteTopkParams params{.dtype = Traits<T>::kDType,
                                 .x = {x.get(), shape.num_tokens, shape.hidden_size, stride},
                                 .gate = {gate.get(), shape.num_experts, shape.hidden_size, stride},
                                 .gate_t = gate_t.get(),
                                 .logits = logits.get(),
                                 .topk_logits = topk_logits.get(),
                                 .topk_idx = topk_idx.get(),
                                 .top_k = shape.top_k};
    pack_gate(params.dtype, params.gate, gate_t.get());
    route_topk_cpu(params, 0, shape.num_tokens / 3);
    route_topk_cpu(params, shape.num_tokens / 3, shape.num_tokens);
  }

  // Order of the policy, stated apart from the kernel: NaN, then larger, then lower index.
  void check_selection() {
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const float* row = logits.get() + t * shape.num_experts;
      std::vector<int32_t> order(static_cast<size_t>(shape.num_experts));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        if (std::isnan(row[a]) || std::isnan(row[b])) {
          return std::isnan(row[a]) && !std::isnan(row[b]);
        }
        return row[a] > row[b];
      });
      for (int64_t k = 0; k < shape.top_k; ++k) {
        const int32_t expected = order[static_cast<size_t>(k)];
        check_equal("topk_idx", t * shape.top_k + k, topk_idx[t * shape.top_k + k], expected);
        check_equal("topk_logits", t * shape.top_k + k, topk_logits[t * shape.top_k + k],
                    row[expected]);
      }
    }
  }

  Shape shape;
  int64_t stride;
  Array<T> x;
  Array<T> gate;
  Array<float> logits;
  Array<float> topk_logits;
  Array<int32_t> topk_idx;
};

template <typename T>
double dot(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += Traits<T>::value(a[i * a_step]) * Traits<T>::value(b[i * b_step]);
  }
  return sum;
}

template <typename T>
void test_route(const Shape& shape, Random& random) {
  Router<T> router(shape);
  fill_integers(router.x, 4, random);
  fill_integers(router.gate, 1, random);  // few distinct logits: many ties
  router.run();
  for (int64_t i = 0; i < router.logits.size(); ++i) {
    const T* token = router.x.get() + i / shape.num_experts * router.stride;
    const T* expert = router.gate.get() + i % shape.num_experts * router.stride;
    check_equal("logits", i, router.logits[i], dot(token, 1, expert, 1, shape.hidden_size));
  }
  router.check_selection();
}

template <typename T>
void test_special_logits(int64_t num_experts, int64_t top_k, Random& random) {
  // With one hidden value of 1 the gate itself is the row of logits.
  Router<T> router({1, 1, num_experts, top_k, 0});
  router.x[0] = Traits<T>::stored(1.0);
  constexpr double kValues[] = {0.0, 1.0, -1.0, 2.5, -7.0};
  const uint32_t infinity = Traits<T>::kDType == DType::kFloat16 ? 0x7c00 : 0x7f80;
  for (int64_t e = 0; e < num_experts; ++e) {
    const uint32_t draw = static_cast<uint32_t>(random() % 8);
    if constexpr (sizeof(T) == 2) {
      const uint32_t special[] = {infinity, infinity | 0x8000, infinity | 0x40};  // +-inf, NaN
      router.gate[e] =
          draw < 5 ? Traits<T>::stored(kValues[draw]) : T{static_cast<uint16_t>(special[draw - 5])};
    } else {
      const float special[] = {INFINITY, -INFINITY, std::nanf("")};
      router.gate[e] = draw < 5 ? static_cast<float>(kValues[draw]) : special[draw - 5];
    }
  }
  router.run();
  for (int64_t e = 0; e < num_experts; ++e) {
    check_equal("special logit", e, router.logits[e], Traits<T>::value(router.gate[e]));
  }
  router.check_selection();
}

template <typename T>
void test_backward(const Shape& shape, Random& random) {
  Router<T> router(shape);
  Array<float> grad(shape.num_tokens * shape.num_experts);
  Array<T> grad_x(shape.num_tokens * shape.hidden_size);
  Array<T> grad_gate(shape.num_experts * shape.hidden_size);
  // Values of sums stay below 256, exact even in bfloat16.
  fill_integers(router.x, 1, random);
  fill_integers(router.gate, 1, random);
  fill_integers(grad, 1, random);
  const RouteTopkBackwardParams params{
      .dtype = Traits<T>::kDType,
      .grad_logits = grad.get(),
      .grad_topk_logits = nullptr,
      .topk_idx = nullptr,
      .x = {router.x.get(), shape.num_tokens, shape.hidden_size, router.stride},
      .gate = {router.gate.get(), shape.num_experts, shape.hidden_size, router.stride},
      .grad_x = grad_x.get(),
      .grad_gate = grad_gate.get(),
      .top_k = 0};
  route_topk_backward_x_cpu(params, 0, shape.num_tokens / 2);
  route_topk_backward_x_cpu(params, shape.num_tokens / 2, shape.num_tokens);
  route_topk_backward_gate_cpu(params, 0, shape.hidden_size / 2);
  route_topk_backward_gate_cpu(params, shape.hidden_size / 2, shape.hidden_size);
  for (int64_t i = 0; i < grad_x.size(); ++i) {
    const int64_t t = i / shape.hidden_size;
    double expected = 0;
    for (int64_t e = 0; e < shape.num_experts; ++e) {
      expected += grad[t * shape.num_experts + e] *
                  Traits<T>::value(router.gate[e * router.stride + i % shape.hidden_size]);
    }
    check_equal("grad_x", i, Traits<T>::value(grad_x[i]), expected);
  }
  for (int64_t i = 0; i < grad_gate.size(); ++i) {
    const int64_t e = i / shape.hidden_size;
    double expected = 0;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      expected += grad[t * shape.num_experts + e] *
                  Traits<T>::value(router.x[t * router.stride + i % shape.hidden_size]);
    }
    check_equal("grad_gate", i, Traits<T>::value(grad_gate[i]), expected);
  }
}

void test_sort(int64_t num_tokens, int64_t top_k, int64_t num_experts, int64_t used_experts,
               Random& random) {
  const int64_t num_rows = num_tokens * top_k;
  Array<int32_t> topk_idx(num_rows), offsets(num_experts + 1), row_token(num_rows),
      token_rows(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    topk_idx[i] = static_cast<int32_t>(random() % static_cast<uint64_t>(used_experts));
  }
  const SortByExpertParams params{
      topk_idx.get(), offsets.get(), row_token.get(), token_rows.get(), num_rows,
      num_experts,    top_k};
  check_equal("find_bad_expert", 0, static_cast<double>(find_bad_expert(params)), -1);
  sort_by_expert_cpu(params);
  int32_t row = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    check_equal("expert_offsets", e, offsets[e], row);
    for (int64_t i = 0; i < num_rows; ++i) {
      if (topk_idx[i] != e) continue;
      check_equal("token_rows", i, token_rows[i], row);
      check_equal("row_token", row, row_token[row], static_cast<double>(i / top_k));
      ++row;
    }
  }
  check_equal("expert_offsets", num_experts, offsets[num_experts], static_cast<double>(num_rows));

  // The first index out of range is found, on either side.
  for (const int32_t bad : {-1, static_cast<int32_t>(num_experts)}) {
    if (num_rows == 0) break;
    const int64_t at = num_rows / 2;
    const int32_t good = topk_idx[at];
    topk_idx[at] = bad;
    check_equal("find_bad_expert", at, static_cast<double>(find_bad_expert(params)),
                static_cast<double>(at));
    topk_idx[at] = good;
  }
}

template <typename T>
void test_all() {
  Random random(4);
  for (const int64_t num_experts : {1, 5, 16, 17, 33, 64, 65}) {
    for (const int64_t top_k : {int64_t{1}, (num_experts + 1) / 2, num_experts}) {
      for (const int64_t hidden_size : {1, 17, 127, 128, 129, 300}) {
        for (const int64_t num_tokens : {0, 1, 9, 26}) {
          const Shape shape{num_tokens, hidden_size, num_experts, top_k, hidden_size == 17 ? 3 : 0};
          test_route<T>(shape, random);
          test_backward<T>(shape, random);
        }
      }
      for (int round = 0; round < 20; ++round) test_special_logits<T>(num_experts, top_k, random);
    }
  }
  test_backward<T>({200, 20, 9, 2, 0}, random);  // several blocks of tokens
}

void test_sorts() {
  Random random(5);
  for (const int64_t num_tokens : {0, 1, 37, 200}) {
    for (const int64_t top_k : {1, 2, 8}) {
      test_sort(num_tokens, top_k, 8, 8, random);
      test_sort(num_tokens, top_k, 33, 5, random);
      test_sort(num_tokens, top_k, 1, 1, random);
    }
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests(argc, argv,
                   {{"route float32", test_all<float>},
                    {"route bfloat16", test_all<BFloat16>},
                    {"route float16", test_all<Float16>},
                    {"sort", test_sorts}});
}
