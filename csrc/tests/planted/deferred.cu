// SPDX-License-Identifier: Apache-2.0
// Results that are stored while the next tile is multiplied, the last tile by a narrower product.
#include "device/epilogue_sm90a.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kTiles = 3;
constexpr int kTileRows = 64;     // M
constexpr int kColumns = 128;     // N
constexpr int kLastColumns = 64;  // of the last tile
constexpr int kK = 16;
constexpr int kRows = 2 * 64 + 37;  // of `out`
constexpr int kRowsBytes = kTileRows * kSwizzleRowBytes;
constexpr int kSharedBytes = kTiles * kRowsBytes + kColumns * kSwizzleRowBytes;
constexpr LaunchConfig kConfig{dim3(1), kWarpgroupSize, kSharedBytes};

enum class Mistake {
  kNone,
  kStoresAccumulators,
  kPlaceOfNextTile,
  kLastTileLeft,
  kProductTooNarrow,
  kExchangeOfSome,
};

struct DeferredParams {
  const BFloat16* rows;     // [64 kTiles, 16]
  const BFloat16* columns;  // [128, 16]
  BFloat16* out;            // [kRows, 128], of the last tile 64 columns
};

// Copies [num_rows, 16] to a swizzled tile.
SPARSE_UNIFIED_DEVICE void fill(const BFloat16* from, int num_rows, unsigned char* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < num_rows * kK; i += kWarpgroupSize) {
    const int row = i / kK;
    const int k = i % kK;
    reinterpret_cast<BFloat16*>(tile + swizzled_offset(row, k / 8))[k % 8] = from[i];
  }
}

template <Mistake kMistake>
__global__ void deferred_kernel(const DeferredParams p) {
  unsigned char* shared = dynamic_shared_memory();
  for (int tile = 0; tile < kTiles; ++tile) {
    fill(p.rows + tile * kTileRows * kK, kTileRows, shared + tile * kRowsBytes);
  }
  fill(p.columns, kColumns, shared + kTiles * kRowsBytes);
  fence_async_proxy();
  sync_threads();
  const uint32_t address = shared_address(shared);
  const uint64_t b = operand_descriptor(address + kTiles * kRowsBytes, Major::kK);
  float d[kColumns / 2];
  RoundedResults<BFloat16, kColumns> results;
  const auto place = [&](int tile) {
    const int first = tile * kTileRows;
    return ResultPlace<BFloat16>{p.out + first * kColumns, kColumns, kRows - first,
                                 tile == kTiles - 1 ? kLastColumns : kColumns};
  };
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint64_t a = operand_descriptor(address + tile * kRowsBytes, Major::kK);
    wgmma_fence();
    if (tile < kTiles - 1) {
      wgmma<BFloat16, kColumns>(d, a, b, false);
    } else {
      constexpr int kN = kMistake == Mistake::kProductTooNarrow ? kLastColumns / 2 : kLastColumns;
      wgmma<BFloat16, kN>(d, a, b, false);
    }
    wgmma_commit();
    if (tile > 0) {
      const auto of = place(kMistake == Mistake::kPlaceOfNextTile ? tile : tile - 1);
      if (kMistake == Mistake::kStoresAccumulators) results.take(d, of);
      results.store(of);
    }
    wgmma_finish(d);
    const auto now = place(tile);
    if (kMistake == Mistake::kExchangeOfSome && lane_idx() / 4 >= now.num_rows % 8) continue;
    results.take(d, now);
  }
  if (kMistake != Mistake::kLastTileLeft) results.store(place(kTiles - 1));
}

// Small integers, whose sums bf16 holds exactly.
float row_value(int m, int k) { return static_cast<float>((5 * m + 3 * k) % 7 - 3); }
float column_value(int n, int k) { return static_cast<float>((2 * n + k) % 5 - 2); }

template <Mistake kMistake>
std::string run_deferred(bool is_planted) {
  emulation::DeviceArray<BFloat16> rows(kTiles * kTileRows * kK);
  emulation::DeviceArray<BFloat16> columns(kColumns * kK);
  emulation::DeviceArray<BFloat16> out(kRows * kColumns);
  for (int i = 0; i < rows.size(); ++i) rows[i] = from_float<BFloat16>(row_value(i / kK, i % kK));
  for (int i = 0; i < columns.size(); ++i) {
    columns[i] = from_float<BFloat16>(column_value(i / kK, i % kK));
  }
  launch(is_planted ? deferred_kernel<kMistake> : deferred_kernel<Mistake::kNone>, kConfig,
         DeferredParams{rows.get(), columns.get(), out.get()});
  out.check_guards("out");
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < (m < (kTiles - 1) * kTileRows ? kColumns : kLastColumns); ++n) {
      float expected = 0;
      for (int k = 0; k < kK; ++k) expected += row_value(m, k) * column_value(n, k);
      const float got = to_float(out[m * kColumns + n]);
      if (got == expected) continue;
      return "out at " + std::to_string(m * kColumns + n) + ": got " + std::to_string(got) +
             ", expected " + std::to_string(expected);
    }
  }
  return "";
}

}  // namespace

std::string accumulators_stored_late(bool is_planted) {
  return run_deferred<Mistake::kStoresAccumulators>(is_planted);
}
std::string place_of_next_tile(bool is_planted) {
  return run_deferred<Mistake::kPlaceOfNextTile>(is_planted);
}
std::string last_tile_left(bool is_planted) {
  return run_deferred<Mistake::kLastTileLeft>(is_planted);
}
std::string product_too_narrow(bool is_planted) {
  return run_deferred<Mistake::kProductTooNarrow>(is_planted);
}
std::string exchange_of_some(bool is_planted) {
  return run_deferred<Mistake::kExchangeOfSome>(is_planted);
}

}  // namespace sparse_unified::planted
