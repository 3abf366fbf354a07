// SPDX-License-Identifier: Apache-2.0
// Backward of route_topk on CUDA. With
//   g[t, e] = grad_logits[t, e] + sum_k [topk_idx[t, k] = e] grad_topk_logits[t, k]
// it computes grad_x[t] = sum_e g[t, e] * gate[e] and grad_gate[e] = sum_t g[t, e] * x[t].
//
// Four kernels:
//   add_topk_kernel     g [T, E] into the workspace: 2 T E values moved.
//   grad_x_kernel       a block: kBlockTokens tokens and kThreads vectors of columns; a thread:
//                       kTileTokens tokens at a time and one vector. T * D values written; the
//                       block's slice of gate (64 kB for 32 experts) stays in the L1 cache.
//   partial_gate_kernel a block: a chunk of tokens and one vector of columns a lane, kWarpExperts
//                       experts a warp. T * D values read, the lines shared by the warps of a
//                       block.
//   sum_gate_kernel     adds up the chunks in their order, and rounds once.
// 2 T D E operations each in fp32 (g is fp32, so no tensor cores): 14 us at T = 4096, D = 3584,
// E = 32 on an H200, about what it takes to move x and grad_x (29 MB each, 7 us) and the partial
// sums (15 MB, in the L2 cache). Sums over tokens run within kSumTokens tokens, then over these.
#include <algorithm>
#include <cmath>

#include "device/columns.h"
#include "device/launch.h"
#include "sparse_unified/route_topk.h"

namespace sparse_unified {
namespace {

constexpr int kThreads = 128;
constexpr int kBlockTokens = 32;
constexpr int kTileTokens = 8;
constexpr int kMaxWarps = 4;     // of partial_gate_kernel
constexpr int kWarpExperts = 8;  //
constexpr int kSumTokens = 128;  // tokens whose g is in shared memory at a time
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kWorkspaceAlignment = 256;
static_assert(kBlockTokens % kTileTokens == 0 && kTileTokens % 4 == 0 && kWarpExperts % 4 == 0);

struct BackwardKernelParams {
  RouteTopkBackwardParams op;
  float* grad;             // g [T, E]
  float* partials;         // [num_chunks, E, partial_stride]
  int64_t num_chunks;      //
  int64_t chunk_tokens;    // a multiple of kSumTokens
  int64_t partial_stride;  // D rounded up to whole vectors
};

__global__ void __launch_bounds__(kThreads) add_topk_kernel(const BackwardKernelParams params) {
  const RouteTopkBackwardParams& p = params.op;
  const int num_experts = static_cast<int>(p.gate.rows);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * num_experts; i += kThreads) {
    const int64_t token = first_token + i / num_experts;
    if (token >= p.x.rows) break;
    const int expert = i % num_experts;
    const int32_t* topk_idx = p.topk_idx + token * p.top_k;         // [K]
    const float* grad_topk = p.grad_topk_logits + token * p.top_k;  // [K]
    float grad = p.grad_logits[token * num_experts + expert];
    for (int64_t k = 0; k < p.top_k; ++k) {
      device_check(topk_idx[k] >= 0 && topk_idx[k] < num_experts);
      if (topk_idx[k] == expert) grad += grad_topk[k];
    }
    params.grad[token * num_experts + expert] = grad;
  }
}

// sums[i] += factors[i] * values for the kCount floats at `factors`, aligned to 16 bytes.
template <int kCount, int kElements>
SPARSE_UNIFIED_DEVICE void add_products(const float* factors, const float (&values)[kElements],
                                        float (&sums)[kCount][kElements]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float four[4];
    widen<float>(load_vector(factors + i), four);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < kElements; ++c) {
        sums[i + j][c] = fmaf(four[j], values[c], sums[i + j][c]);
      }
    }
  }
}

template <typename T, bool kIsAligned>
__global__ void __launch_bounds__(kThreads) grad_x_kernel(const BackwardKernelParams params) {
  const RouteTopkBackwardParams& p = params.op;
  constexpr int kElements = kVectorElements<T>;
  auto* grad = reinterpret_cast<float*>(dynamic_shared_memory());  // [E, kBlockTokens]
  const int thread_idx = static_cast<int>(threadIdx.x);
  const int num_experts = static_cast<int>(p.gate.rows);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + thread_idx) * kElements;
  for (int i = thread_idx; i < kBlockTokens * num_experts; i += kThreads) {
    const int64_t token = first_token + i / num_experts;
    grad[i % num_experts * kBlockTokens + i / num_experts] =
        token < p.x.rows ? params.grad[first_token * num_experts + i] : 0.0f;
  }
  sync_threads();

  for (int tile = 0; tile < kBlockTokens; tile += kTileTokens) {
    float sums[kTileTokens][kElements] = {};
    for (int e = 0; e < num_experts; ++e) {
      const T* gate = p.gate.row<T>(e);  // [D]
      float values[kElements];
      widen<T>(load_columns<T, kIsAligned>(gate, column, p.x.columns), values);
      add_products(grad + e * kBlockTokens + tile, values, sums);
    }
#pragma unroll
    for (int i = 0; i < kTileTokens; ++i) {
      const int64_t token = first_token + tile + i;
      if (token >= p.x.rows) continue;
      T* grad_x = static_cast<T*>(p.grad_x) + token * p.x.columns;  // [D]
      store_columns<T, kIsAligned>(grad_x, column, p.x.columns, narrow<T>(sums[i]));
    }
  }
}

template <typename T, bool kIsAligned>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    partial_gate_kernel(const BackwardKernelParams params) {
  const RouteTopkBackwardParams& p = params.op;
  constexpr int kElements = kVectorElements<T>;
  auto* grad = reinterpret_cast<float*>(dynamic_shared_memory());  // [kSumTokens, block_experts]
  const int num_threads = static_cast<int>(blockDim.x);
  const int block_experts = num_threads / kWarpSize * kWarpExperts;
  const int block_expert = static_cast<int>(blockIdx.z) * block_experts;
  const int warp_expert = warp_idx() * kWarpExperts;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarpSize + lane_idx()) * kElements;
  const int64_t chunk_begin = static_cast<int64_t>(blockIdx.y) * params.chunk_tokens;
  const int64_t chunk_end =
      chunk_begin + params.chunk_tokens < p.x.rows ? chunk_begin + params.chunk_tokens : p.x.rows;
  float* partials = params.partials +  // [E, partial_stride]
                    static_cast<int64_t>(blockIdx.y) * p.gate.rows * params.partial_stride;

  for (int64_t begin = chunk_begin; begin < chunk_end; begin += kSumTokens) {
    const int64_t tokens_left = chunk_end - begin;
    const int num_tokens = static_cast<int>(tokens_left < kSumTokens ? tokens_left : kSumTokens);
    sync_threads();
    for (int i = static_cast<int>(threadIdx.x); i < num_tokens * block_experts; i += num_threads) {
      const int64_t token = begin + i / block_experts;
      const int expert = block_expert + i % block_experts;
      grad[i] = expert < p.gate.rows ? params.grad[token * p.gate.rows + expert] : 0.0f;
    }
    sync_threads();

    float sums[kWarpExperts][kElements] = {};
#pragma unroll 4
    for (int token = 0; token < num_tokens; ++token) {
      const T* x = p.x.row<T>(begin + token);  // [D]
      float values[kElements];
      widen<T>(load_columns<T, kIsAligned>(x, column, p.x.columns), values);
      add_products(grad + token * block_experts + warp_expert, values, sums);
    }

    if (column >= p.x.columns) continue;
#pragma unroll
    for (int i = 0; i < kWarpExperts; ++i) {
      const int expert = block_expert + warp_expert + i;
      if (expert >= p.gate.rows) continue;
      float* partial = partials + expert * params.partial_stride + column;
#pragma unroll
      for (int c = 0; c < kElements; c += 4) {
        float values[4] = {sums[i][c], sums[i][c + 1], sums[i][c + 2], sums[i][c + 3]};
        if (begin > chunk_begin) {
          float earlier[4];
          widen<float>(load_vector(partial + c), earlier);
          for (int j = 0; j < 4; ++j) values[j] += earlier[j];
        }
        store_vector(partial + c, narrow<float>(values));
      }
    }
  }
}

template <typename T, bool kIsAligned>
__global__ void __launch_bounds__(kThreads) sum_gate_kernel(const BackwardKernelParams params) {
  const RouteTopkBackwardParams& p = params.op;
  constexpr int kElements = kVectorElements<T>;
  const int64_t expert = blockIdx.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (column >= p.x.columns) return;
  float sums[kElements] = {};
#pragma unroll 4
  for (int64_t chunk = 0; chunk < params.num_chunks; ++chunk) {
    const float* partial =  // [partial_stride]
        params.partials + (chunk * p.gate.rows + expert) * params.partial_stride;
#pragma unroll
    for (int c = 0; c < kElements; c += 4) {
      float values[4];
      widen<float>(load_vector(partial + column + c), values);
      for (int j = 0; j < 4; ++j) sums[c + j] += values[j];
    }
  }
  T* grad_gate = static_cast<T*>(p.grad_gate) + expert * p.x.columns;  // [D]
  store_columns<T, kIsAligned>(grad_gate, column, p.x.columns, narrow<T>(sums));
}

int64_t align_bytes(int64_t bytes) {
  return ceil_div(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
}

// The kernels' params; the workspace may be null to ask for its layout.
BackwardKernelParams plan(const RouteTopkBackwardParams& op, void* workspace) {
  constexpr int64_t kPartialElements = kVectorBytes / 2;  // of the smallest type
  BackwardKernelParams params{};
  params.op = op;
  params.grad = static_cast<float*>(workspace);
  if (op.grad_gate != nullptr && op.x.rows > 0) {
    const int64_t num_sums = ceil_div<int64_t>(op.x.rows, kSumTokens);
    params.chunk_tokens = ceil_div(num_sums, kMaxChunks) * kSumTokens;
    params.num_chunks = ceil_div(op.x.rows, params.chunk_tokens);
    params.partial_stride = ceil_div(op.x.columns, kPartialElements) * kPartialElements;
  }
  return params;
}

int64_t grad_bytes(const RouteTopkBackwardParams& op) {
  return align_bytes(op.x.rows * op.gate.rows * static_cast<int64_t>(sizeof(float)));
}

template <typename T, bool kIsAligned>
cudaError_t launch_backward(const BackwardKernelParams& params, cudaStream_t stream) {
  const RouteTopkBackwardParams& p = params.op;
  constexpr int kElements = kVectorElements<T>;
  const int64_t num_vectors = ceil_div<int64_t>(p.x.columns, kElements);
  const auto token_blocks = static_cast<unsigned>(ceil_div<int64_t>(p.x.rows, kBlockTokens));
  const auto vector_blocks = static_cast<unsigned>(ceil_div<int64_t>(num_vectors, kThreads));
  LaunchConfig config{};
  config.stream = stream;
  config.num_threads = kThreads;
  config.grid = dim3(token_blocks);
  cudaError_t error = launch(add_topk_kernel, config, params);
  if (error != cudaSuccess) return error;

  if (p.grad_x != nullptr) {
    config.grid = dim3(token_blocks, vector_blocks);
    config.shared_bytes = kBlockTokens * p.gate.rows * static_cast<int64_t>(sizeof(float));
    error = launch(grad_x_kernel<T, kIsAligned>, config, params);
    if (error != cudaSuccess) return error;
  }
  if (p.grad_gate == nullptr) return cudaSuccess;

  const int64_t num_warps =
      std::min<int64_t>(ceil_div<int64_t>(p.gate.rows, kWarpExperts), kMaxWarps);
  const int64_t block_experts = num_warps * kWarpExperts;
  config.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(num_vectors, kWarpSize)),
                     static_cast<unsigned>(params.num_chunks),
                     static_cast<unsigned>(ceil_div(p.gate.rows, block_experts)));
  config.num_threads = static_cast<int>(num_warps) * kWarpSize;
  config.shared_bytes = kSumTokens * block_experts * static_cast<int64_t>(sizeof(float));
  error = launch(partial_gate_kernel<T, kIsAligned>, config, params);
  if (error != cudaSuccess) return error;

  config.grid = dim3(vector_blocks, static_cast<unsigned>(p.gate.rows));
  config.num_threads = kThreads;
  config.shared_bytes = 0;
  return launch(sum_gate_kernel<T, kIsAligned>, config, params);
}

template <typename T>
cudaError_t launch_backward(const BackwardKernelParams& params, cudaStream_t stream) {
  const RouteTopkBackwardParams& p = params.op;
  // A pointer that is not wanted is null, and null is aligned.
  const bool is_aligned = has_aligned_columns<T>(p.x.data, p.x.stride, p.x.columns) &&
                          has_aligned_columns<T>(p.gate.data, p.gate.stride, p.x.columns) &&
                          has_aligned_columns<T>(p.grad_x, p.x.columns, p.x.columns) &&
                          has_aligned_columns<T>(p.grad_gate, p.x.columns, p.x.columns);
  return is_aligned ? launch_backward<T, true>(params, stream)
                    : launch_backward<T, false>(params, stream);
}

}  // namespace

int64_t route_topk_backward_cuda_workspace_bytes(const RouteTopkBackwardParams& params) {
  const BackwardKernelParams p = plan(params, nullptr);
  const int64_t num_partials = p.num_chunks * params.gate.rows * p.partial_stride;
  return grad_bytes(params) + align_bytes(num_partials * static_cast<int64_t>(sizeof(float)));
}

cudaError_t route_topk_backward_cuda(const RouteTopkBackwardParams& params, void* workspace,
                                     cudaStream_t stream) {
  BackwardKernelParams p = plan(params, workspace);
  p.partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + grad_bytes(params));
  return dispatch_dtype(params.dtype, [&]<typename T>(T) { return launch_backward<T>(p, stream); });
}

}  // namespace sparse_unified
