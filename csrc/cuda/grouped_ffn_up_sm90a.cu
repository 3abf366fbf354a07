// SPDX-License-Identifier: Apache-2.0
// Up-projection of grouped_ffn on Hopper: hidden = silu(x gate^T) * (x up^T) for gathered rows.
//
// A block stays on its multiprocessor and takes every gridDim.x-th tile of 128 rows and 120 neurons
// (their gate and up columns: N = 240; 2368 = 2 * 1184 columns waste 1.35 % of it, 256 would waste
// 8.1 %). Three warpgroups:
//   producer   gathers the tile's rows of x by cp.async, 16 bytes a thread, into the swizzle that
//              wgmma reads; one lane has TMA bring the gate and up rows of the weights, one box of
//              each under the other, as one operand of 240 rows
//   consumers  64 rows each: m64n240k16, 120 accumulators a thread; gate and up of a neuron are
//              accumulators j and j + 60 of one thread, so SwiGLU needs no exchange
// through a ring of 4 stages of 64 k (47 KB each). A tile of hidden leaves through shared memory by
// TMA, which cuts off the neurons beyond h; rows beyond the end of a group are computed from zeros
// and stored as padding, so that hidden needs no exact bounds.
//
// Bytes: x is read h / 120 times a row and the weights once for 16 row tiles (tile_scheduler.h),
// both mostly from L2; hidden is written once. FLOPs: 4 R D h.
// Preconditions: D % 8 == 0, h % 16 == 0, rows of x and of the weights on 16-byte boundaries.
#include <algorithm>
#include <atomic>

#include "cuda/grouped_ffn_sm90a.h"
#include "device/async_copy.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/pipeline_sm90a.h"
#include "device/tensor_copy.h"
#include "device/tile_scheduler.h"
#include "device/vector.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"

namespace sparse_unified {
namespace {

constexpr int kTileRows = kSm90aTileRows;
constexpr int kTileNeurons = 120;
constexpr int kTileK = 64;
constexpr int kStages = 4;
constexpr int kNumConsumers = 2;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupSize;
constexpr int kConsumerRows = kTileRows / kNumConsumers;
constexpr int kColumns = 2 * kTileNeurons;
constexpr int kAccumulators = kColumns / 2;  // of a thread: 64 * 240 / 128
static_assert(kConsumerRows == 64, "the M of wgmma");

// 56 and 224 registers for 128 and 256 threads are all but 1024 of the 65536.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;

constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;    // of x, a stage
constexpr int kBoxBytes = kTileNeurons * kSwizzleRowBytes;  // of gate or up
constexpr int kStageBytes = kRowsBytes + 2 * kBoxBytes;
static_assert(kBoxBytes % kSwizzleAtomBytes == 0, "boxes under each other are one swizzled tile");

// Rows of the tile of hidden on its way out; a pitch of 60 words puts the 8 rows and 4 words that a
// warp stores at a time on 32 different banks.
constexpr int kOutPitchBytes = kTileNeurons * 2;
constexpr int kOutBytes = kConsumerRows * kOutPitchBytes;  // of a consumer

// Shared memory: stages of {rows, gate, up}, tiles of hidden, barriers.
constexpr int kOutOffset = kStages * kStageBytes;
constexpr int kBarrierOffset = kOutOffset + kNumConsumers * kOutBytes;
constexpr int kSharedBytes = kBarrierOffset + RingBarriers<kStages>::kBytes;
static_assert(kSharedBytes <= 227 * 1024);

// Chunks of 16 bytes of a stage of x that a thread copies: column tid % 8, rows tid / 8 + 16 i.
constexpr int kRowChunks = kSwizzleRowBytes / kVectorBytes;
constexpr int kRowStep = kWarpgroupSize / kRowChunks;
constexpr int kCopiesPerThread = kTileRows / kRowStep;

// Every thread of the producer arrives for its copies, and the one with the boxes once more.
constexpr int kFullArrivals = kWarpgroupSize + 1;
constexpr int kEmptyArrivals = kNumConsumers * kWarpgroupSize / kWarpSize;

template <typename T>
struct UpParams {
  const T* x;                     // [T, D], rows x_stride elements apart
  int64_t x_stride;               //
  const int32_t* row_token;       // [R], or null
  const int32_t* expert_offsets;  // [E + 1], or null
  TensorMap gate_proj;            // [I, D], boxes [120, 64]
  TensorMap up_proj;              // [I, D], boxes [120, 64]
  TensorMap hidden;               // [padded_rows, h], boxes [64, 120]
  T* gate_rows;                   // [R, h], or null
  T* up_rows;                     // [R, h], or null
  int num_tokens;                 // T
  int num_rows;                   // R
  int hidden_size;                // D
  int num_experts;                // E
  int expert_width;               // h
  int num_n;                      // tiles of neurons
  int num_k;                      // stages of a tile
};

// Addresses of the rows of x that this thread copies; zeros stand for rows beyond the group.
template <typename T>
struct GatheredRows {
  const T* row[kCopiesPerThread];
  bool is_valid[kCopiesPerThread];

  // NOTE: one loop after the other, so that the look-ups are under way together.
  SPARSE_UNIFIED_DEVICE GatheredRows(const UpParams<T>& params, const RowTile& tile, int thread) {
    int token[kCopiesPerThread];
#pragma unroll
    for (int i = 0; i < kCopiesPerThread; ++i) {
      const int row_idx = tile.first_row + thread / kRowChunks + i * kRowStep;
      is_valid[i] = row_idx < tile.end_row;
      token[i] = !is_valid[i]                  ? 0
                 : params.row_token == nullptr ? row_idx
                                               : params.row_token[row_idx];
    }
    bool is_legal = true;
#pragma unroll
    for (int i = 0; i < kCopiesPerThread; ++i) {
      is_legal &= 0 <= token[i] && token[i] < params.num_tokens;
      row[i] = params.x + token[i] * params.x_stride;
    }
    device_check(is_legal);
  }
};

template <typename T, bool kFencesProducer>
SPARSE_UNIFIED_DEVICE void produce(const UpParams<T>& params, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk = thread % kRowChunks;
  const bool copies_boxes = warp_idx() == 0 && elect_lane();
  RingPosition<kStages> at;
  RingPosition<kStages> published;  // stages before it are announced as full
  int num_unpublished = 0;
  RowTile tile;
  for (int idx = static_cast<int>(blockIdx.x); find_row_tile<kTileRows>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += static_cast<int>(gridDim.x)) {
    const GatheredRows<T> rows(params, tile, thread);
    const int neuron = tile.group * params.expert_width + tile.n * kTileNeurons;
    for (int k = 0; k < params.num_k; ++k, at.advance()) {
      ring.wait_empty(at);
      const uint32_t stage = shared + at.stage * kStageBytes;
      const uint32_t full = ring.full(at.stage);
      if (copies_boxes) {
        barrier_arrive_expect_bytes(full, 2 * kBoxBytes);
        load_box(stage + kRowsBytes, &params.gate_proj, neuron, k * kTileK, full);
        load_box(stage + kRowsBytes + kBoxBytes, &params.up_proj, neuron, k * kTileK, full);
      }
      const int column = k * kTileK + chunk * kVectorElements<T>;
#pragma unroll
      for (int i = 0; i < kCopiesPerThread; ++i) {
        const bool is_inside = rows.is_valid[i] && column < params.hidden_size;
        copy_async_16(stage + swizzled_offset(thread / kRowChunks + i * kRowStep, chunk),
                      rows.row[i] + (is_inside ? column : 0), is_inside ? kVectorBytes : 0);
      }
      if constexpr (kFencesProducer) {
        // A stage behind, so that copies of two stages are under way while one is waited for.
        copy_async_commit();
        if (++num_unpublished == 2) {
          copy_async_wait<1>();
          fence_async_proxy();
          barrier_arrive(ring.full(published.stage));
          published.advance();
          --num_unpublished;
        }
      } else {
        barrier_arrive_after_copies(full);
      }
    }
  }
  if constexpr (kFencesProducer) {
    copy_async_wait<0>();
    fence_async_proxy();
    for (; num_unpublished > 0; --num_unpublished, published.advance()) {
      barrier_arrive(ring.full(published.stage));
    }
  }
}

// Sends the consumer's 64 rows of the tile of hidden away, and keeps gate and up where wanted. This
// thread holds two neurons of each group of 8, in an upper and a lower row.
template <typename T>
SPARSE_UNIFIED_DEVICE void store_tile(const UpParams<T>& params, const RowTile& tile,
                                      const float (&d)[kAccumulators], int consumer,
                                      bool is_storing) {
  const int upper = warp_idx() % 4 * 16 + lane_idx() / 4;
  const int pair = lane_idx() % 4 * 2;
  const int out_offset = kOutOffset + consumer * kOutBytes;
  unsigned char* out = dynamic_shared_memory() + out_offset;
  if (is_storing) store_wait_read<0>();  // the tile before has been read
  sync_named(1 + consumer, kWarpgroupSize);
#pragma unroll
  for (int j = 0; j < kTileNeurons / 8; ++j) {
    const float* gate = d + 4 * j;
    const float* up = gate + kAccumulators / 2;
    auto* word = reinterpret_cast<uint32_t*>(out + upper * kOutPitchBytes + (8 * j + pair) * 2);
    word[0] = pack<T>(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
    word[8 * kOutPitchBytes / 4] = pack<T>(swiglu(gate[2], up[2]), swiglu(gate[3], up[3]));
  }
  fence_async_proxy();
  sync_named(1 + consumer, kWarpgroupSize);
  const int first_neuron = tile.n * kTileNeurons;
  if (is_storing) {
    store_box(&params.hidden, tile.slot * kTileRows + consumer * kConsumerRows, first_neuron,
              shared_address(out));
    store_commit();
  }
  if (params.gate_rows == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tile.first_row + consumer * kConsumerRows + upper + 8 * half;
    if (row >= tile.end_row) continue;
    const int64_t first = static_cast<int64_t>(row) * params.expert_width + first_neuron + pair;
#pragma unroll
    for (int j = 0; j < kTileNeurons / 8; ++j) {
      if (first_neuron + 8 * j < params.expert_width) {
        const float* gate = d + 4 * j + 2 * half;
        const float* up = gate + kAccumulators / 2;
        *reinterpret_cast<uint32_t*>(params.gate_rows + first + 8 * j) = pack<T>(gate[0], gate[1]);
        *reinterpret_cast<uint32_t*>(params.up_rows + first + 8 * j) = pack<T>(up[0], up[1]);
      }
    }
  }
}

template <typename T, bool kFencesProducer>
SPARSE_UNIFIED_DEVICE void consume(const UpParams<T>& params, uint32_t shared,
                                   const RingBarriers<kStages>& ring) {
  const int consumer = warp_idx() / 4 - 1;
  const bool is_first_lane = lane_idx() == 0;
  const bool is_storing = is_first_lane && warp_idx() % 4 == 0;
  RingPosition<kStages> at;
  RowTile tile;
  for (int idx = static_cast<int>(blockIdx.x); find_row_tile<kTileRows>(
           params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
       idx += static_cast<int>(gridDim.x)) {
    float d[kAccumulators];
    int previous_stage = 0;
    for (int k = 0; k < params.num_k; ++k, at.advance()) {
      ring.wait_full(at);
      if constexpr (!kFencesProducer) fence_async_proxy();
      const uint32_t rows = shared + at.stage * kStageBytes;
      const uint64_t a =
          operand_descriptor(rows + consumer * kConsumerRows * kSwizzleRowBytes, Major::kK);
      const uint64_t b = operand_descriptor(rows + kRowsBytes, Major::kK);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK / 16; ++step) {
        wgmma<T, kColumns>(d, a + step * kDescriptorStepK, b + step * kDescriptorStepK,
                           k > 0 || step > 0);
      }
      wgmma_commit();
      if (k > 0) {
        wgmma_wait<1>();
        if (is_first_lane) barrier_arrive(ring.empty(previous_stage));
      }
      previous_stage = at.stage;
    }
    wgmma_finish(d);
    if (is_first_lane) barrier_arrive(ring.empty(previous_stage));
    store_tile(params, tile, d, consumer, is_storing);
  }
  if (is_storing) store_wait<0>();
}

template <typename T, bool kFencesProducer>
__global__ void __launch_bounds__(kNumThreads, 1)
    grouped_ffn_up_sm90a_kernel(const __grid_constant__ UpParams<T> params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SPARSE_UNIFIED_EMULATION)
  const uint32_t shared = shared_address(dynamic_shared_memory());
  const RingBarriers<kStages> ring{shared + kBarrierOffset};
  if (threadIdx.x == 0) {
    ring.init(kFullArrivals, kEmptyArrivals);
    prefetch_tensor_map(&params.gate_proj);
    prefetch_tensor_map(&params.up_proj);
    prefetch_tensor_map(&params.hidden);
  }
  sync_threads();
  allow_next_kernel();
  if (warp_idx() < kWarpgroupSize / kWarpSize) {
    decrease_registers<kProducerRegisters>();
    produce<T, kFencesProducer>(params, shared, ring);
  } else {
    increase_registers<kConsumerRegisters>();
    consume<T, kFencesProducer>(params, shared, ring);
  }
#else
  device_check(false);
#endif
}

template <typename T>
cudaError_t launch_up(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                      const GroupedFfnSm90aOptions& options, void* hidden, cudaStream_t stream) {
  UpParams<T> up{};
  up.x = static_cast<const T*>(params.x);
  up.x_stride = params.x_stride;
  up.row_token = params.row_token;
  up.expert_offsets = params.expert_offsets;
  up.gate_rows = static_cast<T*>(params.gate_rows);
  up.up_rows = static_cast<T*>(params.up_rows);
  up.num_tokens = static_cast<int>(params.num_tokens);
  up.num_rows = static_cast<int>(params.num_rows);
  up.hidden_size = static_cast<int>(params.hidden_size);
  up.num_experts = static_cast<int>(params.num_experts);
  up.expert_width = static_cast<int>(params.expert_width);
  up.num_n = ceil_div(up.expert_width, kTileNeurons);
  up.num_k = ceil_div(up.hidden_size, kTileK);
  const int64_t width = params.num_experts * params.expert_width;
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(params.num_rows, params.num_experts);
  cudaError_t error =
      make_tensor_map(&up.gate_proj, params.dtype, params.gate_proj, width, params.hidden_size,
                      params.gate_stride, kTileNeurons, kTileK, true);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&up.up_proj, params.dtype, params.up_proj, width, params.hidden_size,
                          params.up_stride, kTileNeurons, kTileK, true);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&up.hidden, params.dtype, hidden, padded_rows, params.expert_width,
                          params.expert_width, kConsumerRows, kTileNeurons, false);
  if (error != cudaSuccess) return error;

  const int64_t most_tiles = padded_rows / kTileRows * up.num_n;
  LaunchConfig config{};
  config.grid =
      dim3(static_cast<unsigned>(std::min<int64_t>(most_tiles, device.num_multiprocessors)));
  config.num_threads = kNumThreads;
  config.shared_bytes = kSharedBytes;
  config.stream = stream;
  return options.fences_producer ? launch(grouped_ffn_up_sm90a_kernel<T, true>, config, up)
                                 : launch(grouped_ffn_up_sm90a_kernel<T, false>, config, up);
}

}  // namespace

bool grouped_ffn_sm90a_is_compiled() {
#if defined(SPARSE_UNIFIED_EMULATION)
  return true;
#else
  // NOTE: code for an older architecture, compiled again at load, leaves the bodies empty. Asked on
  // a Hopper device alone; a failure, of memory say, is not remembered.
  static std::atomic<bool> is_compiled{false};
  if (is_compiled) return true;
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, grouped_ffn_up_sm90a_kernel<BFloat16, false>);
  if (error != cudaSuccess) cudaGetLastError();
  is_compiled = error == cudaSuccess && attributes.ptxVersion >= 90;
  return is_compiled;
#endif
}

int64_t grouped_ffn_sm90a_padded_rows(int64_t num_rows, int64_t num_groups) {
  return std::max<int64_t>(max_row_tiles(num_rows, num_groups, kTileRows), 1) * kTileRows;
}

cudaError_t grouped_ffn_up_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                 const GroupedFfnSm90aOptions& options, void* hidden,
                                 cudaStream_t stream) {
  return params.dtype == DType::kBFloat16
             ? launch_up<BFloat16>(params, device, options, hidden, stream)
             : launch_up<Float16>(params, device, options, hidden, stream);
}

}  // namespace sparse_unified
