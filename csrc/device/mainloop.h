// SPDX-License-Identifier: Apache-2.0
// The loop over k of a tile of a GEMM with mma.sync: stages of shared memory filled by cp.async,
// fragments fetched one k16 step ahead of the products, also across stages.
//
// One barrier a stage. It stands before the last k16 step of a stage, whose fragments are in
// registers by then: behind it, stage s + 1 is there for all to read, and nobody reads stage s any
// more, so the copies of k step s + kStages go there in the next round.
#pragma once

#include "device/async_copy.h"
#include "device/fragments.h"

namespace sparse_unified {

// Block tile kM x kN x kK, cut into kWarpsM x kWarpsN warp tiles; kBlocks of them on a
// multiprocessor.
template <int kM_, int kN_, int kK_, int kStages_, int kWarpsM_, int kWarpsN_, int kBlocks_>
struct TileShape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kK = kK_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarpsN_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kWarpM = kM / kWarpsM;
  static constexpr int kWarpN = kN / kWarpsN;
  static constexpr int kSharedBytes = kStages * (kM + kN) * kK * 2;
};

template <class Shape>
struct WarpTile {
  // [16-row tile][8-column tile][element of mma's d]
  float values[Shape::kWarpM / 16][Shape::kWarpN / 8][4];
  int first_row;     // of the warp in the block's tile
  int first_column;  //

  // Warps w and w + 4 share a quarter of the multiprocessor. Every other row of warp tiles is
  // turned by half its length, so that at an edge, where warps without work only copy, a tile that
  // is half empty in either direction still keeps all four quarters busy.
  SPARSE_UNIFIED_DEVICE WarpTile() : values{} {
    const int m = warp_idx() / Shape::kWarpsN;
    const int n = warp_idx() % Shape::kWarpsN ^ m % 2 * (Shape::kWarpsN / 2);
    first_row = m * Shape::kWarpM;
    first_column = n * Shape::kWarpN;
  }
};

template <typename T, class Shape, Major kMajorA, Major kMajorB>
struct Mainloop {
  template <Major kMajor, int kExtent>
  using Tile = SharedTile<kMajor == Major::kK ? kExtent : Shape::kK,
                          kMajor == Major::kK ? Shape::kK : kExtent>;
  using TileA = Tile<kMajorA, Shape::kM>;
  using TileB = Tile<kMajorB, Shape::kN>;
  using OperandA = WarpOperand<TileA, kMajorA, Shape::kWarpM>;
  using OperandB = WarpOperand<TileB, kMajorB, Shape::kWarpN>;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSteps = Shape::kK / 16;  // of 16 in a stage
  static_assert(kSteps % 2 == 0, "the two sets of fragments must alternate across stages");
  static_assert(kStages >= 3 && kStages * kStageBytes == Shape::kSharedBytes);

  struct Fragments {
    uint32_t a[OperandA::kLoads][4];
    uint32_t b[OperandB::kLoads][4];
  };

  // tile += A B over num_steps stages of k. `shared`: kSharedBytes, aligned to 128. Warps whose
  // tile lies outside of the problem (is_active false) copy, but do not multiply.
  template <class LoaderA, class LoaderB>
  SPARSE_UNIFIED_DEVICE static void run(WarpTile<Shape>& tile, LoaderA& loader_a, LoaderB& loader_b,
                                        int num_steps, uint32_t shared, bool is_active) {
    if (num_steps == 0) return;
    const uint32_t offset_a = OperandA::template lane_offset<false>(tile.first_row);
    const uint32_t offset_b =
        TileA::kBytes + OperandB::template lane_offset<true>(tile.first_column);

    for (int step = 0; step < kStages - 1; ++step) {
      const uint32_t stage = shared + static_cast<uint32_t>(step * kStageBytes);
      if (step < num_steps) issue(loader_a, loader_b, stage);
      copy_async_commit();
    }
    copy_async_wait<kStages - 2>();
    sync_threads();

    Fragments fragments[2];
    if (is_active) fetch(fragments[0], shared, offset_a, offset_b, 0);
    uint32_t read_stage = shared;
    uint32_t write_stage = shared + (kStages - 1) * kStageBytes;
    const uint32_t last_stage = write_stage;
    const auto advance = [shared, last_stage](uint32_t stage) {
      return stage == last_stage ? shared : stage + kStageBytes;
    };
    for (int step = 0; step < num_steps; ++step) {
#pragma unroll
      for (int k_idx = 0; k_idx < kSteps; ++k_idx) {
        if (k_idx == 0) {
          if (step + kStages - 1 < num_steps) issue(loader_a, loader_b, write_stage);
          copy_async_commit();
          write_stage = advance(write_stage);
        }
        if (k_idx == kSteps - 1 && step + 1 < num_steps) {
          copy_async_wait<kStages - 2>();
          sync_threads();
          read_stage = advance(read_stage);
        }
        // Behind the last step this fetches once more what nobody needs. Without a branch between
        // them, the compiler interleaves the fetches with the products.
        if (is_active) {
          fetch(fragments[(k_idx + 1) % 2], read_stage, offset_a, offset_b, (k_idx + 1) % kSteps);
          multiply(tile, fragments[k_idx % 2]);
        }
      }
    }
  }

 private:
  template <class LoaderA, class LoaderB>
  SPARSE_UNIFIED_DEVICE static void issue(LoaderA& loader_a, LoaderB& loader_b, uint32_t stage) {
    loader_a.issue(stage);
    loader_b.issue(stage + TileA::kBytes);
  }

  SPARSE_UNIFIED_DEVICE static void fetch(Fragments& fragments, uint32_t stage, uint32_t offset_a,
                                          uint32_t offset_b, int k_idx) {
#pragma unroll
    for (int i = 0; i < OperandA::kLoads; ++i) {
      OperandA::load(fragments.a[i], stage, offset_a, i, k_idx);
    }
#pragma unroll
    for (int i = 0; i < OperandB::kLoads; ++i) {
      OperandB::load(fragments.b[i], stage, offset_b, i, k_idx);
    }
  }

  SPARSE_UNIFIED_DEVICE static void multiply(WarpTile<Shape>& tile, const Fragments& fragments) {
#pragma unroll
    for (int m = 0; m < OperandA::kLoads; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * OperandB::kLoads; ++n) {
        const uint32_t (&pair)[4] = fragments.b[n / 2];
        const uint32_t b[2] = {pair[n % 2 * 2], pair[n % 2 * 2 + 1]};
        multiply_add<T>(tile.values[m][n], fragments.a[m], b);
      }
    }
  }
};

}  // namespace sparse_unified
