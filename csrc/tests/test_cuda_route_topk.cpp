// SPDX-License-Identifier: Apache-2.0
// route_topk on CUDA and its backward, run by the emulator, against plain loops. Small integers
// make every sum exact, so that logits, selections and gradients must agree to the last bit; normal
// data hold the rounding to its bound.
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernel_check.h"
#include "sparse_unified/cuda/route_topk.h"

namespace sparse_unified::test {
namespace {

struct Shape {
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t num_experts;
  int64_t top_k;
  int64_t padding;  // elements between the rows of x and gate
  int64_t lead;     // elements before the first row of every matrix of T
};

struct Routing {
  Routing(int64_t num_tokens, int64_t num_experts, int64_t top_k)
      : logits(num_tokens * num_experts),
        topk_logits(num_tokens * top_k),
        topk_idx(num_tokens * top_k) {
    poison(logits);
    poison(topk_logits);
    poison(topk_idx);
  }
  Array<float> logits;
  Array<float> topk_logits;
  Array<int32_t> topk_idx;
};

template <typename T>
struct Router {
  explicit Router(const Shape& shape)
      : shape(shape),
        stride(shape.hidden_size + shape.padding),
        x(rows_size(shape.num_tokens), shape.lead),
        gate(rows_size(shape.num_experts), shape.lead) {}

  int64_t rows_size(int64_t rows) const {
    return rows ? rows * (shape.hidden_size + shape.padding) - shape.padding : 0;
  }

  // Routes the tokens [token, token + num_tokens).
  Routing route(int64_t token, int64_t num_tokens) {
    Routing routing(num_tokens, shape.num_experts, shape.top_k);
    RouteTopkCudaParams params{};
    params.dtype = Traits<T>::kDType;
    params.x = x.get() + token * stride;
    params.x_stride = stride;
    params.gate = gate.get();
    params.gate_stride = stride;
    params.logits = routing.logits.get();
    params.topk_logits = routing.topk_logits.get();
    params.topk_idx = routing.topk_idx.get();
    params.num_tokens = num_tokens;
    params.hidden_size = shape.hidden_size;
    params.num_experts = shape.num_experts;
    params.top_k = shape.top_k;
    next_schedule();
    check_launch("route_topk", route_topk_cuda(params, nullptr));
    return routing;
  }
  Routing route() { return route(0, shape.num_tokens); }

  // Order of the policy, stated apart from the kernel: NaN, then larger, then lower index.
  void check_selection(Routing& routing) {
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      const float* row = routing.logits.get() + t * shape.num_experts;
      std::vector<int32_t> order(static_cast<size_t>(shape.num_experts));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        if (std::isnan(row[a]) || std::isnan(row[b])) {
          return std::isnan(row[a]) && !std::isnan(row[b]);
        }
        return row[a] > row[b];
      });
      for (int64_t k = 0; k < shape.top_k; ++k) {
        const int64_t slot = t * shape.top_k + k;
        const int32_t expected = order[static_cast<size_t>(k)];
        check_equal("topk_idx", slot, routing.topk_idx[slot], expected);
        check_equal("topk_logits", slot, routing.topk_logits[slot], row[expected]);
      }
    }
  }

  double logit(int64_t token, int64_t expert, double* scale = nullptr) {
    double sum = 0;
    for (int64_t d = 0; d < shape.hidden_size; ++d) {
      const double term =
          Traits<T>::value(x[token * stride + d]) * Traits<T>::value(gate[expert * stride + d]);
      sum += term;
      if (scale != nullptr) *scale += std::abs(term);
    }
    return sum;
  }

  Shape shape;
  int64_t stride;
  Array<T> x;
  Array<T> gate;
};

void check_same_routing(const char* what, Routing& routing, Routing& expected) {
  check_bits(what, routing.logits, expected.logits);
  check_bits(what, routing.topk_logits, expected.topk_logits);
  for (int64_t i = 0; i < routing.topk_idx.size(); ++i) {
    check_equal(what, i, routing.topk_idx[i], expected.topk_idx[i]);
  }
}

template <typename T>
void test_exact(const Shape& shape, Random& random) {
  Router<T> router(shape);
  fill_integers(router.x, 4, random);
  fill_integers(router.gate, 1, random);  // few distinct logits: many ties
  Routing routing = router.route();
  for (int64_t i = 0; i < routing.logits.size(); ++i) {
    check_equal("logits", i, routing.logits[i],
                router.logit(i / shape.num_experts, i % shape.num_experts));
  }
  router.check_selection(routing);
}

// Logits of size 1, from the width of a model; repeats, and the same tokens alone, bit for bit.
template <typename T>
void test_rounding(const Shape& shape, Random& random) {
  Router<T> router(shape);
  fill_normal(router.x, 1.0, random);
  fill_normal(router.gate, 1.0 / std::sqrt(static_cast<double>(shape.hidden_size)), random);
  Routing routing = router.route();
  for (int64_t i = 0; i < routing.logits.size(); ++i) {
    double scale = 0;
    const double expected = router.logit(i / shape.num_experts, i % shape.num_experts, &scale);
    check_close("logits, rounded", i, routing.logits[i], expected, 0x1p-20 * scale);
  }
  router.check_selection(routing);
  Routing again = router.route();
  check_same_routing("route_topk, repeated", again, routing);

  const int64_t last = shape.num_tokens - 1;
  Routing alone = router.route(last, 1);
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    check_equal("a token alone", e, alone.logits[e], routing.logits[last * shape.num_experts + e]);
  }
}

// Alignment and the number of experts choose the path of a kernel, not the bits.
template <typename T>
void test_paths(Random& random) {
  Router<T> aligned({5, 1040, 20, 4, 8, 0});
  Router<T> misaligned({5, 1040, 20, 4, 3, 1});
  Router<T> few_experts({5, 1040, 7, 4, 8, 0});
  fill_normal(aligned.x, 1.0, random);
  fill_normal(aligned.gate, 1.0, random);
  const auto copy_rows = [](Array<T>& to, int64_t to_stride, Array<T>& from, int64_t from_stride,
                            int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(from.get() + row * from_stride, 1040, to.get() + row * to_stride);
    }
  };
  copy_rows(misaligned.x, misaligned.stride, aligned.x, aligned.stride, 5);
  copy_rows(misaligned.gate, misaligned.stride, aligned.gate, aligned.stride, 20);
  copy_rows(few_experts.x, few_experts.stride, aligned.x, aligned.stride, 5);
  copy_rows(few_experts.gate, few_experts.stride, aligned.gate, aligned.stride, 7);
  Routing expected = aligned.route();
  Routing routing = misaligned.route();
  check_same_routing("route_topk, misaligned", routing, expected);
  Routing few = few_experts.route();
  for (int64_t i = 0; i < few.logits.size(); ++i) {
    check_equal("route_topk, few experts", i, few.logits[i], expected.logits[i / 7 * 20 + i % 7]);
  }
}

template <typename T>
T special_value(uint32_t draw) {
  constexpr double kValues[] = {0.0, 1.0, -1.0, 2.5, -7.0};
  if (draw < 5) return Traits<T>::stored(kValues[draw]);
  if constexpr (sizeof(T) == 2) {
    const uint32_t infinity = Traits<T>::kDType == DType::kFloat16 ? 0x7c00 : 0x7f80;
    const uint32_t special[] = {infinity, infinity | 0x8000, infinity | 0x40, 0x8000};
    return T{static_cast<uint16_t>(special[draw - 5])};
  } else {
    const float special[] = {INFINITY, -INFINITY, std::nanf(""), -0.0f};
    return special[draw - 5];
  }
}

// With one hidden value of 1 the gate itself is the row of logits; a second token of zeros beside
// it has none of its infinities.
template <typename T>
void test_special_logits(int64_t num_experts, int64_t top_k, Random& random) {
  Router<T> router({2, 1, num_experts, top_k, 0, 0});
  router.x[0] = Traits<T>::stored(1.0);
  router.x[1] = special_value<T>(static_cast<uint32_t>(random() % 9));
  for (int64_t e = 0; e < num_experts; ++e) {
    router.gate[e] = special_value<T>(static_cast<uint32_t>(random() % 9));
  }
  Routing routing = router.route();
  for (int64_t e = 0; e < num_experts; ++e) {
    check_equal("special logit", e, routing.logits[e], Traits<T>::value(router.gate[e]));
    check_equal("special logit", num_experts + e, routing.logits[num_experts + e],
                router.logit(1, e));
  }
  router.check_selection(routing);
}

// NaN and infinity of a token, or of an expert, reach no other: not even through the zeros that
// pad the columns.
template <typename T>
void test_isolation(Random& random) {
  Router<T> router({34, 24, 18, 3, 0, 0});
  fill_integers(router.x, 2, random);
  fill_integers(router.gate, 2, random);
  for (int64_t d = 0; d < 24; ++d) {
    router.x[33 * 24 + d] = special_value<T>(7);
    router.gate[5 * 24 + d] = special_value<T>(5);
  }
  Routing routing = router.route();
  for (int64_t t = 0; t < 33; ++t) {
    for (int64_t e = 0; e < 18; ++e) {
      if (e != 5)
        check_equal("isolated", t * 18 + e, routing.logits[t * 18 + e], router.logit(t, e));
    }
  }
  router.check_selection(routing);
}

template <typename T>
struct Gradients {
  Gradients(const Shape& shape)
      : x(shape.num_tokens * shape.hidden_size, shape.lead),
        gate(shape.num_experts * shape.hidden_size, shape.lead) {
    poison(x);
    poison(gate);
  }
  Array<T> x;
  Array<T> gate;
};

template <typename T>
struct BackwardCase {
  BackwardCase(const Shape& shape, Random& random)
      : router(shape),
        grad_logits(shape.num_tokens * shape.num_experts),
        grad_topk(shape.num_tokens * shape.top_k),
        topk_idx(shape.num_tokens * shape.top_k) {
    std::vector<int32_t> experts(static_cast<size_t>(shape.num_experts));
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      std::copy_n(experts.begin(), shape.top_k, topk_idx.get() + t * shape.top_k);
    }
  }

  Gradients<T> run(bool needs_x, bool needs_gate) {
    const Shape& shape = router.shape;
    Gradients<T> gradients(shape);
    RouteTopkBackwardCudaParams params{};
    params.dtype = Traits<T>::kDType;
    params.grad_logits = grad_logits.get();
    params.grad_topk_logits = grad_topk.get();
    params.topk_idx = topk_idx.get();
    params.x = router.x.get();
    params.x_stride = router.stride;
    params.gate = router.gate.get();
    params.gate_stride = router.stride;
    params.grad_x = needs_x ? gradients.x.get() : nullptr;
    params.grad_gate = needs_gate ? gradients.gate.get() : nullptr;
    params.num_tokens = shape.num_tokens;
    params.hidden_size = shape.hidden_size;
    params.num_experts = shape.num_experts;
    params.top_k = shape.top_k;
    Array<unsigned char> workspace(route_topk_backward_cuda_workspace_bytes(params));
    check_equal("workspace", 0, static_cast<double>(workspace.size() % 256), 0);
    poison_bytes(workspace);
    next_schedule();
    check_launch("route_topk_backward", route_topk_backward_cuda(params, workspace.get(), nullptr));
    return gradients;
  }

  static void poison_bytes(Array<unsigned char>& bytes) {
    if (bytes.size() > 0) std::memset(bytes.get(), 0xff, static_cast<size_t>(bytes.size()));
  }

  // g[t, e], with the selected logits' gradients.
  double grad(int64_t token, int64_t expert) {
    const Shape& shape = router.shape;
    double sum = grad_logits[token * shape.num_experts + expert];
    for (int64_t slot = token * shape.top_k; slot < (token + 1) * shape.top_k; ++slot) {
      if (topk_idx[slot] == expert) sum += static_cast<double>(grad_topk[slot]);
    }
    return sum;
  }

  // Each gradient within `terms` roundings to fp32 of its sum, and one to T.
  void check(Gradients<T>& gradients, double roundings) {
    const Shape& shape = router.shape;
    std::vector<double> grads;
    for (int64_t i = 0; i < shape.num_tokens * shape.num_experts; ++i) {
      grads.push_back(grad(i / shape.num_experts, i % shape.num_experts));
    }
    const auto check_sum = [&](const char* what, int64_t i, T out, double sum, double scale) {
      const double rounding = roundings == 0 ? 0 : Traits<T>::kEpsilon * std::abs(sum) + 0x1p-25;
      check_close(what, i, Traits<T>::value(out), sum, rounding + roundings * 0x1p-24 * scale);
    };
    for (int64_t i = 0; i < gradients.x.size(); ++i) {
      double sum = 0;
      double scale = 0;
      for (int64_t e = 0; e < shape.num_experts; ++e) {
        const double term =
            grads[static_cast<size_t>(i / shape.hidden_size * shape.num_experts + e)] *
            Traits<T>::value(router.gate[e * router.stride + i % shape.hidden_size]);
        sum += term;
        scale += std::abs(term);
      }
      check_sum("grad_x", i, gradients.x[i], sum, scale);
    }
    for (int64_t i = 0; i < gradients.gate.size(); ++i) {
      double sum = 0;
      double scale = 0;
      for (int64_t t = 0; t < shape.num_tokens; ++t) {
        const double term =
            grads[static_cast<size_t>(t * shape.num_experts + i / shape.hidden_size)] *
            Traits<T>::value(router.x[t * router.stride + i % shape.hidden_size]);
        sum += term;
        scale += std::abs(term);
      }
      check_sum("grad_gate", i, gradients.gate[i], sum, scale);
    }
  }

  Router<T> router;
  Array<float> grad_logits;
  Array<float> grad_topk;
  Array<int32_t> topk_idx;
};

// `sparse` leaves one of 16 values of x, so that long sums stay exact in 16 bits.
template <typename T>
void test_backward_exact(const Shape& shape, bool sparse, Random& random) {
  BackwardCase<T> c(shape, random);
  fill_integers(c.router.x, 1, random);
  fill_integers(c.router.gate, 1, random);
  fill_integers(c.grad_logits, 1, random);
  fill_integers(c.grad_topk, 1, random);
  if (sparse) {
    for (int64_t i = 0; i < c.router.x.size(); ++i) {
      if (random() % 16 != 0) c.router.x[i] = Traits<T>::stored(0);
    }
  }
  Gradients<T> gradients = c.run(true, true);
  c.check(gradients, 0);
}

template <typename T>
void test_backward_rounding(const Shape& shape, Random& random) {
  BackwardCase<T> c(shape, random);
  fill_normal(c.router.x, 1.0, random);
  fill_normal(c.router.gate, 1.0, random);
  fill_normal(c.grad_logits, 1.0, random);
  fill_normal(c.grad_topk, 1.0, random);
  Gradients<T> gradients = c.run(true, true);
  c.check(gradients, 2.0 * static_cast<double>(shape.num_experts + 128));
  Gradients<T> x_alone = c.run(true, false);
  Gradients<T> gate_alone = c.run(false, true);
  check_bits("grad_x, alone", x_alone.x, gradients.x);
  check_bits("grad_gate, alone", gate_alone.gate, gradients.gate);
}

void test_bad_expert(int32_t bad) {
  Random random(1);
  BackwardCase<float> c({4, 8, 5, 2, 0, 0}, random);
  c.topk_idx[6] = bad;
  check_stops("an expert out of range", [&] { c.run(true, true); });
}

template <typename T>
void test_all(Random& random) {
  for (const int64_t num_experts : {1, 5, 16, 32, 33, 256}) {
    for (const int64_t num_tokens : {0, 1, 37}) {
      for (const int64_t lead : {0, 1}) {
        const int64_t top_k = std::min<int64_t>(num_experts, num_tokens == 37 ? 8 : num_experts);
        const Shape shape{num_tokens, lead ? 37 : 264, num_experts, top_k, lead ? 2 : 8, lead};
        test_exact<T>(shape, random);
        test_backward_exact<T>(shape, false, random);
      }
    }
    for (const int64_t top_k : {int64_t{1}, (num_experts + 1) / 2, num_experts}) {
      for (int round = 0; round < 4; ++round) test_special_logits<T>(num_experts, top_k, random);
    }
  }
  for (const int64_t hidden_size : {1, 8, 31, 32, 33, 512, 520}) {
    test_exact<T>({3, hidden_size, 6, 2, 0, 0}, random);
    test_backward_exact<T>({3, hidden_size, 6, 2, 0, 0}, false, random);
  }
  // Rows, stride and addresses are whole vectors in every combination but all three.
  for (const Shape& shape : {Shape{5, 264, 9, 3, 3, 0}, Shape{5, 264, 9, 3, 8, 1},
                             Shape{5, 37, 9, 3, 3, 0}, Shape{5, 260, 9, 3, 4, 0}}) {
    test_exact<T>(shape, random);
    test_backward_exact<T>(shape, false, random);
  }
  test_exact<T>({200, 40, 16, 2, 0, 0}, random);
  test_rounding<T>({2, 3584, 32, 16, 0, 0}, random);
  test_rounding<T>({35, 1500, 16, 8, 4, 0}, random);
  test_paths<T>(random);
  test_isolation<T>(random);
  test_backward_exact<T>({300, 24, 9, 2, 0, 0}, true, random);  // several blocks of tokens
  test_backward_exact<T>({8500, 1, 2, 1, 0, 0}, true, random);  // several blocks in a chunk
  test_backward_rounding<T>({150, 40, 33, 8, 0, 0}, random);
  test_backward_rounding<T>({37, 1040, 16, 8, 8, 0}, random);
}

void run_all() {
  Random random(14);
  test_all<float>(random);
  test_all<BFloat16>(random);
  test_all<Float16>(random);
  test_bad_expert(-1);
  test_bad_expert(5);
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  return sparse_unified::test::run_tests("cuda route_topk", sparse_unified::test::run_all);
}
