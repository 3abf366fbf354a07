// SPDX-License-Identifier: Apache-2.0
// First step of the backward pass of grouped_ffn on Hopper: grad_hidden = grad_y down, and from it
// and the kept activations the gradients of gate and up, and hidden once more.
//
// A block stays on its multiprocessor and takes every gridDim.x-th tile of 128 rows and 256
// neurons. Three warpgroups:
//   producer   one lane has TMA bring 128 rows of grad_y and, in four boxes of 64 neurons, 64 rows
//              of down, where neurons are contiguous (Major::kMN)
//   consumers  64 rows each: m64n256k16, 128 accumulators a thread; each thread reads gate and up
//              of its neurons and writes the three results itself, in words of two neurons
// through a ring of 4 stages of 64 k (48 KB each). Results go to buffers whose groups are padded to
// whole tiles; padding rows get zeros, which the weight gradients rely on: what the tile holds
// there are the rows of another expert.
//
// Bytes: grad_y is read h / 256 times, down once for 16 row tiles, mostly from L2; 2 R h elements
// are read and 3 R h written. FLOPs: 2 R D h.
// Preconditions: D % 8 == 0, h % 16 == 0, rows of down and grad_y on 16-byte boundaries.
#include <algorithm>

#include "cuda/grouped_ffn_sm90a.h"
#include "device/launch.h"
#include "device/mainloop_sm90a.h"
#include "device/math.h"
#include "device/tensor_copy.h"
#include "device/tile_scheduler.h"
#include "device/vector.h"
#include "device/warpgroup.h"

namespace sparse_unified {
namespace {

constexpr int kTileRows = kSm90aTileRows;
constexpr int kTileNeurons = 256;
constexpr int kTileK = kStageK;
constexpr int kStages = 4;
constexpr int kNumConsumers = 2;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupSize;
constexpr int kConsumerRows = kTileRows / kNumConsumers;
constexpr int kAccumulators = kTileNeurons / 2;  // of a thread: 64 * 256 / 128
static_assert(kConsumerRows == 64, "the M of wgmma");

// 40 and 232 registers for 128 and 256 threads are all but 1024 of the 65536.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;  // of grad_y, a stage
constexpr int kBoxNeurons = 64;
constexpr int kBoxBytes = kTileK * kSwizzleRowBytes;  // of down
constexpr int kNumBoxes = kTileNeurons / kBoxNeurons;
constexpr int kStageBytes = kRowsBytes + kNumBoxes * kBoxBytes;

// Groups of 8 neurons whose gate and up a thread has on the way at a time.
constexpr int kBatch = 8;
static_assert(kTileNeurons / 8 % kBatch == 0);

// Shared memory: stages of {grad_y, down}, barriers.
constexpr int kBarrierOffset = kStages * kStageBytes;
constexpr int kSharedBytes = kBarrierOffset + RingBarriers<kStages>::kBytes;
static_assert(kSharedBytes <= 227 * 1024);

constexpr int kFullArrivals = 1;
constexpr int kEmptyArrivals = kNumConsumers * kWarpgroupSize / kWarpSize;

template <typename T>
struct GradHiddenParams {
  TensorMap grad_y;               // [R, D], boxes [128, 64]
  TensorMap down_proj;            // [D, I], boxes [64, 64]
  const int32_t* expert_offsets;  // [E + 1], or null
  const T* gate_rows;             // [R, h]
  const T* up_rows;               // [R, h]
  T* grad_gate;                   // [padded rows, h]
  T* grad_up;                     // [padded rows, h]
  T* hidden;                      // [padded rows, h], or null
  int num_rows;                   // R
  int num_experts;                // E
  int expert_width;               // h
  int num_n;                      // tiles of neurons
  int num_k;                      // stages of a tile
};

template <typename T>
SPARSE_UNIFIED_DEVICE void produce(const GradHiddenParams<T>& params, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  // NOTE: the other lanes do not even wait: nothing would keep them from falling two phases behind,
  // and a wait names the parity of its phase alone.
  const bool copies_boxes = elect_lane();
  RingPosition<kStages> at;
  RowTile tile;
  for (int idx = static_cast<int>(blockIdx.x); find_row_tile<kTileRows>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += static_cast<int>(gridDim.x)) {
    const int neuron = tile.group * params.expert_width + tile.n * kTileNeurons;
    for (int k = 0; k < params.num_k; ++k, at.advance()) {
      if (!copies_boxes) continue;
      ring.wait_empty(at);
      const uint32_t stage = shared + at.stage * kStageBytes;
      const uint32_t full = ring.full(at.stage);
      barrier_arrive_expect_bytes(full, kStageBytes);
      load_box(stage, &params.grad_y, tile.first_row, k * kTileK, full);
#pragma unroll
      for (int box = 0; box < kNumBoxes; ++box) {
        load_box(stage + kRowsBytes + box * kBoxBytes, &params.down_proj, k * kTileK,
                 neuron + box * kBoxNeurons, full);
      }
    }
  }
}

// Gradients of two neurons of a row from grad_hidden and the kept words of gate and up.
template <typename T>
SPARSE_UNIFIED_DEVICE void store_pair(const GradHiddenParams<T>& params, int64_t padded, float low,
                                      float high, uint32_t gate_word, uint32_t up_word) {
  float gate[2], up[2];
  unpack<T>(gate_word, gate[0], gate[1]);
  unpack<T>(up_word, up[0], up[1]);
  const SwigluGradient first = swiglu_gradient(low, gate[0], up[0]);
  const SwigluGradient second = swiglu_gradient(high, gate[1], up[1]);
  *reinterpret_cast<uint32_t*>(params.grad_gate + padded) = pack<T>(first.gate, second.gate);
  *reinterpret_cast<uint32_t*>(params.grad_up + padded) = pack<T>(first.up, second.up);
  if (params.hidden != nullptr) {
    *reinterpret_cast<uint32_t*>(params.hidden + padded) = pack<T>(first.hidden, second.hidden);
  }
}

template <typename T>
SPARSE_UNIFIED_DEVICE void store_tile(const GradHiddenParams<T>& params, const RowTile& tile,
                                      const float (&d)[kAccumulators], int consumer) {
  const int first_neuron = tile.n * kTileNeurons + lane_idx() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = consumer * kConsumerRows + warp_idx() % 4 * 16 + lane_idx() / 4 + 8 * half;
    const bool is_valid = tile.first_row + row < tile.end_row;
    const int64_t kept =
        static_cast<int64_t>(tile.first_row + row) * params.expert_width + first_neuron;
    const int64_t padded =
        static_cast<int64_t>(tile.slot * kTileRows + row) * params.expert_width + first_neuron;
#pragma unroll
    for (int first = 0; first < kTileNeurons / 8; first += kBatch) {
      // NOTE: all loads of a batch before its stores, which the compiler may not let them pass.
      uint32_t gate[kBatch], up[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int offset = 8 * (first + i);
        const bool is_kept = is_valid && first_neuron + offset < params.expert_width;
        gate[i] =
            is_kept ? *reinterpret_cast<const uint32_t*>(params.gate_rows + kept + offset) : 0;
        up[i] = is_kept ? *reinterpret_cast<const uint32_t*>(params.up_rows + kept + offset) : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int offset = 8 * (first + i);
        if (first_neuron + offset >= params.expert_width) continue;
        const float* pair = d + 4 * (first + i) + 2 * half;
        store_pair(params, padded + offset, is_valid ? pair[0] : 0.0f, is_valid ? pair[1] : 0.0f,
                   gate[i], up[i]);
      }
    }
  }
}

template <typename T>
SPARSE_UNIFIED_DEVICE void consume(const GradHiddenParams<T>& params, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  const int consumer = warp_idx() / 4 - 1;
  const int own_rows = consumer * kConsumerRows * kSwizzleRowBytes;
  RingPosition<kStages> at;
  RowTile tile;
  for (int idx = static_cast<int>(blockIdx.x); find_row_tile<kTileRows>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += static_cast<int>(gridDim.x)) {
    float d[kAccumulators];
    multiply_stages<T, kTileNeurons, Major::kK, Major::kMN, false>(
        d, params.num_k, ring, at, [&](int idx) -> StageOperands {
          const uint32_t stage = shared + idx * kStageBytes;
          return {operand_descriptor(stage + own_rows, Major::kK),
                  operand_descriptor(stage + kRowsBytes, Major::kMN, kBoxBytes)};
        });
    store_tile(params, tile, d, consumer);
  }
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1)
    grouped_ffn_grad_hidden_sm90a_kernel(const __grid_constant__ GradHiddenParams<T> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SPARSE_UNIFIED_EMULATION)
  const uint32_t shared = shared_address(dynamic_shared_memory());
  const RingBarriers<kStages> ring{shared + kBarrierOffset};
  if (threadIdx.x == 0) {
    ring.init(kFullArrivals, kEmptyArrivals);
    prefetch_tensor_map(&params.grad_y);
    prefetch_tensor_map(&params.down_proj);
  }
  sync_threads();
  if (warp_idx() < kWarpgroupSize / kWarpSize) {
    decrease_registers<kProducerRegisters>();
    if (warp_idx() == 0) produce(params, shared, ring);
  } else {
    increase_registers<kConsumerRegisters>();
    consume(params, shared, ring);
  }
#else
  device_check(false);
#endif
}

template <typename T>
cudaError_t launch_grad_hidden(const GroupedFfnBackwardCudaParams& backward,
                               const DeviceInfo& device, void* grad_gate, void* grad_up,
                               void* hidden, cudaStream_t stream) {
  const GroupedFfnCudaParams& ffn = backward.forward;
  GradHiddenParams<T> params{};
  params.expert_offsets = ffn.expert_offsets;
  params.gate_rows = static_cast<const T*>(ffn.gate_rows);
  params.up_rows = static_cast<const T*>(ffn.up_rows);
  params.grad_gate = static_cast<T*>(grad_gate);
  params.grad_up = static_cast<T*>(grad_up);
  params.hidden = static_cast<T*>(hidden);
  params.num_rows = static_cast<int>(ffn.num_rows);
  params.num_experts = static_cast<int>(ffn.num_experts);
  params.expert_width = static_cast<int>(ffn.expert_width);
  params.num_n = ceil_div(params.expert_width, kTileNeurons);
  params.num_k = ceil_div(static_cast<int>(ffn.hidden_size), kTileK);
  cudaError_t error = make_tensor_map(&params.grad_y, ffn.dtype, backward.grad_y, ffn.num_rows,
                                      ffn.hidden_size, ffn.hidden_size, kTileRows, kTileK, true);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&params.down_proj, ffn.dtype, ffn.down_proj, ffn.hidden_size,
                          ffn.num_experts * ffn.expert_width, ffn.down_stride, kTileK, kBoxNeurons,
                          true);
  if (error != cudaSuccess) return error;

  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(ffn.num_rows, ffn.num_experts);
  const int64_t most_tiles = padded_rows / kTileRows * params.num_n;
  LaunchConfig config{};
  config.grid =
      dim3(static_cast<unsigned>(std::min<int64_t>(most_tiles, device.num_multiprocessors)));
  config.num_threads = kNumThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return launch(grouped_ffn_grad_hidden_sm90a_kernel<T>, config, params);
}

}  // namespace

cudaError_t grouped_ffn_grad_hidden_sm90a(const GroupedFfnBackwardCudaParams& params,
                                          const DeviceInfo& device, void* grad_gate, void* grad_up,
                                          void* hidden, cudaStream_t stream) {
  return params.forward.dtype == DType::kBFloat16
             ? launch_grad_hidden<BFloat16>(params, device, grad_gate, grad_up, hidden, stream)
             : launch_grad_hidden<Float16>(params, device, grad_gate, grad_up, hidden, stream);
}

}  // namespace sparse_unified
