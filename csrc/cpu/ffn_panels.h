// SPDX-License-Identifier: Apache-2.0
// The panels of the FFN kernels: tokens gathered and transposed, so that every product is a weight
// times a register of tokens.
//
// A panel holds 32 (or, at the end, 16) tokens, 16 in all on AVX2, as lanes of 32 bits: one value
// in fp32, to which 16-bit tokens are widened, or, where the processor multiplies bf16, a pair of
// values that follow each other in the token.
//
// The file that includes this one says for which instructions: SPARSE_UNIFIED_LEVEL is 3 (AVX2 and
// FMA), 4 (AVX-512), 5 (its dot products of bf16) or 6 (AMX tiles of bf16); 5 and 6 take bf16
// alone. What is defined here is in a namespace of its own for each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/vector.h"
#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#if SPARSE_UNIFIED_LEVEL == 6
#define SPARSE_UNIFIED_TILES amx
#elif SPARSE_UNIFIED_LEVEL == 5
#define SPARSE_UNIFIED_TILES avx512bf16
#elif SPARSE_UNIFIED_LEVEL == 4
#define SPARSE_UNIFIED_TILES avx512
#else
#define SPARSE_UNIFIED_TILES avx2
#endif
#if SPARSE_UNIFIED_LEVEL >= 5 && !defined(SPARSE_UNIFIED_EMULATED_BF16)
#define SPARSE_UNIFIED_TARGET __attribute__((target("arch=x86-64-v4,avx512bf16")))
#elif SPARSE_UNIFIED_LEVEL >= 4
#define SPARSE_UNIFIED_TARGET __attribute__((target("arch=x86-64-v4")))
#else
#define SPARSE_UNIFIED_TARGET __attribute__((target("arch=x86-64-v3")))
#endif

namespace sparse_unified::SPARSE_UNIFIED_TILES {

constexpr bool kIsPairs = SPARSE_UNIFIED_LEVEL >= 5;
constexpr bool kIsAmx = SPARSE_UNIFIED_LEVEL == 6;
constexpr int64_t kPanelVectors = SPARSE_UNIFIED_LEVEL >= 4 ? 2 : 1;
constexpr int64_t kPanelRows = kPanelVectors * kLanes;
// Values of a lane, and lanes that a sum is padded to a multiple of, with zeros.
constexpr int64_t kLaneValues = kIsPairs ? 2 : 1;
constexpr int64_t kLaneMultiple = kIsAmx ? 16 : 1;
// How far ahead of the part of a row that is gathered the next lines are asked for.
constexpr int64_t kAheadFloats = 64;

// Lanes of a sum over `length` values.
constexpr int64_t num_lanes(int64_t length) {
  constexpr int64_t kMultiple = kLaneValues * kLaneMultiple;
  return (length + kMultiple - 1) / kMultiple * kLaneMultiple;
}

// Vectors of tokens that a panel of `num_rows` rows is laid out with.
inline int64_t panel_vectors(int64_t num_rows) { return num_rows > kLanes ? kPanelVectors : 1; }

constexpr int64_t vectors_of(int64_t num_halves) { return (num_halves + 1) / 2; }

// run.operator()<kHalves>(), the halves of vectors that are computed for the panel that begins with
// the first of `num_rows` rows.
template <class Run>
void dispatch_halves(int64_t num_rows, const Run& run) {
  if constexpr (kIsAmx) {
    return num_rows > kLanes ? run.template operator()<4>() : run.template operator()<2>();
  } else {
    if (num_rows <= kHalfLanes) return run.template operator()<1>();
    if constexpr (kPanelVectors > 1) {
      if (num_rows > 3 * kHalfLanes) return run.template operator()<4>();
      if (num_rows > 2 * kHalfLanes) return run.template operator()<3>();
    }
    return run.template operator()<2>();
  }
}

// Where vector v of lane k lies in a panel: [k][kVectors][16], on AMX [k / 16][kVectors][16][16],
// whose 16 x 16 are what a tile loads.
template <int64_t kVectors>
constexpr int64_t lane_offset(int64_t k, int64_t v) {
  const int64_t block = k / kLaneMultiple;
  return ((block * kVectors + v) * kLaneMultiple + k % kLaneMultiple) * kLanes;
}

// 16 values in fp32; every level has an instruction for fp16.
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

#if SPARSE_UNIFIED_LEVEL >= 4

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

// panel lane k of token i = values of x[row_token[i]], or of x[i] without row_token, for i from
// `first` on; tokens beyond `count` repeat the last one.
template <typename T, int64_t kVectors>
SPARSE_UNIFIED_TARGET void gather_panel(const Matrix& x, const int32_t* row_token, int64_t first,
                                        int64_t count, float* panel) {
  // A pair of bf16 moves as a float does.
  using Unit = std::conditional_t<kIsPairs, float, T>;
  const int64_t num_units = x.columns / kLaneValues;
  const int64_t whole = num_units / kLanes * kLanes;
  for (int64_t v = 0; v < kVectors; ++v) {
    const Unit* sources[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = first + std::min(v * kLanes + lane, count - 1);
      const T* row = x.row<T>(row_token != nullptr ? row_token[i] : i);
      sources[lane] = reinterpret_cast<const Unit*>(row);
    }
    for (int64_t k = 0; k < whole; k += kLanes) {
      const float* rows[kLanes];
      float widened[kLanes][kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        __builtin_prefetch(sources[lane] + k + kAheadFloats);
        if constexpr (std::is_same_v<Unit, float>) {
          rows[lane] = sources[lane] + k;
        } else {
          store(widened[lane], load_wide(sources[lane] + k));
          rows[lane] = widened[lane];
        }
      }
#pragma GCC unroll 4
      for (int64_t part = 0; part < kLanes; part += 4) {
        copy_columns(rows, part, panel + lane_offset<kVectors>(k + part, v),
                     lane_offset<kVectors>(1, 0));
      }
    }
    for (int64_t k = whole; k < num_lanes(x.columns); ++k) {
      const int64_t rest = std::clamp<int64_t>(x.columns - k * kLaneValues, 0, kLaneValues);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        float* target = panel + lane_offset<kVectors>(k, v) + lane;
        if constexpr (kIsPairs) {
          *target = 0;
          std::memcpy(target, sources[lane] + k, static_cast<size_t>(rest) * sizeof(T));
        } else {
          widen_row(sources[lane] + k, rest, target);
        }
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
    gather(x, row_token, first + row, in_panel, panels + row * num_lanes(x.columns));
  }
}

// run(T{}) with the storage type of `dtype`, which for pairs is known.
template <class Run>
void dispatch_storage(DType dtype, const Run& run) {
  if constexpr (kIsPairs) {
    run(BFloat16{});
  } else {
    dispatch_dtype(dtype, run);
  }
}

// The panels of `count` rows, one after the other.
inline void gather_panels(DType dtype, const Matrix& x, const int32_t* row_token, int64_t first,
                          int64_t count, float* panels) {
  dispatch_storage(dtype,
                   [&]<typename T>(T) { gather_panels<T>(x, row_token, first, count, panels); });
}

// Rows worked on at once, at most `most_rows` and `most_lanes` of a panel, in whole panels.
inline int64_t rows_of_chunk(int64_t lanes, int64_t most_rows, int64_t most_lanes) {
  const int64_t rows = most_lanes / std::max<int64_t>(lanes, 1);
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

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
