// SPDX-License-Identifier: Apache-2.0
// The register tiles of the FFN kernels: weights times panels of tokens, in fp32. A panel of 32
// (or, at the end, 16) tokens on AVX-512 and of 16 on AVX2 is laid out [D][tokens], so every
// product is a weight, broadcast from where it lies, times two registers of tokens. 16-bit tokens
// are widened as a panel is gathered, a tile of 16-bit weights once for all the panels that pass
// by.
//
// The file that includes this one says for which instruction set: SPARSE_UNIFIED_LEVEL is 3 (AVX2
// and FMA) or 4 (AVX-512), as in x86-64-v3 and v4. What is defined here is in a namespace of its
// own for each, `avx2` or `avx512`.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/vector.h"
#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#if SPARSE_UNIFIED_LEVEL == 4
#define SPARSE_UNIFIED_TILES avx512
#define SPARSE_UNIFIED_TARGET __attribute__((target("arch=x86-64-v4")))
#else
#define SPARSE_UNIFIED_TILES avx2
#define SPARSE_UNIFIED_TARGET __attribute__((target("arch=x86-64-v3")))
#endif

namespace sparse_unified::SPARSE_UNIFIED_TILES {

#if SPARSE_UNIFIED_LEVEL == 4
// 7 neurons (gate and up) or 14 outputs, times 2 registers of 16 tokens: 28 of 32 accumulate.
constexpr int64_t kPanelVectors = 2;
constexpr int64_t kRegisterLanes = 16;
constexpr int64_t kTilePairs = 7;
#else
// 3 neurons or 6 outputs, times 2 registers of 8 tokens: 12 of 16 accumulate.
constexpr int64_t kPanelVectors = 1;
constexpr int64_t kRegisterLanes = 8;
constexpr int64_t kTilePairs = 3;
#endif
constexpr int64_t kPanelRows = kPanelVectors * kLanes;
constexpr int64_t kTileRows = 2 * kTilePairs;
using Register = float __attribute__((vector_size(4 * kRegisterLanes)));
constexpr int64_t kRegistersPerVector = kLanes / kRegisterLanes;
// A sum is cut into blocks, so that fp32 rounding grows with their number and not with D.
constexpr int64_t kSumBlock = 512;
// How far ahead of the part of a row that is gathered the next lines are asked for.
constexpr int64_t kAheadFloats = 64;

// Size of the next tile when `rest` rows remain: equal tiles, none too small to fill the pipelines.
inline int64_t tile_size(int64_t rest, int64_t largest) {
  const int64_t num_tiles = (rest + largest - 1) / largest;
  return (rest + num_tiles - 1) / num_tiles;
}

// Lanes a panel of `num_rows` rows is laid out with.
inline int64_t panel_lanes(int64_t num_rows) { return num_rows > kLanes ? kPanelRows : kLanes; }

// A tile of weight rows, even rows from `even`, odd rows from `odd`.
struct WeightTile {
  const float* even;
  int64_t even_stride;
  const float* odd;
  int64_t odd_stride;
  int64_t length;

  const float* row(int64_t r) const {
    return r % 2 == 0 ? even + r / 2 * even_stride : odd + r / 2 * odd_stride;
  }
};

// Weight rows as they are stored: row r begins at element r * stride.
struct StoredRows {
  const void* data;
  int64_t stride;
};

// Those of a matrix from an element on.
inline StoredRows stored_rows(const Matrix& matrix, DType dtype, int64_t row, int64_t column) {
  const int64_t offset = (row * matrix.stride + column) * element_bytes(dtype);
  return {static_cast<const char*>(matrix.data) + offset, matrix.stride};
}

// 16 values in fp32; both levels have an instruction for fp16.
template <typename T>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET Float load_wide(const T* values) {
  return load(values);
}

SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET Float load_wide(const Float16* values) {
  __m256 halves[2];
  for (int64_t i = 0; i < 2; ++i) {
    __m128i bits;
    std::memcpy(&bits, values + 8 * i, sizeof(bits));
    halves[i] = _mm256_cvtph_ps(bits);
  }
  return bit_cast<Float>(halves);
}

// out[i] = values[i] in fp32.
template <typename T>
SPARSE_UNIFIED_TARGET void widen_row(const T* values, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load_wide(values + i));
  if (i < n) store(out + i, load(values + i, n - i), n - i);
}

// out[r * out_stride + i] = value i of row r in fp32; rows of `even` and `odd` by turns.
template <typename T>
SPARSE_UNIFIED_TARGET void widen_rows(const StoredRows& even, const StoredRows& odd,
                                      int64_t num_rows, int64_t length, float* out,
                                      int64_t out_stride) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const StoredRows& rows = r % 2 == 0 ? even : odd;
    widen_row(static_cast<const T*>(rows.data) + r / 2 * rows.stride, length, out + r * out_stride);
  }
}

inline void widen_rows(DType dtype, const StoredRows& even, const StoredRows& odd, int64_t num_rows,
                       int64_t length, float* out, int64_t out_stride) {
  const auto widen = dtype == DType::kBFloat16 ? widen_rows<BFloat16> : widen_rows<Float16>;
  widen(even, odd, num_rows, length, out, out_stride);
}

// A tile of num_rows rows: where they lie, or, of a 16-bit type, widened at `scratch`
// [num_rows][length].
inline WeightTile weight_tile(DType dtype, const StoredRows& even, const StoredRows& odd,
                              int64_t num_rows, int64_t length, float* scratch) {
  if (dtype == DType::kFloat32) {
    return {static_cast<const float*>(even.data), even.stride, static_cast<const float*>(odd.data),
            odd.stride, length};
  }
  widen_rows(dtype, even, odd, num_rows, length, scratch, length);
  return {scratch, 2 * length, scratch + length, 2 * length, length};
}

// The even and odd ones of a matrix's rows from `row` on, from a column on.
struct RowPairs {
  StoredRows even;
  StoredRows odd;
};

inline RowPairs row_pairs(const Matrix& matrix, DType dtype, int64_t row, int64_t column) {
  RowPairs pairs{stored_rows(matrix, dtype, row, column),
                 stored_rows(matrix, dtype, row + 1, column)};
  pairs.even.stride *= 2;
  pairs.odd.stride *= 2;
  return pairs;
}

// Sums of a tile of weight rows and a panel: [row][register of tokens].
template <int64_t kRows, int64_t kVectors>
using Sums = Register[kRows][kVectors * kRegistersPerVector];

// sums[r][v] = sum_k tile.row(r)[k] * panel[k][v].
template <int64_t kRows, int64_t kVectors>
SPARSE_UNIFIED_INLINE void dot_tile(const WeightTile& tile, const float* panel,
                                    Sums<kRows, kVectors>& sums) {
  constexpr int64_t kRegisters = kVectors * kRegistersPerVector;
  for (int64_t block = 0; block < tile.length; block += kSumBlock) {
    const int64_t block_end = std::min(block + kSumBlock, tile.length);
    Register acc[kRows][kRegisters] = {};
    for (int64_t k = block; k < block_end; ++k) {
      Register values[kRegisters];
      for (int64_t v = 0; v < kRegisters; ++v) {
        std::memcpy(&values[v], panel + (k * kRegisters + v) * kRegisterLanes, sizeof(Register));
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        for (int64_t v = 0; v < kRegisters; ++v) acc[r][v] += tile.row(r)[k] * values[v];
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t v = 0; v < kRegisters; ++v) {
        sums[r][v] = block == 0 ? acc[r][v] : sums[r][v] + acc[r][v];
      }
    }
  }
}

// The sums of one row for vector v of its tokens.
template <int64_t kRegisters>
SPARSE_UNIFIED_INLINE Float vector_of(const Register (&sums)[kRegisters], int64_t v) {
  Float value;
  std::memcpy(&value, &sums[v * kRegistersPerVector], sizeof(value));
  return value;
}

#if SPARSE_UNIFIED_LEVEL == 4

// Transposes 16 x 16 in place: in step `width`, rows i and i + width swap their off-diagonal
// blocks.
template <int64_t kWidth>
SPARSE_UNIFIED_INLINE void transpose_step(Float (&rows)[kLanes]) {
  Int low;
  Int high;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const bool is_low = (lane & kWidth) == 0;
    low[lane] = is_low ? lane : lane - kWidth + kLanes;
    high[lane] = is_low ? lane + kWidth : lane + kLanes;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if ((i & kWidth) != 0) continue;
    const Float a = rows[i];
    const Float b = rows[i + kWidth];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kWidth] = __builtin_shuffle(a, b, high);
  }
}

SPARSE_UNIFIED_INLINE void transpose(Float (&rows)[kLanes]) {
  transpose_step<8>(rows);
  transpose_step<4>(rows);
  transpose_step<2>(rows);
  transpose_step<1>(rows);
}

// columns[i] = column `column + i` of the 16 rows, i = 0 to 3. Masked loads put quarters of rows
// side by side, so that half of a transposition's shuffles are left.
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void load_columns(const float* const (&rows)[kLanes],
                                                              int64_t column, Float (&columns)[4]) {
  Float quarters[4];  // [i]: rows i, i + 4, i + 8, i + 12
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    __m512 value = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + column));
    value = _mm512_mask_broadcast_f32x4(value, 0x00f0, _mm_loadu_ps(rows[i + 4] + column));
    value = _mm512_mask_broadcast_f32x4(value, 0x0f00, _mm_loadu_ps(rows[i + 8] + column));
    value = _mm512_mask_broadcast_f32x4(value, 0xf000, _mm_loadu_ps(rows[i + 12] + column));
    quarters[i] = bit_cast<Float>(value);
  }
  constexpr Int kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Int kHigh = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Int kEven = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Int kOdd = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  const Float low01 = __builtin_shuffle(quarters[0], quarters[1], kLow);
  const Float low23 = __builtin_shuffle(quarters[2], quarters[3], kLow);
  const Float high01 = __builtin_shuffle(quarters[0], quarters[1], kHigh);
  const Float high23 = __builtin_shuffle(quarters[2], quarters[3], kHigh);
  columns[0] = __builtin_shuffle(low01, low23, kEven);
  columns[1] = __builtin_shuffle(low01, low23, kOdd);
  columns[2] = __builtin_shuffle(high01, high23, kEven);
  columns[3] = __builtin_shuffle(high01, high23, kOdd);
}

// panel[i * stride + lane] = column `column + i` of row `lane`, i = 0 to 3.
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void copy_columns(const float* const (&rows)[kLanes],
                                                              int64_t column, float* panel,
                                                              int64_t stride) {
  Float columns[4];
  load_columns(rows, column, columns);
  for (int64_t i = 0; i < 4; ++i) store(panel + i * stride, columns[i]);
}

#else

// The same, rows and columns four by four.
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void copy_columns(const float* const (&rows)[kLanes],
                                                              int64_t column, float* panel,
                                                              int64_t stride) {
#pragma GCC unroll 4
  for (int64_t lane = 0; lane < kLanes; lane += 4) {
    __m128 a = _mm_loadu_ps(rows[lane] + column);
    __m128 b = _mm_loadu_ps(rows[lane + 1] + column);
    __m128 c = _mm_loadu_ps(rows[lane + 2] + column);
    __m128 d = _mm_loadu_ps(rows[lane + 3] + column);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(panel + lane, a);
    _mm_storeu_ps(panel + stride + lane, b);
    _mm_storeu_ps(panel + 2 * stride + lane, c);
    _mm_storeu_ps(panel + 3 * stride + lane, d);
  }
}

// Brings values [column][16 rows] to columns d and up of `count` rows, four by four; with weights
// they are added.
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void put_rows(const float* values, int64_t num_columns,
                                                          int64_t count, float* const* rows,
                                                          int64_t d, const float* weights) {
  for (int64_t column = 0; column < num_columns; column += 4) {
    const int64_t width = std::min<int64_t>(num_columns - column, 4);
    for (int64_t row = 0; row < count; row += 4) {
      const float* block = values + column * kLanes + row;
      __m128 columns[4];
      for (int64_t i = 0; i < 4; ++i) {
        columns[i] = i < width ? _mm_loadu_ps(block + i * kLanes) : _mm_setzero_ps();
      }
      _MM_TRANSPOSE4_PS(columns[0], columns[1], columns[2], columns[3]);
      for (int64_t i = 0; i < std::min<int64_t>(count - row, 4); ++i) {
        float* out = rows[row + i] + d + column;
        float sums[4];
        _mm_storeu_ps(sums, columns[i]);
        if (width == 4) {
          __m128 sum = columns[i];
          if (weights != nullptr) {
            sum = _mm_fmadd_ps(_mm_set1_ps(weights[row + i]), sum, _mm_loadu_ps(out));
          }
          _mm_storeu_ps(out, sum);
          continue;
        }
        for (int64_t c = 0; c < width; ++c) {
          out[c] = weights != nullptr ? out[c] + weights[row + i] * sums[c] : sums[c];
        }
      }
    }
  }
}

#endif

// panel[d][i] = x[row_token[i]][d], or x[i][d] without row_token, for i from `first` on; lanes
// beyond `count` repeat the last row.
template <typename T, int64_t kVectors>
SPARSE_UNIFIED_TARGET void gather_panel(const Matrix& x, const int32_t* row_token, int64_t first,
                                        int64_t count, float* panel) {
  const int64_t hidden_size = x.columns;
  const int64_t whole = hidden_size / kLanes * kLanes;
  for (int64_t v = 0; v < kVectors; ++v) {
    const T* sources[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = first + std::min(v * kLanes + lane, count - 1);
      sources[lane] = x.row<T>(row_token != nullptr ? row_token[i] : i);
    }
    for (int64_t d = 0; d < whole; d += kLanes) {
      const float* rows[kLanes];
      float widened[kLanes][kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        __builtin_prefetch(sources[lane] + d + kAheadFloats);
        if constexpr (std::is_same_v<T, float>) {
          rows[lane] = sources[lane] + d;
        } else {
          store(widened[lane], load_wide(sources[lane] + d));
          rows[lane] = widened[lane];
        }
      }
#pragma GCC unroll 4
      for (int64_t part = 0; part < kLanes; part += 4) {
        copy_columns(rows, part, panel + ((d + part) * kVectors + v) * kLanes, kVectors * kLanes);
      }
    }
    for (int64_t d = whole; d < hidden_size; ++d) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        widen_row(sources[lane] + d, 1, panel + (d * kVectors + v) * kLanes + lane);
      }
    }
  }
}

template <typename T>
SPARSE_UNIFIED_TARGET void gather_panels(const Matrix& x, const int32_t* row_token, int64_t first,
                                         int64_t count, float* panels) {
  for (int64_t row = 0; row < count; row += kPanelRows) {
    const int64_t in_panel = std::min(kPanelRows, count - row);
    const auto gather = in_panel > kLanes ? gather_panel<T, kPanelVectors> : gather_panel<T, 1>;
    gather(x, row_token, first + row, in_panel, panels + row * x.columns);
  }
}

// The panels of `count` rows, one after the other: [count / 32][D][32].
inline void gather_panels(DType dtype, const Matrix& x, const int32_t* row_token, int64_t first,
                          int64_t count, float* panels) {
  const auto gather = dtype == DType::kFloat32    ? gather_panels<float>
                      : dtype == DType::kBFloat16 ? gather_panels<BFloat16>
                                                  : gather_panels<Float16>;
  gather(x, row_token, first, count, panels);
}

// Rows worked on at once, at most `most_rows` and `most_floats` of D, in whole panels.
inline int64_t rows_of_chunk(int64_t hidden_size, int64_t most_rows, int64_t most_floats) {
  const int64_t rows = most_floats / std::max<int64_t>(hidden_size, 1);
  return std::clamp(rows / kPanelRows * kPanelRows, kPanelRows, most_rows);
}

// run(first, count) for chunks of [begin, end) of at most `max_rows` rows: equal shares in whole
// panels, so that only the last panel of all may be short.
template <class Run>
void for_each_chunk(int64_t begin, int64_t end, int64_t max_rows, const Run& run) {
  const int64_t num_chunks = (end - begin + max_rows - 1) / max_rows;
  for (int64_t chunk = 0, first = begin; chunk < num_chunks; ++chunk) {
    const int64_t share = (end - first + num_chunks - chunk - 1) / (num_chunks - chunk);
    const int64_t whole = (share + kPanelRows - 1) / kPanelRows * kPanelRows;
    const int64_t count = std::min(whole, end - first);
    run(first, count);
    first += count;
  }
}

// hidden[j] = silu(gate_j x) * up_j x for kPairs neurons of one panel; gate rows even, up rows odd.
template <int64_t kPairs, int64_t kVectors>
SPARSE_UNIFIED_TARGET void hidden_tile(const WeightTile& tile, const float* panel, float* hidden) {
  Sums<2 * kPairs, kVectors> sums = {};
  dot_tile<2 * kPairs, kVectors>(tile, panel, sums);
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const Float gate = vector_of(sums[2 * pair], v);
      const Float up = vector_of(sums[2 * pair + 1], v);
      store(hidden + (pair * kVectors + v) * kLanes, gate * sigmoid(gate) * up);
    }
  }
}

// hidden_tile for 1 to kTilePairs neurons and a panel of `num_rows` rows.
template <int64_t kPairs = kTilePairs>
SPARSE_UNIFIED_TARGET void run_hidden_tile(int64_t pairs, int64_t num_rows, const WeightTile& tile,
                                           const float* panel, float* hidden) {
  if constexpr (kPairs > 1) {
    if (pairs < kPairs) {
      return run_hidden_tile<kPairs - 1>(pairs, num_rows, tile, panel, hidden);
    }
  }
  if (num_rows > kLanes) {
    hidden_tile<kPairs, kPanelVectors>(tile, panel, hidden);
  } else {
    hidden_tile<kPairs, 1>(tile, panel, hidden);
  }
}

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
