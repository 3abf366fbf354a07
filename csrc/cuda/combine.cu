// SPDX-License-Identifier: Apache-2.0
// combine on CUDA: out[t] = sum_k (weight_offset + weights[t, k]) * y[token_rows[t, k]],
// accumulated in fp32 in the order of k and rounded once.
//
// A CTA sums the rows of one token; a thread sums 16 bytes of columns, with up to kInFlight loads
// in flight. Bytes moved: R * D values read and T * D written, each once, so the kernel is bound by
// memory: at T = 4096, D = 3584 in 16 bits 264 MB for K = 8 and 499 MB for K = 16. Occupancy of 4
// CTAs of 224 threads per SM keeps 115 kB in flight, four times what covers the latency of an H200.
#include "sparse_unified/combine.h"

#include <algorithm>
#include <cmath>

#include "device/columns.h"
#include "device/launch.h"

namespace sparse_unified {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMinBlocks = 4;  // CTAs per SM
constexpr int kInFlight = 8;

// The rows of one token, in shared memory.
struct TokenRows {
  const int32_t* rows;   // [K]
  const float* weights;  // [K]
};

// sums += weights[k] * y[rows[k]][column...] for kCount values of k.
template <typename T, bool kIsAligned, int kCount>
SPARSE_UNIFIED_DEVICE void add_rows(const CombineParams& p, const TokenRows& token, int64_t k,
                                    int64_t column, float (&sums)[kVectorElements<T>]) {
  Vector16 vectors[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T* row = p.y.row<T>(token.rows[k + i]);  // [D]
    vectors[i] = load_columns_once<T, kIsAligned>(row, column, p.y.columns);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float values[kVectorElements<T>];
    widen<T>(vectors[i], values);
    const float weight = token.weights[k + i];
#pragma unroll
    for (int c = 0; c < kVectorElements<T>; ++c) sums[c] = fmaf(weight, values[c], sums[c]);
  }
}

// NOTE: kMinBlocks leaves 64 registers to a thread. Without it ptxas saves registers by holding
// back half of the loads.
template <typename T, bool kIsAligned>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) combine_kernel(const CombineParams p) {
  constexpr int kRows = kIsAligned ? kInFlight : kInFlight / 2;  // single elements take addresses
  auto* rows = reinterpret_cast<int32_t*>(dynamic_shared_memory());  // [K]
  auto* weights = reinterpret_cast<float*>(rows + p.top_k);          // [K]
  const int64_t token_idx = blockIdx.x;
  for (int64_t k = threadIdx.x; k < p.top_k; k += blockDim.x) {
    const int64_t slot = token_idx * p.top_k + k;
    const int32_t row = p.token_rows[slot];
    device_check(row >= 0 && row < p.y.rows);
    rows[k] = row;
    weights[k] = p.weights != nullptr ? p.weight_offset + p.weights[slot] : 1.0f;
  }
  sync_threads();

  const TokenRows token{rows, weights};
  T* out = static_cast<T*>(p.out) + token_idx * p.y.columns;  // [D]
  const int64_t step = static_cast<int64_t>(blockDim.x) * kVectorElements<T>;
  for (int64_t column = threadIdx.x * kVectorElements<T>; column < p.y.columns; column += step) {
    float sums[kVectorElements<T>] = {};
    int64_t k = 0;
    for (; k + kRows <= p.top_k; k += kRows) {
      add_rows<T, kIsAligned, kRows>(p, token, k, column, sums);
    }
    if (k + 4 <= p.top_k) {
      add_rows<T, kIsAligned, 4>(p, token, k, column, sums);
      k += 4;
    }
    if (k + 2 <= p.top_k) {
      add_rows<T, kIsAligned, 2>(p, token, k, column, sums);
      k += 2;
    }
    if (k < p.top_k) add_rows<T, kIsAligned, 1>(p, token, k, column, sums);
    store_columns<T, kIsAligned>(out, column, p.y.columns, narrow<T>(sums));
  }
}
static_assert(kInFlight == 8, "the rest of K is summed as 4 + 2 + 1 rows");

template <typename T>
cudaError_t launch_combine(const CombineParams& p, cudaStream_t stream) {
  // As many threads as cover a row in the fewest passes, and no more.
  const int64_t num_vectors =
      std::max<int64_t>(ceil_div<int64_t>(p.y.columns, kVectorElements<T>), 1);
  const int64_t num_passes = ceil_div<int64_t>(num_vectors, kMaxThreads);
  const int64_t num_warps = ceil_div<int64_t>(ceil_div(num_vectors, num_passes), kWarpSize);
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(p.num_tokens));
  config.num_threads = static_cast<int>(num_warps * kWarpSize);
  config.shared_bytes = p.top_k * static_cast<int64_t>(sizeof(int32_t) + sizeof(float));
  config.stream = stream;
  const bool is_aligned = has_aligned_columns<T>(p.y.data, p.y.stride, p.y.columns) &&
                          has_aligned_columns<T>(p.out, p.y.columns, p.y.columns);
  return launch(is_aligned ? combine_kernel<T, true> : combine_kernel<T, false>, config, p);
}

}  // namespace

cudaError_t combine_cuda(const CombineParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype,
                        [&]<typename T>(T) { return launch_combine<T>(params, stream); });
}

}  // namespace sparse_unified
