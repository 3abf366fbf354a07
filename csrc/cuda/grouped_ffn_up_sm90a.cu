// SPDX-License-Identifier: Apache-2.0
// Up-projection of grouped_ffn on Hopper: hidden = silu(x gate^T) * (x up^T) for gathered rows.
//
// Persistent kernel (persistent_gemm_sm90a.h), one CTA per SM, grid-stride over tiles of 128 rows x
// n neurons. The gate and up projections of the same n neurons are stacked into one B operand of
// N = 2 n rows, so a thread's accumulators j and j + N / 4 are gate and up of one neuron and SwiGLU
// needs no shuffle. n is 120 (2368 = 2 * 1184 columns waste 1.35 % of N = 240, 256 would waste
// 8.1 %) or, for lists of kept blocks, 128.
//
// Warp roles: 1 producer warpgroup (cp.async gathers the rows of x, 16 bytes a thread, into the
// 128-byte swizzle of wgmma; one elected lane issues TMA for the weights, a box of gate and one of
// up, or boxes of 64 rows when blocks are not multiples of 128), 2 consumer warpgroups (64 rows
// each, m64nNk16). 4 or 3 pipeline stages of 64 k, 47 or 48 KB each. The epilogue sends a tile of
// hidden through shared memory by TMA, which cuts off the neurons beyond h; rows beyond the end of
// a group are computed from zeros and stored as padding, so that hidden needs no exact bounds.
//
// Clusters of two CTAs take two neighbouring tiles of rows and multicast the weights: one loads the
// gate rows for both, the other the up rows. Where a group has no second tile, that CTA multiplies
// and stores nothing.
//
// Bytes: x is read h / n times a row and the weights once for 16 row tiles (tile_scheduler.h), both
// mostly from L2, the weights for every tile of rows or for two; hidden is written once. FLOPs:
// 4 R D h.
// Preconditions: D % 8 == 0, h % 16 == 0, rows of x and of the weights on 16-byte boundaries; of a
// list of blocks, block size and h multiples of 64, and n = 128.
#include <algorithm>
#include <atomic>
#include <utility>

#include "cuda/grouped_ffn_neurons.h"
#include "cuda/persistent_gemm_sm90a.h"
#include "device/async_copy.h"
#include "device/math.h"
#include "device/tensor_copy.h"
#include "device/vector.h"

namespace sparse_unified::up_sm90a {

// Chunks of 16 bytes of a stage of x that a thread copies: column tid % 8, rows tid / 8 + 16 i.
constexpr int kRowChunks = kSwizzleRowBytes / kVectorBytes;
constexpr int kRowStep = kWarpgroupSize / kRowChunks;
constexpr int kCopiesPerThread = kTileRows / kRowStep;

// Neurons of a box at least; what the blocks of a list are multiples of.
constexpr int kMinBoxNeurons = 64;

template <typename T>
struct UpParams {
  const T* x;                     // [T, D], rows x_stride elements apart
  int64_t x_stride;               //
  const int32_t* row_token;       // [R], or null
  const int32_t* expert_offsets;  // [E + 1], or null
  TensorMap gate_proj;            // [I, D], boxes [box_neurons, 64]
  TensorMap up_proj;              // [I, D], likewise
  TensorMap hidden;               // [padded_rows, h], boxes [64, kOutNeurons]
  NeuronGroups neurons;           // rows of gate_proj and up_proj
  T* gate_rows;                   // [R, h], or null
  T* up_rows;                     // [R, h], or null
  int num_tokens;                 // T
  int num_rows;                   // R
  int hidden_size;                // D
  int num_experts;                // E
  int expert_width;               // h
  int weights_width;              // I
  int box_neurons;                // the tile's, or a part that no block ends within
  int num_n;                      // tiles of neurons
  int num_k;                      // stages of a tile
};

// Addresses of the rows of x that this thread copies; zeros stand for rows beyond the group. With
// kKeeps they are not computed again in each stage, which takes registers.
template <typename T, bool kKeeps>
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
      if constexpr (kKeeps) row[i] = kept_pointer(row[i]);
    }
    device_check(is_legal);
  }
};

// The rows of gate_proj and up_proj where the boxes of a tile begin.
template <class Tile>
struct BoxRows {
  int row[Tile::kMaxBoxes];

  // Boxes beyond the group's neurons lie beyond the weights, and are zeros.
  template <typename T>
  SPARSE_UNIFIED_DEVICE void find(const UpParams<T>& params, const RowTile& tile) {
    const NeuronMap neurons = params.neurons.of(tile.group);
#pragma unroll
    for (int box = 0; box < Tile::kMaxBoxes; ++box) {
      const int neuron = tile.n * Tile::kNeurons + box * params.box_neurons;
      row[box] = neuron < params.expert_width ? neurons(neuron) : params.weights_width;
    }
  }

  // Has TMA bring this step's boxes of `map`, one under the other, to all blocks of the cluster.
  template <typename T>
  SPARSE_UNIFIED_DEVICE void load(const UpParams<T>& params, const TensorMap* map, int k,
                                  uint32_t shared, uint32_t full) const {
#pragma unroll
    for (int box = 0; box < Tile::kMaxBoxes; ++box) {
      if (box * params.box_neurons < Tile::kNeurons) {
        load_box_to_all<Tile::kBlocks>(shared + box * params.box_neurons * kSwizzleRowBytes, map,
                                       row[box], k * kTileK, full);
      }
    }
  }
};

template <typename T_, int kN, int kNumStages, bool kFencesProducer, int kNumBlocks>
struct Gemm : RowTiles<kNumBlocks, false, true> {
  using T = T_;
  using Params = UpParams<T>;
  using Ring = RingBarriers<kNumStages, kNumBlocks>;
  using RowTiles<kNumBlocks, false, true>::kBlocks;
  static constexpr Major kMajorA = Major::kK;
  static constexpr Major kMajorB = Major::kK;
  static constexpr bool kFences = !kFencesProducer;
  static constexpr bool kFindsAhead = kN < 256;
  static constexpr bool kAllowsNextKernel = true;
  static constexpr int kProducerWarps = kWarpgroupSize / kWarpSize;
  // Every thread of the producer arrives for its copies, and the one with the boxes once more.
  static constexpr int kFullArrivals = kWarpgroupSize + 1;
  static_assert(kBlocks == 1 || kBlocks == 2, "one block brings gate, the other up");

  // For 128 and 256 threads, all but 1024 or 2048 of the 65536; of consumers 168 are enough.
  static constexpr int kProducerRegisters = kBlocks == 1 ? 56 : 64;
  static constexpr int kConsumerRegisters = kBlocks == 1 ? 224 : 216;

  static constexpr int kColumns = kN;
  static constexpr int kNeurons = kColumns / 2;
  static constexpr int kStages = kNumStages;
  static constexpr int kMaxBoxes = kNeurons / kMinBoxNeurons;

  static constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;  // of x, a stage
  static constexpr int kHalfBytes = kNeurons * kSwizzleRowBytes;   // of gate or up
  static constexpr int kStageBytes = kRowsBytes + 2 * kHalfBytes;
  static_assert(kHalfBytes % kSwizzleAtomBytes == 0,
                "boxes under each other are one swizzled tile");

  // The tile of hidden on its way out, in boxes of 64 rows. A warp stores 8 rows and 4 words at a
  // time, on 32 different banks: in the swizzle where whole boxes of it fit, else by a pitch of 60
  // words.
  static constexpr bool kSwizzlesOut = kNeurons % 64 == 0;
  static constexpr int kOutNeurons = kSwizzlesOut ? 64 : kNeurons;  // of a box
  static constexpr int kOutBoxes = kNeurons / kOutNeurons;
  static constexpr int kOutBoxBytes = kConsumerRows * kOutNeurons * 2;
  static constexpr int kOutTileBytes = kOutBoxes * kOutBoxBytes;  // of a consumer
  static constexpr int kOutBytes = kNumConsumers * kOutTileBytes;

  // Where neurons 8 group and on of a row lie among a consumer's boxes. Eight rows further down is
  // eight pitches further.
  static constexpr int kOutPitchBytes = kOutNeurons * 2;
  static SPARSE_UNIFIED_DEVICE int out_offset(int row, int group) {
    if constexpr (kSwizzlesOut) {
      return group / 8 * kOutBoxBytes + swizzled_offset(row, group % 8);
    } else {
      return row * kOutPitchBytes + group * kVectorBytes;
    }
  }

  static SPARSE_UNIFIED_DEVICE void prefetch(const Params& params) {
    prefetch_tensor_map(&params.gate_proj);
    prefetch_tensor_map(&params.up_proj);
    prefetch_tensor_map(&params.hidden);
  }

  static SPARSE_UNIFIED_DEVICE void produce(const Params& params, uint32_t shared,
                                            const Ring& ring) {
    const int thread = static_cast<int>(threadIdx.x);
    const int chunk = thread % kRowChunks;
    const bool copies_boxes = warp_idx() == 0 && elect_lane();
    const bool brings_up = kBlocks > 1 && cluster_rank() == 1;
    RingPosition<kStages> at;
    RingPosition<kStages> published;  // stages before it are announced as full
    int num_unpublished = 0;
    // NOTE: not for_each_tile, whose body by reference costs one register too many.
    RowTile tile;
    for (int idx = first_tile<kBlocks>(); Gemm::template find<true>(params, idx, tile);
         idx += tile_step<kBlocks>()) {
      const GatheredRows<T, (kN < 256)> rows(params, tile, thread);
      BoxRows<Gemm> boxes;
      if (copies_boxes) boxes.find(params, tile);
      for (int k = 0; k < params.num_k; ++k, at.advance()) {
        ring.wait_empty(at);
        const uint32_t stage = shared + at.stage * kStageBytes;
        const uint32_t full = ring.full(at.stage);
        if (copies_boxes) {
          barrier_arrive_expect_bytes(full, 2 * kHalfBytes);
          const uint32_t gate = stage + kRowsBytes;
          if constexpr (kBlocks == 1) {
            boxes.load(params, &params.gate_proj, k, gate, full);
            boxes.load(params, &params.up_proj, k, gate + kHalfBytes, full);
          } else {
            boxes.load(params, brings_up ? &params.up_proj : &params.gate_proj, k,
                       gate + (brings_up ? kHalfBytes : 0), full);
          }
        }
        const int column = k * kTileK + chunk * kVectorElements<T>;
#pragma unroll
        for (int i = 0; i < kCopiesPerThread; ++i) {
          const bool is_inside = rows.is_valid[i] && column < params.hidden_size;
          copy_async_16(stage + swizzled_offset(thread / kRowChunks + i * kRowStep, chunk),
                        rows.row[i] + column, is_inside ? kVectorBytes : 0);
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

  template <int>
  static SPARSE_UNIFIED_DEVICE StageOperands operands(uint32_t stage, int consumer, int) {
    return {operand_descriptor(stage + consumer * kConsumerRows * kSwizzleRowBytes, kMajorA),
            operand_descriptor(stage + kRowsBytes, kMajorB)};
  }
  static SPARSE_UNIFIED_DEVICE int steps(const Params&, int) { return kStageSteps; }

  // The thread of a consumer that stores its boxes.
  static SPARSE_UNIFIED_DEVICE bool stores() { return lane_idx() == 0 && warp_idx() % 4 == 0; }

  // Sends the consumer's 64 rows of the tile of hidden away, and keeps gate and up where wanted.
  // This thread holds two neurons of each group of 8, in an upper and a lower row.
  static SPARSE_UNIFIED_DEVICE void store(const Params& params, const RowTile& tile,
                                          const float (&d)[kColumns / 2], int consumer) {
    const bool is_storing = stores();
    const int upper = warp_idx() % 4 * 16 + lane_idx() / 4;
    const int pair = lane_idx() % 4 * 2;
    unsigned char* out =
        dynamic_shared_memory() + SharedLayout<Gemm>::kOutOffset + consumer * kOutTileBytes;
    if (is_storing) store_wait_read<0>();  // the tile before has been read
    sync_named(1 + consumer, kWarpgroupSize);
#pragma unroll
    for (int j = 0; j < kNeurons / 8; ++j) {
      const float* gate = d + 4 * j;
      const float* up = gate + kColumns / 4;
      auto* word = reinterpret_cast<uint32_t*>(out + out_offset(upper, j) + pair * 2);
      word[0] = pack<T>(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
      word[8 * kOutPitchBytes / 4] = pack<T>(swiglu(gate[2], up[2]), swiglu(gate[3], up[3]));
    }
    fence_async_proxy();
    sync_named(1 + consumer, kWarpgroupSize);
    const int first_neuron = tile.n * kNeurons;
    if (is_storing) {
#pragma unroll
      for (int box = 0; box < kOutBoxes; ++box) {
        const int neuron = first_neuron + box * kOutNeurons;
        if (neuron >= params.expert_width) break;
        store_box(&params.hidden, tile.slot * kTileRows + consumer * kConsumerRows, neuron,
                  shared_address(out) + box * kOutBoxBytes);
      }
      store_commit();
    }
    if (params.gate_rows == nullptr) return;
    keep<0>(params, tile, d, consumer, params.gate_rows);
    keep<kColumns / 4>(params, tile, d, consumer, params.up_rows);
  }

  // Stores the accumulators of gate, or of up, from kFirst on, in vectors of 16 bytes.
  template <int kFirst>
  static SPARSE_UNIFIED_DEVICE void keep(const Params& params, const RowTile& tile,
                                         const float (&d)[kColumns / 2], int consumer, T* rows) {
    const int row = tile.first_row + consumer * kConsumerRows;
    const int neuron = tile.n * kNeurons;
    const ResultPlace<T> place{rows + static_cast<int64_t>(row) * params.expert_width + neuron,
                               params.expert_width, tile.end_row - row,
                               min(kNeurons, params.expert_width - neuron)};
    store_rounded_columns<0, kNeurons>(
        [&](int i) { return pack<T>(d[kFirst + 2 * i], d[kFirst + 2 * i + 1]); }, place);
  }
  static SPARSE_UNIFIED_DEVICE void finish() {
    if (stores()) store_wait<0>();
  }
};

template <typename T, GroupedFfnSm90aUpTile kId, bool kFencesProducer, int kBlocks>
cudaError_t run(const GroupedFfnCudaParams& params, const DeviceInfo& device, void* hidden,
                cudaStream_t stream) {
  constexpr GroupedFfnSm90aTile kTile = kGroupedFfnSm90aUpTiles[static_cast<int>(kId)];
  using Tile = Gemm<T, kTile.n, kTile.num_stages, kFencesProducer, kBlocks>;
  UpParams<T> up{};
  up.x = params.x.row<T>(0);
  up.x_stride = params.x.stride;
  up.row_token = params.row_token;
  up.expert_offsets = params.expert_offsets;
  up.neurons = neuron_rows(params);
  up.gate_rows = static_cast<T*>(params.gate_rows);
  up.up_rows = static_cast<T*>(params.up_rows);
  up.num_tokens = static_cast<int>(params.x.rows);
  up.num_rows = static_cast<int>(params.num_rows);
  up.hidden_size = static_cast<int>(params.x.columns);
  up.num_experts = static_cast<int>(params.num_experts);
  up.expert_width = static_cast<int>(params.expert_width);
  up.weights_width = static_cast<int>(params.gate_proj.rows);
  // A box is the whole tile where no block of any group ends within one.
  const bool is_whole = params.blocks.kept_blocks == nullptr ||
                        (params.blocks.block_size % Tile::kNeurons == 0 &&
                         (params.expert_width % Tile::kNeurons == 0 || params.num_experts == 1));
  up.box_neurons = is_whole ? Tile::kNeurons : kMinBoxNeurons;
  up.num_n = ceil_div(up.expert_width, Tile::kNeurons);
  up.num_k = ceil_div(up.hidden_size, kTileK);
  const int64_t padded_rows = grouped_ffn_sm90a_padded_rows(params.num_rows, params.num_experts);
  for (const auto& [map, weights] :
       {std::pair{&up.gate_proj, params.gate_proj}, {&up.up_proj, params.up_proj}}) {
    const cudaError_t error =
        make_tensor_map(map, params.dtype, weights.data, weights.rows, weights.columns,
                        weights.stride, up.box_neurons, kTileK, true);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error =
      make_tensor_map(&up.hidden, params.dtype, hidden, padded_rows, params.expert_width,
                      params.expert_width, kConsumerRows, Tile::kOutNeurons, Tile::kSwizzlesOut);
  if (error != cudaSuccess) return error;

  const int64_t most_tiles =
      max_row_tiles(params.num_rows, params.num_experts, kBlocks * kTileRows) * up.num_n;
  return launch_persistent_gemm<Tile>(up, most_tiles, device, stream);
}

}  // namespace sparse_unified::up_sm90a

namespace sparse_unified {

bool grouped_ffn_sm90a_is_compiled() {
#if defined(SPARSE_UNIFIED_EMULATION)
  return true;
#else
  // NOTE: code for an older architecture, compiled again at load, leaves the bodies empty. Asked on
  // a Hopper device alone; a failure, of memory say, is not remembered.
  static std::atomic<bool> is_compiled{false};
  if (is_compiled) return true;
  cudaFuncAttributes attributes{};
  constexpr GroupedFfnSm90aTile kAny = kGroupedFfnSm90aUpTiles[0];
  const cudaError_t error = cudaFuncGetAttributes(
      &attributes, persistent_gemm<up_sm90a::Gemm<BFloat16, kAny.n, kAny.num_stages, false, 1> >);
  if (error != cudaSuccess) cudaGetLastError();
  is_compiled = error == cudaSuccess && attributes.ptxVersion >= 90;
  return is_compiled;
#endif
}

int64_t grouped_ffn_sm90a_padded_rows(int64_t num_rows, int64_t num_groups) {
  return std::max<int64_t>(max_row_tiles(num_rows, num_groups, kSm90aTileRows), 1) * kSm90aTileRows;
}

cudaError_t grouped_ffn_up_sm90a(const GroupedFfnCudaParams& params, const DeviceInfo& device,
                                 const GroupedFfnSm90aOptions& options, void* hidden,
                                 cudaStream_t stream) {
  using enum GroupedFfnSm90aUpTile;
  return dispatch_half(params.dtype, [&]<typename T>(T) {
    return dispatch_value<k240x4, k240x3, k256x4>(options.up, [&]<GroupedFfnSm90aUpTile kTile>() {
      if (options.multicasts_weights) {
        return up_sm90a::run<T, kTile, false, 2>(params, device, hidden, stream);
      }
      return options.fences_producer
                 ? up_sm90a::run<T, kTile, true, 1>(params, device, hidden, stream)
                 : up_sm90a::run<T, kTile, false, 1>(params, device, hidden, stream);
    });
  });
}

}  // namespace sparse_unified
