// SPDX-License-Identifier: Apache-2.0
// The shell of the GEMMs for Hopper: a persistent, warp-specialised kernel, one CTA per SM, that
// strides over its tiles by the size of the grid. Three warpgroups:
//   producer   fills the stages of a ring in shared memory (Gemm::produce)
//   consumers  two of them, 64 rows of the tile each: wgmma m64nNk16 over the stages, N / 2 fp32
//              accumulators a thread, then the epilogue (Gemm::store)
// A stage has two mbarriers: full (the producer's copies have landed) and empty (all consumer warps
// have released it). Registers move from the producer to the consumers.
//
// With kBlocks = 2 the CTAs of a cluster take neighbouring tiles and share boxes by multicast;
// where a group has no second tile of rows, that CTA only releases the stages.
//
// The epilogue, counted in instructions of a warp (SASS of the down-projection, N = 256). What
// stands between the last product of a tile and the first of the next is exposed, and two warps
// share an issue slot:
//   at once, through shared memory: about 390, four barriers; about 1,300 clocks, 14 % of the 9,472
//     clocks of products of a tile with h = 592, 7 % with h = 1184
//   kDefersStore: about 205, 64 of them conversions at half rate. One consumer needs 370 clocks
//     with latencies, while the other has products for up to 512; both at the same time at most
//     700: 7.4 and 3.7 %. The 128 accumulators become 64 words, of which 8 leave at once; for the
//     others, the exchange in quads of lanes and the stores, with the look for the next tile, are
//     529, 1,060 clocks of both consumers, behind the first stage of the next tile, 1,024.
// The deferred stores need neither shared memory nor barriers, so nothing rests on how far apart
// the consumers are. A head start of one of them lasts only as long as no stage is late; two tiles
// in turn read more from L2, where the limit is: 64 x 256 takes 80 bytes a clock instead of 47, and
// 128 x 192, whose 192 accumulators leave no room to round, 53.
//
// A Gemm is a type with
//   T, Params, Tile         element type, kernel parameters, coordinates of one tile
//   kBlocks, kStages        CTAs of a cluster, stages of the ring
//   kColumns                N of the product, or the most, with columns(params, tile) -> that of a
//                           tile, see column_boxes
//   kMajorA, kMajorB        which index of the operands is contiguous in shared memory
//   kMayBeEmpty             a tile may have no stage, and is then zero
//   kFindsAhead             consumers look for their next tile, some 500 clocks, while the first
//                           products run; costs the registers of a second tile
//   kMaySkip                a tile may have no rows (has_rows), and is then left out
//   kDefersStore            results are rounded into registers and stored while the first products
//                           of the next tile run, see above
//   kAllowsNextKernel       the next kernel may start (programmatic dependent launch)
//   kFences                 operands are written by cp.async: consumers fence the async proxy
//   kProducerRegisters, kConsumerRegisters, kProducerWarps, kFullArrivals
//   kStageBytes, kOutBytes  shared memory of a stage, and of the epilogue of both consumers
//   find<kIsProducer>(params, idx, tile) -> whether there is a tile `idx`
//   num_stages(params, tile), steps(params, k)   stages of a tile, k16 steps of stage k that count
//   prefetch(params), produce(params, shared, ring)
//   operands<N>(stage, consumer, steps) -> StageOperands, finish()
//   store(params, tile, d, consumer), or with kDefersStore place(params, tile, consumer)
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/grouped_ffn_sm90a.h"
#include "device/epilogue_sm90a.h"
#include "device/launch.h"
#include "device/mainloop_sm90a.h"
#include "device/tile_scheduler.h"
#include "device/warpgroup.h"

namespace sparse_unified {

constexpr int kTileRows = kSm90aTileRows;
constexpr int kTileK = kStageK;
static_assert(kTileK == kSm90aTileK);
constexpr int kNumConsumers = 2;
constexpr int kNumThreads = (1 + kNumConsumers) * kWarpgroupSize;
constexpr int kConsumerRows = kTileRows / kNumConsumers;
static_assert(kConsumerRows == 64, "the M of wgmma");
constexpr int kConsumerWarps = kNumConsumers * kWarpgroupSize / kWarpSize;

// A stage of an operand, in tiles of 64 elements (128 bytes) by 64: boxes of TMA.
constexpr int kBoxElements = 64;
constexpr int kBoxBytes = kTileK * kSwizzleRowBytes;

// How an MN-major B comes. A whole tile has boxes 64 columns wide. The last one of a group has
// boxes of 32 in 64-byte swizzle, since an operand consists of whole boxes: N is a multiple of 32,
// and at least 64, below which wgmma waits for A, 16 clocks a step.
struct ColumnBoxes {
  int num_boxes;
  int elements;  // of a row of a box
  int bytes;     // of a box
  bool is_narrow;
};
constexpr int kNarrowElements = kNarrowRowBytes / 2;
template <int kColumns>
SPARSE_UNIFIED_DEVICE int columns_for(int width) {
  const int columns = ceil_div(width, kNarrowElements) * kNarrowElements;
  return min(max(columns, kBoxElements), kColumns);
}
template <int kColumns>
SPARSE_UNIFIED_DEVICE ColumnBoxes column_boxes(int columns) {
  if (columns == kColumns) return {kColumns / kBoxElements, kBoxElements, kBoxBytes, false};
  return {columns / kNarrowElements, kNarrowElements, kBoxBytes / 2, true};
}
template <int kN, int kColumns>
SPARSE_UNIFIED_DEVICE uint64_t column_descriptor(uint32_t shared) {
  return kN == kColumns ? operand_descriptor(shared, Major::kMN, kBoxBytes)
                        : operand_descriptor(shared, Major::kMN, kBoxBytes / 2, kNarrowRowBytes);
}
// body<N>() for N = `columns`, which is at most kN.
template <int kN, class Body>
SPARSE_UNIFIED_DEVICE void with_columns(int columns, const Body& body) {
  if constexpr (kN > kBoxElements) {
    if (columns != kN) return with_columns<kN - kNarrowElements>(columns, body);
  }
  body.template operator()<kN>();
}

// Shared memory: stages, tiles on their way out, barriers.
template <class Gemm>
struct SharedLayout {
  using Ring = RingBarriers<Gemm::kStages, Gemm::kBlocks>;
  static constexpr int kOutOffset = Gemm::kStages * Gemm::kStageBytes;
  static constexpr int kBarrierOffset = kOutOffset + Gemm::kOutBytes;
  static constexpr int kBytes = kBarrierOffset + Ring::kBytes;
  static_assert(kBytes <= 227 * 1024);
};

// What Gemms over tiles of grouped rows share. A slot, the tile's place in padded rows, takes a
// second look at the groups when CTAs form clusters: who needs none says so.
template <int kNumBlocks, bool kProducerFindsSlot, bool kConsumerFindsSlot>
struct RowTiles {
  using Tile = RowTile;
  static constexpr int kBlocks = kNumBlocks;
  static constexpr bool kMaySkip = kBlocks > 1;
  static constexpr bool kMayBeEmpty = false;
  static constexpr bool kDefersStore = false;

  template <bool kIsProducer, class Params>
  static SPARSE_UNIFIED_DEVICE bool find(const Params& params, int idx, RowTile& tile) {
    return find_row_tile<kTileRows, kBlocks, kIsProducer ? kProducerFindsSlot : kConsumerFindsSlot>(
        params.expert_offsets, params.num_experts, params.num_rows, params.num_n, idx, tile);
  }
  template <class Params>
  static SPARSE_UNIFIED_DEVICE int num_stages(const Params& params, const RowTile&) {
    return params.num_k;
  }
};

// body(tile) for every tile of this CTA.
template <class Gemm, bool kIsProducer, class Body>
SPARSE_UNIFIED_DEVICE void for_each_tile(const typename Gemm::Params& params, const Body& body) {
  typename Gemm::Tile tile;
  for (int idx = first_tile<Gemm::kBlocks>(); Gemm::template find<kIsProducer>(params, idx, tile);
       idx += tile_step<Gemm::kBlocks>()) {
    body(tile);
  }
}

template <class Gemm>
SPARSE_UNIFIED_DEVICE void consume(const typename Gemm::Params& params, uint32_t shared,
                                   const typename SharedLayout<Gemm>::Ring& ring) {
  using T = typename Gemm::T;
  // NOTE: by a shuffle, which tells the compiler that it is the same in all lanes.
  const int consumer = shuffle(warp_idx(), 0) / 4 - 1;
  RingPosition<Gemm::kStages> at;
  typename Gemm::Tile tile, next;
  int idx = first_tile<Gemm::kBlocks>();
  const auto find = [&](typename Gemm::Tile& found) {
    const bool is_found = Gemm::template find<false>(params, idx, found);
    idx += tile_step<Gemm::kBlocks>();
    return is_found;
  };

  // With kDefersStore, the results of the tile `done`.
  [[maybe_unused]] std::conditional_t<Gemm::kDefersStore, RoundedResults<T, Gemm::kColumns>, int>
      results;
  typename Gemm::Tile done{};
  bool has_results = false;
  const auto store_results = [&] {
    if constexpr (Gemm::kDefersStore) {
      ResultPlace<T> place = Gemm::place(params, done, consumer);
      if (!has_results) place.num_rows = 0;
      results.store(place);
    }
  };

  // NOTE: once, or the compiler peels the first tile off.
#pragma unroll 1
  for (bool is_tile = Gemm::kFindsAhead && find(tile);;) {
    if constexpr (!Gemm::kFindsAhead) is_tile = find(tile);
    if (!is_tile) break;
    const int num_stages = Gemm::num_stages(params, tile);
    if constexpr (Gemm::kMaySkip) {
      if (!tile.has_rows()) {
        skip_stages(num_stages, ring, at);
        if constexpr (Gemm::kFindsAhead) is_tile = find(tile);
        continue;
      }
    }
    if constexpr (Gemm::kMayBeEmpty) {
      if (num_stages == 0) {
        store_zeros(Gemm::place(params, tile, consumer), Gemm::kColumns);
        if constexpr (Gemm::kFindsAhead) is_tile = find(tile);
        continue;
      }
    }
    float d[Gemm::kColumns / 2];
    const auto multiply = [&]<int kN>() {
      multiply_stages<T, kN, Gemm::kMajorA, Gemm::kMajorB, kN != Gemm::kColumns, Gemm::kFences>(
          d, num_stages, ring, at,
          [&](int stage, int steps) {
            return Gemm::template operands<kN>(shared + stage * Gemm::kStageBytes, consumer, steps);
          },
          [&](int k) { return Gemm::steps(params, k); },
          [&] {
            store_results();
            if constexpr (Gemm::kFindsAhead) is_tile = find(next);
          });
    };
    if constexpr (requires { Gemm::columns(params, tile); }) {
      with_columns<Gemm::kColumns>(Gemm::columns(params, tile), multiply);
    } else {
      multiply.template operator()<Gemm::kColumns>();
    }
    if constexpr (Gemm::kDefersStore) {
      results.take(d, Gemm::place(params, tile, consumer));
      done = tile;
      has_results = true;
    } else {
      Gemm::store(params, tile, d, consumer);
    }
    if constexpr (Gemm::kFindsAhead) tile = next;
  }
  store_results();
  Gemm::finish();
}

template <class Gemm>
__global__ void __launch_bounds__(kNumThreads, 1)
    persistent_gemm(const __grid_constant__ typename Gemm::Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SPARSE_UNIFIED_EMULATION)
  using Layout = SharedLayout<Gemm>;
  const uint32_t shared = shared_address(dynamic_shared_memory());
  const typename Layout::Ring ring{shared + Layout::kBarrierOffset};
  if (threadIdx.x == 0) {
    ring.init(Gemm::kFullArrivals, kConsumerWarps);
    Gemm::prefetch(params);
  }
  sync_blocks<Gemm::kBlocks>();
  if constexpr (Gemm::kAllowsNextKernel) allow_next_kernel();
  if (warp_idx() < kWarpgroupSize / kWarpSize) {
    decrease_registers<Gemm::kProducerRegisters>();
    if (warp_idx() < Gemm::kProducerWarps) Gemm::produce(params, shared, ring);
  } else {
    increase_registers<Gemm::kConsumerRegisters>();
    consume<Gemm>(params, shared, ring);
  }
  if constexpr (Gemm::kBlocks > 1) sync_cluster();
#else
  device_check(false);
#endif
}

template <class Gemm>
cudaError_t launch_persistent_gemm(const typename Gemm::Params& params, int64_t num_tiles,
                                   const DeviceInfo& device, cudaStream_t stream,
                                   bool overlaps_previous = false) {
  LaunchConfig config{};
  config.grid = dim3(num_persistent_blocks(num_tiles, device.num_multiprocessors, Gemm::kBlocks));
  config.cluster_blocks = Gemm::kBlocks;
  config.num_threads = kNumThreads;
  config.shared_bytes = SharedLayout<Gemm>::kBytes;
  config.stream = stream;
  config.overlaps_previous = overlaps_previous;
  return launch(persistent_gemm<Gemm>, config, params);
}

}  // namespace sparse_unified
