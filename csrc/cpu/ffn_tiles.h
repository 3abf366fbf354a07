// SPDX-License-Identifier: Apache-2.0
// The FFN over some of its neurons, for panels of tokens (see ffn_panels.h): the loop over weights
// and panels that every FFN kernel runs, and its register tiles.
//
// Every product is a weight, broadcast from where it lies, times two registers of tokens, of which
// the last may be a half one, so that a panel costs what its tokens do, to the next 8; on AMX, a
// tile of 16 x 32 weights times one of 32 values of 16 tokens. fp32 weights are read in place. A
// tile of 16-bit weights is brought once into the layout that the products want, widened, or in
// pairs padded with zeros, for all the panels that pass by.
#pragma once

#include "cpu/ffn_panels.h"

#ifdef SPARSE_UNIFIED_TARGET

#if SPARSE_UNIFIED_LEVEL >= 5
#include "cpu/bf16_instructions.h"
#endif

namespace sparse_unified::SPARSE_UNIFIED_TILES {

#if SPARSE_UNIFIED_LEVEL == 6
// 16 neurons (gate and up) or 32 outputs, times 2 vectors of tokens: 4 of 8 tiles are sums.
constexpr int64_t kRegisterLanes = 16;
constexpr int64_t kTilePairs = 16;
constexpr int64_t kOutputs = 32;
constexpr int64_t kOutputPart = 32;
#elif SPARSE_UNIFIED_LEVEL >= 4
// 7 neurons (gate and up), times 2 registers of 16 tokens: 28 of 32 accumulate. Outputs in parts.
constexpr int64_t kRegisterLanes = 16;
constexpr int64_t kTilePairs = 7;
constexpr int64_t kOutputs = 16;
constexpr int64_t kOutputPart = 8;
#else
// 3 neurons or 6 outputs, times 2 registers of 8 tokens: 12 of 16 accumulate.
constexpr int64_t kRegisterLanes = 8;
constexpr int64_t kTilePairs = 3;
constexpr int64_t kOutputs = 16;
constexpr int64_t kOutputPart = 6;
#endif
// Tiles of weights that pass by a panel one after the other.
constexpr int64_t kTileGroup = kIsAmx ? 4 : 1;
static_assert(kOutputs % kLanes == 0);  // rows of outputs are stored in whole cache lines
constexpr int64_t kTileRows = std::max(2 * kTilePairs, kOutputs);
using Register = float __attribute__((vector_size(4 * kRegisterLanes)));
constexpr int64_t kRegistersPerVector = kLanes / kRegisterLanes;
// A sum is cut into blocks, so that fp32 rounding grows with their number and not with D.
constexpr int64_t kSumBlock = 512;

// Size of the next tile when `rest` rows remain: equal tiles, none too small to fill the pipelines;
// an AMX tile takes the same time whatever it holds.
inline int64_t tile_size(int64_t rest, int64_t largest) {
  if (kIsAmx) return std::min(rest, largest);
  const int64_t num_tiles = (rest + largest - 1) / largest;
  return (rest + num_tiles - 1) / num_tiles;
}

// Adjacent neurons: [first, first + count) of the width, from `offset` of those chosen.
struct Run {
  int64_t first;
  int64_t count;
  int64_t offset;
};

// Neurons in the order of their sums.
struct Slice {
  const Run* runs;
  int64_t num_runs;
  int64_t width;
};

// A tile of weight rows in lanes, even rows from `even`, odd rows from `odd`; on AMX
// [length / 16][even, odd][16 rows][16 lanes].
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

// Weight rows as they are stored: those of a matrix and those of another by turns.
struct StoredRows {
  Matrix even;
  Matrix odd;

  template <typename T>
  const T* row(int64_t r) const {
    return (r % 2 == 0 ? even : odd).template row<T>(r / 2);
  }
};

// The part of a matrix from an element on.
inline Matrix matrix_from(const Matrix& matrix, DType dtype, int64_t row, int64_t column) {
  const int64_t offset = (row * matrix.stride + column) * element_bytes(dtype);
  return {static_cast<const char*>(matrix.data) + offset, matrix.rows - row,
          matrix.columns - column, matrix.stride};
}

// Every second row from a row on.
inline Matrix alternate_rows(const Matrix& matrix, DType dtype, int64_t row) {
  Matrix rows = matrix_from(matrix, dtype, row, 0);
  rows.rows = (rows.rows + 1) / 2;
  rows.stride *= 2;
  return rows;
}

#if SPARSE_UNIFIED_LEVEL >= 5

// Copies columns [0, count) of a row, or zeros, to those from `offset` on of row r of a tile.
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void pack_columns(const BFloat16* source, int64_t count,
                                                              int64_t offset, int64_t r,
                                                              int64_t lanes, float* tile) {
  constexpr int64_t kLine = 32;  // values of a cache line
  constexpr int64_t kStep = kIsAmx ? 32 * kLanes : kLanes;
  float* line = tile + (kIsAmx ? (r % 2 * 16 + r / 2) * kLanes : r * lanes);
  line += offset / kLine * kStep;
  int64_t column = offset % kLine;
  for (int64_t i = 0; i < count; line += kStep, column = 0) {
    if (column == 0 && count - i >= kLine && source != nullptr) {
      std::memcpy(line, source + i, kLine * sizeof(BFloat16));
      i += kLine;
      continue;
    }
    const int64_t n = std::min(count - i, kLine - column);
    const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
    const __m512i values =
        source != nullptr ? _mm512_maskz_loadu_epi16(mask, source + i) : _mm512_setzero_si512();
    _mm512_mask_storeu_epi16(reinterpret_cast<BFloat16*>(line) + column, mask, values);
    i += n;
  }
}

template <typename T>
SPARSE_UNIFIED_TARGET void pack_rows(const StoredRows& rows, int64_t num_rows, const Slice& slice,
                                     float* tile) {
  const int64_t lanes = num_lanes(slice.width);
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = 0; i < slice.num_runs; ++i) {
      const Run& run = slice.runs[i];
      pack_columns(rows.row<T>(r) + run.first, run.count, run.offset, r, lanes, tile);
    }
    pack_columns(nullptr, lanes * kLaneValues - slice.width, slice.width, r, lanes, tile);
  }
}

#else

template <typename T>
SPARSE_UNIFIED_TARGET void pack_rows(const StoredRows& rows, int64_t num_rows, const Slice& slice,
                                     float* tile) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = 0; i < slice.num_runs; ++i) {
      const Run& run = slice.runs[i];
      widen_row(rows.row<T>(r) + run.first, run.count, tile + r * slice.width + run.offset);
    }
  }
}

#endif

// The columns of a slice of num_rows rows: where they lie, or at `scratch` [kTileRows][lanes].
inline WeightTile weight_tile(DType dtype, const StoredRows& rows, int64_t num_rows,
                              const Slice& slice, float* scratch) {
  const int64_t lanes = num_lanes(slice.width);
  if (dtype == DType::kFloat32 && slice.num_runs == 1) {
    const int64_t first = slice.runs[0].first;
    return {rows.row<float>(0) + first, rows.even.stride, rows.row<float>(1) + first,
            rows.odd.stride, lanes};
  }
  dispatch_storage(dtype, [&]<typename T>(T) { pack_rows<T>(rows, num_rows, slice, scratch); });
  return {scratch, 2 * lanes, scratch + lanes, 2 * lanes, lanes};
}

// Sums of a tile of weight rows and a panel of so many halves: [row][register of tokens].
template <int64_t kRows, int64_t kHalves>
using Sums = Register[kRows][vectors_of(kHalves) * kRegistersPerVector];

#if SPARSE_UNIFIED_LEVEL == 6

// sums[r][v] = sum_k tile.row(r)[k] * panel[k][v], all 16 even and 16 odd rows.
template <int64_t kRows, int64_t kHalves>
SPARSE_UNIFIED_INLINE void dot_tile(const WeightTile& tile, const float* panel,
                                    Sums<kRows, kHalves>& sums) {
  constexpr int64_t kVectors = vectors_of(kHalves);
  static_assert(kRows == 32 && kVectors <= 2);
  constexpr int64_t kLine = 64;
  const auto* weights = reinterpret_cast<const char*>(tile.even);
  const auto* tokens = reinterpret_cast<const char*>(panel);
  zero_tile<0>();
  zero_tile<1>();
  if constexpr (kVectors == 2) {
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t k = 0; k < tile.length; k += kLanes) {
    load_tile<4>(weights, kLine);
    load_tile<6>(tokens, kLine);
    multiply_tiles<0, 4, 6>();
    load_tile<5>(weights + kTileBytes, kLine);
    multiply_tiles<1, 5, 6>();
    if constexpr (kVectors == 2) {
      load_tile<7>(tokens + kTileBytes, kLine);
      multiply_tiles<2, 4, 7>();
      multiply_tiles<3, 5, 7>();
    }
    weights += 2 * kTileBytes;
    tokens += kVectors * kTileBytes;
  }
  // Even and odd rows by turns.
  constexpr int64_t kStride = 2 * kVectors * kLine;
  store_tile<0>(&sums[0][0], kStride);
  store_tile<1>(&sums[1][0], kStride);
  if constexpr (kVectors == 2) {
    store_tile<2>(&sums[0][1], kStride);
    store_tile<3>(&sums[1][1], kStride);
  }
}

#else

// The sum and a weight times what the lanes of a register hold.
template <class Lanes>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET Lanes multiply_add(const Lanes& sum, float weight,
                                                               const Lanes& values) {
#if SPARSE_UNIFIED_LEVEL == 5
  return dot_pairs(sum, weight, values);
#else
  return sum + weight * values;
#endif
}

// sums[r][v] = sum_k tile.row(r)[k] * panel[k][v], v in whole registers and, of 16 lanes, a half
// one.
template <int64_t kRows, int64_t kHalves>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void dot_tile(const WeightTile& tile,
                                                          const float* panel,
                                                          Sums<kRows, kHalves>& sums) {
  constexpr int64_t kRegisters = vectors_of(kHalves) * kRegistersPerVector;
  constexpr int64_t kWhole = kHalves * kHalfLanes / kRegisterLanes;
  constexpr bool kHasHalf = kHalves * kHalfLanes % kRegisterLanes != 0;
  constexpr int64_t kBlock = kSumBlock / kLaneValues;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t v = 0; v < kRegisters; ++v) sums[r][v] = Register{};
  }
  for (int64_t block = 0; block < tile.length; block += kBlock) {
    const int64_t block_end = std::min(block + kBlock, tile.length);
    Register acc[kRows][kRegisters] = {};
    HalfFloat half[kRows] = {};
    for (int64_t k = block; k < block_end; ++k) {
      const float* lanes = panel + k * kRegisters * kRegisterLanes;
      Register values[kRegisters];
      for (int64_t v = 0; v < kWhole; ++v) {
        std::memcpy(&values[v], lanes + v * kRegisterLanes, sizeof(Register));
      }
      HalfFloat half_values;
      if constexpr (kHasHalf) {
        std::memcpy(&half_values, lanes + kWhole * kRegisterLanes, sizeof(HalfFloat));
      }
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const float weight = tile.row(r)[k];
        for (int64_t v = 0; v < kWhole; ++v) acc[r][v] = multiply_add(acc[r][v], weight, values[v]);
        if constexpr (kHasHalf) half[r] = multiply_add(half[r], weight, half_values);
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      if constexpr (kHasHalf) std::memcpy(&acc[r][kWhole], &half[r], sizeof(HalfFloat));
      for (int64_t v = 0; v < kRegisters; ++v) {
        sums[r][v] = block == 0 ? acc[r][v] : sums[r][v] + acc[r][v];
      }
    }
  }
}

#endif

// The sums of one row for vector v of its tokens.
template <int64_t kRegisters>
SPARSE_UNIFIED_INLINE Float vector_of(const Register (&sums)[kRegisters], int64_t v) {
  Float value;
  std::memcpy(&value, &sums[v * kRegistersPerVector], sizeof(value));
  return value;
}

// Neuron j of a panel's hidden activations = value, for vector v of its tokens. Of a pair the even
// one comes first.
template <int64_t kVectors>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void store_hidden(float* hidden, int64_t j, int64_t v,
                                                              const Float& value) {
  float* lane = hidden + lane_offset<kVectors>(j / kLaneValues, v);
  if constexpr (kIsPairs) {
    const UInt bits = narrow(BFloat16{}, value);
    store(lane, bit_cast<Float>(j % 2 == 0 ? bits : bit_cast<UInt>(load(lane)) | bits << 16));
  } else {
    store(lane, value);
  }
}

// hidden[first + j] = silu(gate_j x) * up_j x for `pairs` neurons of one panel; gate rows even, up
// rows odd.
template <int64_t kPairs, int64_t kHalves>
SPARSE_UNIFIED_TARGET void hidden_tile(int64_t pairs, const WeightTile& tile, const float* panel,
                                       int64_t first, float* hidden) {
  constexpr int64_t kVectors = vectors_of(kHalves);
  Sums<2 * kPairs, kHalves> sums;
  dot_tile<2 * kPairs, kHalves>(tile, panel, sums);
  for (int64_t pair = 0; pair < (kIsAmx ? pairs : kPairs); ++pair) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const Float gate = vector_of(sums[2 * pair], v);
      const Float up = vector_of(sums[2 * pair + 1], v);
      store_hidden<kVectors>(hidden, first + pair, v, gate * sigmoid(gate) * up);
    }
  }
}

// hidden_tile for 1 to kTilePairs neurons.
template <int64_t kHalves, int64_t kPairs = kTilePairs>
SPARSE_UNIFIED_TARGET void run_hidden_tile(int64_t pairs, const WeightTile& tile,
                                           const float* panel, int64_t first, float* hidden) {
  if constexpr (kPairs > 1 && !kIsAmx) {
    if (pairs < kPairs) {
      return run_hidden_tile<kHalves, kPairs - 1>(pairs, tile, panel, first, hidden);
    }
  }
  hidden_tile<kPairs, kHalves>(pairs, tile, panel, first, hidden);
}

// y[r] = sum_j tile.row(r)[j] * hidden[j] for kRows rows of one panel, from row kDone on. When the
// first part is in hand, the lines that the results go to are asked for.
template <int64_t kRows, int64_t kHalves, int64_t kDone = 0, class Sink>
SPARSE_UNIFIED_INLINE SPARSE_UNIFIED_TARGET void dot_rows(const WeightTile& tile,
                                                          const float* hidden, const Sink& sink,
                                                          int64_t d, Sums<kOutputs, kHalves>& y) {
  constexpr int64_t kPart = std::min(kRows - kDone, kOutputPart);
  const WeightTile part{tile.even + kDone / 2 * tile.even_stride, tile.even_stride,
                        tile.odd + kDone / 2 * tile.odd_stride, tile.odd_stride, tile.length};
  if constexpr (kPart == kOutputs) {
    dot_tile<kPart, kHalves>(part, hidden, y);
  } else {
    Sums<kPart, kHalves> sums;
    dot_tile<kPart, kHalves>(part, hidden, sums);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kPart; ++r) {
      for (int64_t v = 0; v < vectors_of(kHalves) * kRegistersPerVector; ++v)
        y[kDone + r][v] = sums[r][v];
    }
  }
  if constexpr (kDone == 0) sink.prefetch(d);
  if constexpr (kDone + kPart < kRows) {
    dot_rows<kRows, kHalves, kDone + kPart>(tile, hidden, sink, d, y);
  }
}

// Outputs [d, d + outputs) of one panel, y[d] = sum_j down[d][j] * hidden[j], to the sink.
template <int64_t kRows, int64_t kHalves, class Sink>
SPARSE_UNIFIED_TARGET void output_tile(int64_t outputs, const WeightTile& tile, const float* hidden,
                                       const Sink& sink, int64_t d) {
  Sums<kOutputs, kHalves> y;
  for (int64_t r = kRows; r < kOutputs; ++r) {
    for (int64_t v = 0; v < vectors_of(kHalves) * kRegistersPerVector; ++v) y[r][v] = Register{};
  }
  dot_rows<kRows, kHalves>(tile, hidden, sink, d, y);
  sink.template put<kHalves>(d, kIsAmx ? outputs : kRows, y);
}

// Size of the next tile of outputs when `rest` remain: whole lines, then what is left in a few
// sizes, which is seldom anything.
inline int64_t outputs_size(int64_t rest) {
  if (kIsAmx) return std::min(rest, kOutputs);
  return rest >= kOutputs ? kOutputs : rest >= 4 ? 4 : 1;
}

// output_tile for outputs_size outputs.
template <int64_t kHalves, class Sink>
SPARSE_UNIFIED_TARGET void run_output_tile(int64_t outputs, const WeightTile& tile,
                                           const float* hidden, const Sink& sink, int64_t d) {
  if (kIsAmx || outputs == kOutputs) {
    return output_tile<kOutputs, kHalves>(outputs, tile, hidden, sink, d);
  }
  if constexpr (!kIsAmx) {
    if (outputs == 4) return output_tile<4, kHalves>(outputs, tile, hidden, sink, d);
    return output_tile<1, kHalves>(outputs, tile, hidden, sink, d);
  }
}

// Asks for part `part` of `num_parts` of the columns of a slice of num_rows rows, for a tile to
// come.
template <typename T>
void prefetch_rows(const StoredRows& rows, int64_t num_rows, const Slice& slice, int64_t part,
                   int64_t num_parts) {
  constexpr int64_t kLineValues = 64 / sizeof(T);
  for (int64_t r = num_rows * part / num_parts; r < num_rows * (part + 1) / num_parts; ++r) {
    for (int64_t i = 0; i < slice.num_runs; ++i) {
      const T* values = rows.row<T>(r) + slice.runs[i].first;
      for (int64_t k = 0; k < slice.runs[i].count; k += kLineValues) {
        __builtin_prefetch(values + k);
      }
    }
  }
}

struct FfnWeights {
  DType dtype;
  Matrix gate_proj;  // [width, D]
  Matrix up_proj;    // [width, D]
  Matrix down_proj;  // [D, width]
};

// Weight rows that make a tile: `size` neurons or outputs from the `first` of those to be made.
struct TileRows {
  StoredRows rows;
  int64_t num_rows;
  int64_t first;
  int64_t size;
};

// The loop over weights and panels. next(tile) brings the rows of one tile after another, false
// behind the last; run(panel, weights, tile) makes what they yield for one panel. Tiles stay in the
// cache while every panel passes by, and those to come are asked for meanwhile; AMX is faster than
// memory, so that several share a panel while it is near.
template <class Next, class RunTile>
void run_tiles(DType dtype, const Slice& columns, int64_t num_panels, float* scratch, Next next,
               const RunTile& run) {
  TileRows tiles[kTileGroup];
  TileRows coming[kTileGroup];
  const auto fill = [&](TileRows* group) {
    int64_t n = 0;
    while (n < kTileGroup && next(group[n])) ++n;
    return n;
  };
  for (int64_t n = fill(tiles), num_coming; n > 0; n = num_coming) {
    WeightTile weights[kTileGroup];
    for (int64_t i = 0; i < n; ++i) {
      weights[i] = weight_tile(dtype, tiles[i].rows, tiles[i].num_rows, columns,
                               scratch + i * kTileRows * num_lanes(columns.width));
    }
    num_coming = fill(coming);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      for (int64_t i = 0; i < num_coming; ++i) {
        dispatch_storage(dtype, [&]<typename T>(T) {
          prefetch_rows<T>(coming[i].rows, coming[i].num_rows, columns, panel, num_panels);
        });
      }
      for (int64_t i = 0; i < n; ++i) run(panel, weights[i], tiles[i]);
    }
    std::copy_n(coming, num_coming, tiles);
  }
}

// The panels x of `count` rows through the neurons of a slice; sinks[i] takes the outputs of panel
// i. A panel of `hidden` has num_lanes(slice.width) lanes; `scratch` is for tiles of weights.
template <class Sink>
void run_slice(const FfnWeights& weights, const Slice& slice, int64_t count, const float* x,
               float* hidden, float* scratch, const Sink* sinks) {
  const DType dtype = weights.dtype;
  const int64_t hidden_size = weights.gate_proj.columns;
  const int64_t x_lanes = num_lanes(hidden_size);
  const int64_t hidden_lanes = num_lanes(slice.width);
  const int64_t num_panels = (count + kPanelRows - 1) / kPanelRows;

  if constexpr (kIsAmx) {
    for (int64_t row = 0; row < count; row += kPanelRows) {
      const int64_t vectors = panel_vectors(count - row);
      float* last = hidden + row * hidden_lanes + (hidden_lanes - kLaneMultiple) * vectors * kLanes;
      if (hidden_lanes > 0) std::fill_n(last, kLaneMultiple * vectors * kLanes, 0.0f);
    }
  }

  int64_t i = 0;  // the run and the neuron of it
  int64_t j = 0;
  const auto next_neurons = [&](TileRows& tile) {
    if (i == slice.num_runs || slice.width == 0) return false;
    const Run& run = slice.runs[i];
    const int64_t pairs = tile_size(run.count - j, kTilePairs);
    tile = {{matrix_from(weights.gate_proj, dtype, run.first + j, 0),
             matrix_from(weights.up_proj, dtype, run.first + j, 0)},
            2 * pairs,
            run.offset + j,
            pairs};
    j += pairs;
    if (j == run.count) {
      ++i;
      j = 0;
    }
    return true;
  };
  const Run whole_row{0, hidden_size, 0};
  run_tiles(dtype, {&whole_row, 1, hidden_size}, num_panels, scratch, next_neurons,
            [&](int64_t panel, const WeightTile& tile, const TileRows& neurons) {
              const int64_t row = panel * kPanelRows;
              dispatch_halves(count - row, [&]<int64_t kHalves>() {
                run_hidden_tile<kHalves>(neurons.size, tile, x + row * x_lanes, neurons.first,
                                         hidden + row * hidden_lanes);
              });
            });

  int64_t d = 0;
  const auto next_outputs = [&](TileRows& tile) {
    if (d == hidden_size) return false;
    const int64_t outputs = outputs_size(hidden_size - d);
    tile = {{alternate_rows(weights.down_proj, dtype, d),
             alternate_rows(weights.down_proj, dtype, d + 1)},
            outputs,
            d,
            outputs};
    d += outputs;
    return true;
  };
  run_tiles(dtype, slice, num_panels, scratch, next_outputs,
            [&](int64_t panel, const WeightTile& tile, const TileRows& outputs) {
              const int64_t row = panel * kPanelRows;
              const float* values = hidden + row * hidden_lanes;
              dispatch_halves(count - row, [&]<int64_t kHalves>() {
                run_output_tile<kHalves>(outputs.size, tile, values, sinks[panel], outputs.first);
              });
            });
}

// Floats of scratch for tiles of weights in sums over up to `length` values.
inline int64_t tile_floats(int64_t length) { return kTileGroup * kTileRows * num_lanes(length); }

}  // namespace sparse_unified::SPARSE_UNIFIED_TILES

#endif
