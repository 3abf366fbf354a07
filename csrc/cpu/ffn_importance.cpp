// SPDX-License-Identifier: Apache-2.0
// Sums over tokens of |h|, h^2 and |h| > threshold, h = silu(gate) * up. A vector holds 16 adjacent
// neurons and walks down the tokens: two values read for about 25 operations, nothing written but
// the sums.
#include "sparse_unified/ffn_importance.h"

#include <algorithm>

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

// Tokens summed in one go, so that fp32 rounding grows with the number of blocks and not of tokens.
constexpr int64_t kSumTokens = 32;

struct Sums {
  Float abs{};
  Float squares{};
  Float fired{};
};

// The sums over tokens [token, token_end) for `lanes` neurons from `neuron` on.
template <typename T>
SPARSE_UNIFIED_INLINE Sums sum_tokens(const FfnImportanceParams& params, int64_t neuron,
                                      int64_t lanes, int64_t token, int64_t token_end) {
  Sums sums;
  for (; token < token_end; ++token) {
    const float weight = params.token_weights != nullptr ? params.token_weights[token] : 1.0f;
    if (weight == 0) continue;
    const T* gate = params.gate.row<T>(token) + neuron;
    const T* up = params.up.row<T>(token) + neuron;
    const Float g = lanes == kLanes ? load(gate) : load(gate, lanes);
    const Float u = lanes == kLanes ? load(up) : load(up, lanes);
    const Float hidden = g * sigmoid(g) * u;
    const Float size = bit_cast<Float>(bit_cast<UInt>(hidden) & 0x7fffffffu);
    sums.abs += weight * size;
    sums.squares += weight * hidden * hidden;
    sums.fired += size > params.threshold ? broadcast(weight) : Float{};
  }
  return sums;
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void ffn_importance(const FfnImportanceParams& params, int64_t begin,
                                                int64_t end) {
  for (int64_t neuron = begin; neuron < end; neuron += kLanes) {
    const int64_t lanes = std::min(kLanes, end - neuron);
    Sums sums;
    for (int64_t token = 0; token < params.gate.rows; token += kSumTokens) {
      const int64_t token_end = std::min(token + kSumTokens, params.gate.rows);
      const Sums block = sum_tokens<T>(params, neuron, lanes, token, token_end);
      sums.abs += block.abs;
      sums.squares += block.squares;
      sums.fired += block.fired;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      params.sum_abs[neuron + lane] += static_cast<double>(sums.abs[lane]);
      params.sum_squares[neuron + lane] += static_cast<double>(sums.squares[lane]);
      params.num_fired[neuron + lane] += static_cast<double>(sums.fired[lane]);
    }
  }
}

}  // namespace

void ffn_importance_cpu(const FfnImportanceParams& params, int64_t begin, int64_t end) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { ffn_importance<T>(params, begin, end); });
}

}  // namespace sparse_unified
