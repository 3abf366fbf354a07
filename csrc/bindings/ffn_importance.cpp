// SPDX-License-Identifier: Apache-2.0
// Tiles of gate and up activations come from torch's GEMM, and only their sums stay.
#include "sparse_unified/ffn_importance.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/ops.h"

namespace sparse_unified {
namespace {

// NOTE: constants, not functions of the thread count, so that results do not depend on it. The
// tokens of a tile are summed in fp32, the tiles in fp64.
constexpr int64_t kTileTokens = 512;
constexpr int64_t kTileNeurons = 512;
constexpr int64_t kGrainNeurons = 32;

void check_token_weights(const char* op, const Tensor& token_weights, int64_t num_tokens) {
  check_tensor(op, "token_weights", token_weights, 1);
  check_dtype(op, "token_weights", token_weights, ScalarType::Float);
  check_size(op, "token_weights", token_weights, 0, num_tokens, "the number of tokens");
}

// A copy of the sums in fp32.
Tensor rounded(const Tensor& like, const std::vector<double>& sums) {
  Tensor out = empty_like_sized(like, {static_cast<int64_t>(sums.size())}, ScalarType::Float);
  auto* data = out.mutable_data_ptr<float>();
  std::transform(sums.begin(), sums.end(), data, [](double v) { return static_cast<float>(v); });
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> ffn_importance(Tensor x, Tensor gate_proj, Tensor up_proj,
                                                  double threshold,
                                                  std::optional<Tensor> token_weights) {
  constexpr const char* kOp = "ffn_importance";
  check_tensor(kOp, "x", x, 2);
  const DType dtype = check_float(kOp, "x", x);
  const ScalarType scalar_type = x.scalar_type();
  const int64_t num_tokens = x.size(0);
  const int64_t hidden_size = x.size(1);
  check_tensor(kOp, "gate_proj", gate_proj, 2);
  check_dtype(kOp, "gate_proj", gate_proj, scalar_type);
  check_size(kOp, "gate_proj", gate_proj, 1, hidden_size, "the hidden size of x");
  const int64_t width = gate_proj.size(0);
  check_tensor(kOp, "up_proj", up_proj, 2);
  check_dtype(kOp, "up_proj", up_proj, scalar_type);
  check_size(kOp, "up_proj", up_proj, 0, width, "the width of gate_proj");
  check_size(kOp, "up_proj", up_proj, 1, hidden_size, "the hidden size of x");
  check(threshold >= 0 && std::isfinite(threshold), kOp, "threshold", "be finite and at least 0",
        threshold);
  if (token_weights) {
    check_token_weights(kOp, *token_weights, num_tokens);
    token_weights = as_contiguous(*token_weights);
    const auto* weights = token_weights->const_data_ptr<float>();
    for (int64_t token = 0; token < num_tokens; ++token) {
      if (!(weights[token] >= 0) || !std::isfinite(weights[token])) {
        fail(kOp, "token_weights", "be finite and at least 0", weights[token], " for token ",
             token);
      }
    }
  }
  x = with_dense_rows(x);
  gate_proj = with_dense_rows(gate_proj);
  up_proj = with_dense_rows(up_proj);

  const int64_t element = element_bytes(dtype);
  const auto rows = [&](const Tensor& matrix, int64_t first) {
    return static_cast<char*>(matrix.data_ptr()) + first * matrix.stride(0) * element;
  };
  const Tensor gate = empty_like_sized(x, {std::min(num_tokens, kTileTokens), kTileNeurons});
  const Tensor up = empty_like_sized(x, {std::min(num_tokens, kTileTokens), kTileNeurons});
  const auto size = static_cast<size_t>(width);
  std::vector<double> sum_abs(size);
  std::vector<double> sum_squares(size);
  std::vector<double> num_fired(size);
  for (int64_t neuron = 0; neuron < width; neuron += kTileNeurons) {
    const int64_t m = std::min(kTileNeurons, width - neuron);
    const auto neurons_t = [&](const Tensor& weight) {
      return transposed(
          matrix_view(rows(weight, neuron), scalar_type, m, hidden_size, weight.stride(0)));
    };
    const Tensor gate_t = neurons_t(gate_proj);
    const Tensor up_t = neurons_t(up_proj);
    for (int64_t token = 0; token < num_tokens; token += kTileTokens) {
      const int64_t n = std::min(kTileTokens, num_tokens - token);
      const Tensor tokens = matrix_view(rows(x, token), scalar_type, n, hidden_size, x.stride(0));
      matmul_out(matrix_view(gate.data_ptr(), scalar_type, n, m, m), tokens, gate_t);
      matmul_out(matrix_view(up.data_ptr(), scalar_type, n, m, m), tokens, up_t);
      const FfnImportanceParams params{
          .dtype = dtype,
          .gate = {gate.const_data_ptr(), n, m, m},
          .up = {up.const_data_ptr(), n, m, m},
          .token_weights = token_weights ? token_weights->const_data_ptr<float>() + token : nullptr,
          .threshold = static_cast<float>(threshold),
          .sum_abs = sum_abs.data() + neuron,
          .sum_squares = sum_squares.data() + neuron,
          .num_fired = num_fired.data() + neuron};
      torch::stable::parallel_for(0, m, kGrainNeurons, [&](int64_t begin, int64_t end) {
        ffn_importance_cpu(params, begin, end);
      });
    }
  }
  return {rounded(x, sum_abs), rounded(x, sum_squares), rounded(x, num_fired)};
}

}  // namespace sparse_unified
