// SPDX-License-Identifier: Apache-2.0
// Problems for the Hopper kernels of grouped_ffn, and their forward pass, in the emulator.
#pragma once

#include "cuda/grouped_ffn_sm90a.h"
#include "cuda_grouped_ffn_case.h"
#include "emulation/testing.h"

namespace sparse_unified::test {

// Widths are multiples of 16; tails in every other dimension, and in tiles of 120 and 256 neurons.
inline std::vector<FfnCase> sm90a_cases() {
  return {
      {.name = "ragged experts, some empty, strided weights",
       .num_tokens = 60,
       .hidden_size = 200,
       .expert_width = 144,
       .group_rows = {0, 1, 37, 130, 0, 64, 0},
       .padding = 8},
      {.name = "all rows on one expert, wider than a tile",
       .num_tokens = 300,
       .hidden_size = 264,
       .expert_width = 272,
       .group_rows = {0, 300, 0}},
      {.name = "every token on every expert",
       .num_tokens = 5,
       .hidden_size = 8,
       .expert_width = 16,
       .group_rows = {5, 5, 5}},
      {.name = "a long sum over one step of rows",
       .num_tokens = 40,
       .hidden_size = 520,
       .expert_width = 48,
       .group_rows = {64, 65}},
  };
}

// Lists of blocks: tails in the tile of 128 neurons, and boxes that begin within blocks.
inline std::vector<FfnCase> list_cases() {
  return {
      {.name = "an odd number of blocks of 64, the last first",
       .num_tokens = 70,
       .hidden_size = 200,
       .expert_width = 3 * 64,
       .group_rows = {70},
       .has_maps = false,
       .kept_blocks = {4, 0, 3},
       .block_size = 64,
       .num_blocks = 5,
       .padding = 8},
      {.name = "blocks of 128, whole tiles",
       .num_tokens = 140,
       .hidden_size = 136,
       .expert_width = 2 * 128,
       .group_rows = {140},
       .has_maps = false,
       .kept_blocks = {2, 0},
       .block_size = 128,
       .num_blocks = 3},
      {.name = "blocks of 192 that end within tiles and groups",
       .num_tokens = 30,
       .hidden_size = 72,
       .expert_width = 2 * 64,
       .group_rows = {0, 30, 33},
       .kept_blocks = {1, 2},
       .block_size = 192,
       .num_blocks = 4},
      {.name = "one block of 64",
       .num_tokens = 3,
       .hidden_size = 8,
       .expert_width = 64,
       .group_rows = {3},
       .has_maps = false,
       .kept_blocks = {0},
       .block_size = 64,
       .num_blocks = 1},
  };
}

// What is not kept is NaN, so that reading it shows.
template <typename T>
void forget_what_is_not_kept(FfnData<T>& data) {
  std::vector<bool> is_kept(static_cast<size_t>(data.width));
  for (const int32_t block : data.shape.kept_blocks) {
    for (int64_t i = 0; i < data.shape.block_size; ++i) {
      is_kept[static_cast<size_t>(block * data.shape.block_size + i)] = true;
    }
  }
  const auto forget = [](Matrix<T>& matrix, int64_t row, int64_t column) {
    matrix.data[row * matrix.stride + column] = {0xffff};
  };
  for (int64_t neuron = 0; neuron < data.width; ++neuron) {
    if (is_kept[static_cast<size_t>(neuron)]) continue;
    for (int64_t k = 0; k < data.shape.hidden_size; ++k) {
      forget(data.gate_proj, neuron, k);
      forget(data.up_proj, neuron, k);
      forget(data.down_proj, k, neuron);
    }
  }
}

// Few multiprocessors, so that a block computes several tiles.
constexpr DeviceInfo kSmallHopper{90, 3, 227 * 1024, 228 * 1024};

template <typename T>
struct Outputs {
  Array<T> hidden;  // with the padding rows between the groups
  Array<T> y, gate_rows, up_rows, grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj;
  explicit Outputs(const FfnData<T>& data)
      : hidden(grouped_ffn_sm90a_padded_rows(data.num_rows,
                                             static_cast<int64_t>(data.shape.group_rows.size())) *
               data.shape.expert_width),
        y(data.num_rows * data.shape.hidden_size),
        gate_rows(data.num_rows * data.shape.expert_width),
        up_rows(data.num_rows * data.shape.expert_width),
        grad_rows(data.num_rows * data.shape.hidden_size),
        grad_gate_proj(data.width * data.shape.hidden_size),
        grad_up_proj(data.width * data.shape.hidden_size),
        grad_down_proj(data.width * data.shape.hidden_size) {
    for (Array<T>* array : {&hidden, &y, &gate_rows, &up_rows, &grad_rows, &grad_gate_proj,
                            &grad_up_proj, &grad_down_proj}) {
      fill_nan(*array);
    }
  }
};

inline void check_success(const char* what, cudaError_t error) {
  check_equal(what, 0, error, cudaSuccess);
}

// Gradients are left alone.
template <typename T>
Outputs<T> run_forward(FfnData<T>& data, const GroupedFfnSm90aOptions& options,
                       const DeviceInfo& device = kSmallHopper) {
  Outputs<T> out(data);
  GroupedFfnCudaParams params = data.params();
  params.y = out.y.get();
  params.gate_rows = out.gate_rows.get();
  params.up_rows = out.up_rows.get();
  void* hidden = out.hidden.get();
  check_success("up", grouped_ffn_up_sm90a(params, device, options, hidden, nullptr));
  check_success("down", grouped_ffn_down_sm90a(params, device, options, hidden, nullptr));
  return out;
}

template <typename T>
void check_forward(const std::string& name, Outputs<T>& out, const FfnResults& exact,
                   const FfnResults& torch) {
  check_as_good_as_torch(name + ": gate_rows", out.gate_rows, exact.gate, torch.gate);
  check_as_good_as_torch(name + ": up_rows", out.up_rows, exact.up, torch.up);
  check_as_good_as_torch(name + ": y", out.y, exact.y, torch.y);
}

}  // namespace sparse_unified::test
