// SPDX-License-Identifier: Apache-2.0
// permute on CUDA: y[r] = x[row_token[r]].
//
// A warp copies a row, coalesced, with kUnroll loads of a lane in flight. Bytes moved: R * D *
// element size written and as many read, of which T * D come from memory and the rest from the L2
// cache (rows of one expert name tokens in order). The unit is the largest power of two up to 16
// bytes that divides both addresses, the stride and the row: 16 bytes for whole, aligned vectors.
#include "sparse_unified/permute.h"

#include "device/launch.h"
#include "device/vector.h"

namespace sparse_unified {
namespace {

constexpr int kWarps = 8;
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kWarpSize;

template <typename Unit>
__global__ void __launch_bounds__(kWarps* kWarpSize) permute_kernel(const PermuteParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_idx();
  if (row >= p.num_rows) return;
  const int64_t token = p.row_token[row];
  device_check(token >= 0 && token < p.x.rows);
  const auto* source = reinterpret_cast<const Unit*>(p.x.row<char>(token));  // [D]
  auto* target =                                                             // [D]
      reinterpret_cast<Unit*>(static_cast<char*>(p.y) + row * p.x.columns);
  const int64_t num_units = p.x.columns / static_cast<int64_t>(sizeof(Unit));

  int64_t unit = lane_idx();
  for (; unit + kStep - kWarpSize < num_units; unit += kStep) {
    Unit values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) values[i] = source[unit + i * kWarpSize];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) target[unit + i * kWarpSize] = values[i];
  }
  for (; unit < num_units; unit += kWarpSize) target[unit] = source[unit];
}

template <typename Unit>
cudaError_t launch_permute(const PermuteParams& params, cudaStream_t stream) {
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(params.num_rows, kWarps)));
  config.num_threads = kWarps * kWarpSize;
  config.stream = stream;
  return launch(permute_kernel<Unit>, config, params);
}

}  // namespace

cudaError_t permute_cuda(const PermuteParams& params, cudaStream_t stream) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(params.x.data) |
                        reinterpret_cast<uintptr_t>(params.y) |
                        static_cast<uint64_t>(params.x.stride | params.x.columns);
  if (bits % 16 == 0) return launch_permute<Vector16>(params, stream);
  if (bits % 8 == 0) return launch_permute<uint64_t>(params, stream);
  if (bits % 4 == 0) return launch_permute<uint32_t>(params, stream);
  if (bits % 2 == 0) return launch_permute<uint16_t>(params, stream);
  return launch_permute<uint8_t>(params, stream);
}

}  // namespace sparse_unified
