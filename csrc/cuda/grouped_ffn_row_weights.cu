// SPDX-License-Identifier: Apache-2.0
// Weights of rows from [T, K] to [R] in the order of the rows, and their gradients back, a thread a
// slot (t, k). 12 R bytes, and 4 (parts + 2) R: nothing beside the GEMMs in between.
#include "cuda/grouped_ffn_row_weights.h"

#include "device/launch.h"

namespace sparse_unified {
namespace {

constexpr int kThreads = 256;

struct SlotParams {
  RowWeights weights;
  int64_t num_rows;    // R = T K
  float* row_weights;  // [R]
  const float* parts;  // [parts, R]
  int64_t num_parts;
};

SPARSE_UNIFIED_DEVICE int64_t slot_idx() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

SPARSE_UNIFIED_DEVICE int64_t row_of(const SlotParams& p, int64_t slot) {
  const int64_t row = p.weights.token_rows[slot];
  device_check(row >= 0 && row < p.num_rows);
  return row;
}

__global__ void __launch_bounds__(kThreads) spread_row_weights_kernel(const SlotParams p) {
  const int64_t slot = slot_idx();
  if (slot >= p.num_rows) return;
  p.row_weights[row_of(p, slot)] = p.weights.offset + p.weights.weights[slot];
}

__global__ void __launch_bounds__(kThreads) sum_row_parts_kernel(const SlotParams p) {
  const int64_t slot = slot_idx();
  if (slot >= p.num_rows) return;
  const float* parts = p.parts + row_of(p, slot);
  float sum = 0.0f;
  for (int64_t part = 0; part < p.num_parts; ++part) sum += parts[part * p.num_rows];
  p.weights.grad_weights[slot] = sum;
}

cudaError_t launch_slots(void (*kernel)(SlotParams), const SlotParams& params,
                         cudaStream_t stream) {
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(params.num_rows, kThreads)));
  config.num_threads = kThreads;
  config.stream = stream;
  return launch(kernel, config, params);
}

}  // namespace

cudaError_t spread_row_weights(const RowWeights& weights, int64_t num_rows, float* row_weights,
                               cudaStream_t stream) {
  return launch_slots(spread_row_weights_kernel, {weights, num_rows, row_weights, nullptr, 0},
                      stream);
}

cudaError_t sum_row_parts(const RowWeights& weights, int64_t num_rows, const float* parts,
                          int64_t num_parts, cudaStream_t stream) {
  return launch_slots(sum_row_parts_kernel, {weights, num_rows, nullptr, parts, num_parts}, stream);
}

}  // namespace sparse_unified
