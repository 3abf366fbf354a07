// SPDX-License-Identifier: Apache-2.0
// What the GEMMs of grouped_ffn are made of, by itself: tiles in shared memory without bank
// conflicts, and the order of tiles.
#include <set>
#include <utility>

#include "check.h"
#include "device/swizzle.h"
#include "device/tile_scheduler.h"

namespace sparse_unified::test {
namespace {

// Eight 16-byte accesses at a time must fall on eight different parts of the 128 bytes of banks.
void check_banks(const char* what, const int (&offsets)[8]) {
  std::set<int> places;
  for (const int offset : offsets) places.insert(offset / kVectorBytes % 8);
  check_equal(what, offsets[0], static_cast<double>(places.size()), 8);
}

template <int kRows, int kColumns>
void test_accesses_do_not_conflict() {
  using Tile = SharedTile<kRows, kColumns>;
  std::set<int> offsets;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) offsets.insert(Tile::offset(row, chunk));
  }
  check_equal("chunks lie apart", 0, static_cast<double>(offsets.size()), kRows * Tile::kChunks);
  check_equal("within the tile", 0, *offsets.rbegin(), Tile::kBytes - kVectorBytes);

  int eight[8];
  // ldmatrix: the same chunk of 8 rows.
  for (int row = 0; row < kRows; row += 8) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      for (int i = 0; i < 8; ++i) eight[i] = Tile::offset(row + i, chunk);
      check_banks("ldmatrix", eight);
    }
  }
  // Copies: 8 threads after each other, along rows.
  for (int first = 0; first < kRows * Tile::kChunks; first += 8) {
    for (int i = 0; i < 8; ++i) {
      eight[i] = Tile::offset((first + i) / Tile::kChunks, (first + i) % Tile::kChunks);
    }
    check_banks("copy", eight);
  }
  // What fragments and loaders add to an offset instead of computing another.
  for (int row = 0; row + 8 < kRows; ++row) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      check_equal("8 rows on", row, Tile::offset(row + 8, chunk),
                  Tile::offset(row, chunk) + 8 * Tile::kRowBytes);
      for (int flip = 0; flip < Tile::kChunks; ++flip) {
        check_equal("another chunk", chunk, Tile::offset(row, chunk ^ flip),
                    Tile::offset(row, chunk) ^ flip * kVectorBytes);
      }
    }
  }
}

void test_raster_visits_every_tile_once() {
  for (const int num_m : {1, 2, kRasterTiles, kRasterTiles + 1, 3 * kRasterTiles - 1}) {
    for (const int num_n : {1, 2, 7}) {
      std::set<std::pair<int, int>> seen;
      for (int idx = 0; idx < num_m * num_n; ++idx) {
        const TileCoordinates at = rasterize(idx, num_m, num_n);
        check_equal("m within", idx, 0 <= at.m && at.m < num_m, true);
        check_equal("n within", idx, 0 <= at.n && at.n < num_n, true);
        seen.insert({at.m, at.n});
      }
      check_equal("tiles", num_m, static_cast<double>(seen.size()), num_m * num_n);
    }
  }
  // A band of tiles of M shares one tile of N before the next.
  for (int idx = 0; idx < kRasterTiles; ++idx) {
    check_equal("n of the first band", idx, rasterize(idx, 40, 5).n, 0);
  }
}

void test_most_row_tiles_is_reached_and_never_exceeded() {
  const auto count = [](std::initializer_list<int64_t> groups, int64_t tile_rows) {
    int64_t num_tiles = 0;
    for (const int64_t rows : groups) num_tiles += ceil_div(rows, tile_rows);
    return num_tiles;
  };
  check_equal("no rows", 0, static_cast<double>(max_row_tiles(0, 16, 128)), 0);
  check_equal("one row each", 0, static_cast<double>(max_row_tiles(3, 3, 128)),
              static_cast<double>(count({1, 1, 1}, 128)));
  check_equal("one row more than a tile", 0,
              static_cast<double>(max_row_tiles(129 + 1 + 1, 3, 128)),
              static_cast<double>(count({129, 1, 1}, 128)));
  check_equal("one group", 0, static_cast<double>(max_row_tiles(257, 1, 128)), 3);
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified::test;
  return run_tests(argc, argv,
                   {{"accesses do not conflict128 32", test_accesses_do_not_conflict<128, 32>},
                    {"accesses do not conflict256 32", test_accesses_do_not_conflict<256, 32>},
                    {"accesses do not conflict128 64", test_accesses_do_not_conflict<128, 64>},
                    {"accesses do not conflict32 64", test_accesses_do_not_conflict<32, 64>},
                    {"accesses do not conflict32 128", test_accesses_do_not_conflict<32, 128>},
                    {"accesses do not conflict32 256", test_accesses_do_not_conflict<32, 256>},
                    {"raster visits every tile once", test_raster_visits_every_tile_once},
                    {"most row tiles is reached and never exceeded",
                     test_most_row_tiles_is_reached_and_never_exceeded}});
}
