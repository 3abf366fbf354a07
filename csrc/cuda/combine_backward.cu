// SPDX-License-Identifier: Apache-2.0
// Backward of combine on CUDA, for every token t and slot k with row r = token_rows[t, k]:
//   grad_y[r] = weights[t, k] * grad_out[t]
//   grad_weights[t, k] = <grad_out[t], y[r]>
//
// A CTA takes one token and a warp of it one slot after another, so grad_out[t] comes from memory
// once and then from the L1 cache. A lane sums its columns in ascending order, then the lanes add
// up in a butterfly. Bytes moved: R * D values read (y), R * D written (grad_y), T * D read
// (grad_out). No two slots name the same row.
#include <algorithm>
#include <cmath>

#include "device/columns.h"
#include "device/launch.h"
#include "device/warp.h"
#include "sparse_unified/combine.h"

namespace sparse_unified {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxUnroll = 2;  // loads of a lane in flight

template <typename T, bool kIsAligned>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    combine_backward_kernel(const CombineBackwardParams p) {
  constexpr int kElements = kVectorElements<T>;
  constexpr int kUnroll = kIsAligned ? kMaxUnroll : 1;
  constexpr int64_t kStep = kWarpSize * kElements;
  const int64_t token = blockIdx.x;
  const T* grad_out = p.grad_out.row<T>(token);  // [D]
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;

  for (int64_t k = warp_idx(); k < p.top_k; k += num_warps) {
    const int64_t slot = token * p.top_k + k;
    const int64_t row = p.token_rows[slot];
    device_check(row >= 0 && row < p.y.rows);
    const float weight = p.weights[slot];
    const T* y = p.y.row<T>(row);                               // [D]
    T* grad_y = static_cast<T*>(p.grad_y) + row * p.y.columns;  // [D]
    float dot = 0.0f;
    for (int64_t column = lane_idx() * kElements; column < p.y.columns; column += kUnroll * kStep) {
      Vector16 grad[kUnroll];
      Vector16 value[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t at = column + i * kStep;
        grad[i] = load_columns<T, kIsAligned>(grad_out, at, p.y.columns);
        value[i] = p.grad_weights != nullptr ? load_columns_once<T, kIsAligned>(y, at, p.y.columns)
                                             : Vector16{};
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        float grads[kElements];
        float values[kElements];
        widen<T>(grad[i], grads);
        widen<T>(value[i], values);
#pragma unroll
        for (int c = 0; c < kElements; ++c) {
          dot = fmaf(grads[c], values[c], dot);
          grads[c] *= weight;
        }
        if (p.grad_y != nullptr) {
          store_columns<T, kIsAligned>(grad_y, column + i * kStep, p.y.columns, narrow<T>(grads));
        }
      }
    }
    dot = warp_sum(dot);
    if (p.grad_weights != nullptr && lane_idx() == 0) p.grad_weights[slot] = dot;
  }
}

template <typename T>
cudaError_t launch_combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
  if (p.top_k == 0) return cudaSuccess;
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(p.grad_out.rows));
  config.num_threads = static_cast<int>(std::min<int64_t>(p.top_k, kMaxWarps)) * kWarpSize;
  config.stream = stream;
  // A pointer that is not wanted is null, and null is aligned.
  const bool is_aligned = has_aligned_columns<T>(p.grad_out.data, p.grad_out.stride, p.y.columns) &&
                          has_aligned_columns<T>(p.y.data, p.y.stride, p.y.columns) &&
                          has_aligned_columns<T>(p.grad_y, p.y.columns, p.y.columns);
  return launch(is_aligned ? combine_backward_kernel<T, true> : combine_backward_kernel<T, false>,
                config, p);
}

}  // namespace

cudaError_t combine_backward_cuda(const CombineBackwardParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype,
                        [&]<typename T>(T) { return launch_combine_backward<T>(params, stream); });
}

}  // namespace sparse_unified
