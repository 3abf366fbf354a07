// SPDX-License-Identifier: Apache-2.0
// One function for each instruction that multiplies pairs of bf16, and its twin in plain C++, for
// tests on processors without it (SPARSE_UNIFIED_EMULATED_BF16). Sums are fp32.
//
// An AMX tile here is 16 rows of 64 bytes: 16 x 32 bf16 of a left operand, 16 pairs x 16 columns of
// a right one, or 16 x 16 sums. There are eight; a function's tiles are template arguments.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/vector.h"

#if !defined(SPARSE_UNIFIED_EMULATED_BF16)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparse_unified {

constexpr int64_t kTileBytes = 1024;

// How the tiles are laid out, as ldtilecfg reads it.
struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig whole_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  return config;
}

#if !defined(SPARSE_UNIFIED_EMULATED_BF16)

// Whether the operating system lets this process use the tiles, whose state is large.
inline bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// acc[i] += weight.high * values[i].high + weight.low * values[i].low.
__attribute__((target("arch=x86-64-v4,avx512bf16"))) SPARSE_UNIFIED_INLINE Float
dot_pairs(const Float& acc, float weight, const Float& values) {
  const __m512 sum = _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(values),
                                      bit_cast<__m512bh>(_mm512_set1_ps(weight)));
  return bit_cast<Float>(sum);
}

__attribute__((target("arch=x86-64-v4,avx512bf16"))) SPARSE_UNIFIED_INLINE HalfFloat
dot_pairs(const HalfFloat& acc, float weight, const HalfFloat& values) {
  const __m256 sum = _mm256_dpbf16_ps(bit_cast<__m256>(acc), bit_cast<__m256bh>(values),
                                      bit_cast<__m256bh>(_mm256_set1_ps(weight)));
  return bit_cast<HalfFloat>(sum);
}

inline void load_tile_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

inline void store_tile_config(TileConfig& config) {
  asm volatile("sttilecfg %0" : "=m"(config)::"memory");
}

// tile = 16 rows of 64 bytes, `stride` bytes apart.
template <int kTile>
SPARSE_UNIFIED_INLINE void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
SPARSE_UNIFIED_INLINE void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
SPARSE_UNIFIED_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// sums += left * right.
template <int kSums, int kLeft, int kRight>
SPARSE_UNIFIED_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#else

// A product of the values in one half of two pairs.
SPARSE_UNIFIED_INLINE Float multiply_halves(const UInt& a, const UInt& b, int half) {
  const auto values = [&](const UInt& pairs) {
    return bit_cast<Float>(half == 0 ? pairs << 16 : pairs & 0xffff0000u);
  };
  return values(a) * values(b);
}

SPARSE_UNIFIED_INLINE Float dot_pairs(const Float& acc, float weight, const Float& values) {
  const UInt pairs = bit_cast<UInt>(broadcast(weight));
  const UInt others = bit_cast<UInt>(values);
  return acc + multiply_halves(others, pairs, 1) + multiply_halves(others, pairs, 0);
}

SPARSE_UNIFIED_INLINE HalfFloat dot_pairs(const HalfFloat& acc, float weight,
                                          const HalfFloat& values) {
  Float wide[2] = {};
  std::memcpy(&wide[0], &acc, sizeof(acc));
  std::memcpy(&wide[1], &values, sizeof(values));
  const Float sum = dot_pairs(wide[0], weight, wide[1]);
  HalfFloat half;
  std::memcpy(&half, &sum, sizeof(half));
  return half;
}

struct EmulatedTiles {
  TileConfig config;
  UInt rows[8][16];
};

inline thread_local EmulatedTiles emulated_tiles;

// The rows of a tile; without a configuration the instruction would be undefined.
inline UInt* tile_rows(int tile) {
  if (emulated_tiles.config.palette != 1) {
    std::fputs("a tile is used before ldtilecfg\n", stderr);
    std::abort();
  }
  return emulated_tiles.rows[tile];
}

inline void load_tile_config(const TileConfig& config) { emulated_tiles = {config, {}}; }

inline void store_tile_config(TileConfig& config) { config = emulated_tiles.config; }

template <int kTile>
void load_tile(const void* rows, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) {
    std::memcpy(tile_rows(kTile) + i, static_cast<const char*>(rows) + i * stride, sizeof(UInt));
  }
}

template <int kTile>
void store_tile(void* rows, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) {
    std::memcpy(static_cast<char*>(rows) + i * stride, tile_rows(kTile) + i, sizeof(UInt));
  }
}

template <int kTile>
void zero_tile() {
  std::memset(tile_rows(kTile), 0, kTileBytes);
}

template <int kSums, int kLeft, int kRight>
void multiply_tiles() {
  for (int64_t m = 0; m < 16; ++m) {
    Float sums[2] = {};
    for (int64_t k = 0; k < 16; ++k) {
      const UInt left = UInt{} + tile_rows(kLeft)[m][k];
      for (int half = 0; half < 2; ++half) {
        sums[half] += multiply_halves(left, tile_rows(kRight)[k], half);
      }
    }
    UInt& row = tile_rows(kSums)[m];
    row = bit_cast<UInt>(bit_cast<Float>(row) + (sums[0] + sums[1]));
  }
}

#endif

// Tiles are configured while one of these lives; what was configured before comes back after it.
class TileScope {
 public:
  TileScope() {
    store_tile_config(before_);
    load_tile_config(whole_tiles());
  }
  ~TileScope() { load_tile_config(before_); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  TileConfig before_;
};

}  // namespace sparse_unified
