// SPDX-License-Identifier: Apache-2.0
// Problems for the CUDA kernels of grouped_ffn in the emulator: arrays with everything that the
// kernels should write or must not use filled with NaN, and the results by two scalar computations:
// in double, and with the roundings that torch makes in the storage type.
#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "emulation/testing.h"
#include "sparse_unified/cuda/grouped_ffn.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified::test {

constexpr DeviceInfo kHopper{90, 132, 227 * 1024, 228 * 1024};

struct FfnCase {
  const char* name;
  int64_t num_tokens;
  int64_t hidden_size;
  int64_t expert_width;
  std::vector<int32_t> group_rows;  // rows of each group
  bool has_maps = true;             // false: one group, row r is token r, both maps null
  std::vector<int32_t> kept_blocks = {};
  int64_t block_size = 0;
  int64_t num_blocks = 0;
  int64_t padding = 0;  // elements between the rows of inputs, a multiple of 8
};

// Value of T nearest to x, ties to even.
template <typename T>
double round_to(double x) {
  const int mantissa_bits = sizeof(T) == 2 && Traits<T>::kDType == DType::kBFloat16 ? 8 : 11;
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int scale = mantissa_bits - exponent;
  return std::ldexp(std::nearbyint(std::ldexp(x, scale)), -scale);
}

inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

template <typename T>
void fill_nan(Array<T>& array) {
  std::memset(array.get(), 0xff, static_cast<size_t>(array.size()) * sizeof(T));
}

// Matrix whose rows lie `stride` elements apart, NaN between them. Rows start at 16 bytes.
template <typename T>
struct Matrix {
  int64_t rows;
  int64_t columns;
  int64_t stride;
  Array<T> data;

  Matrix(int64_t rows, int64_t columns, int64_t padding = 0)
      : rows(rows), columns(columns), stride(columns + padding), data(size()) {
    fill_nan(data);
  }
  Matrix(int64_t rows, int64_t columns, int64_t padding, double scale, Random& random)
      : Matrix(rows, columns, padding) {
    Array<T> values(rows * columns);
    fill_normal(values, scale, random);
    for (int64_t i = 0; i < rows * columns; ++i) {
      data[i / columns * stride + i % columns] = values[i];
    }
  }
  T* get() { return data.get(); }
  double operator()(int64_t row, int64_t column) {
    return Traits<T>::value(data[row * stride + column]);
  }

 private:
  int64_t size() const { return rows == 0 ? 0 : (rows - 1) * stride + columns; }
};

using Values = std::vector<double>;

template <typename T>
struct FfnData {
  FfnCase shape;
  int64_t num_rows = 0;
  int64_t width;  // I
  std::vector<int32_t> offsets{0};
  std::vector<int32_t> row_token;
  std::vector<int32_t> row_group;
  Matrix<T> x, gate_proj, up_proj, down_proj, grad_y;

  FfnData(const FfnCase& shape, Random& random)
      : shape(shape),
        num_rows(count_rows(shape)),
        width(shape.kept_blocks.empty()
                  ? static_cast<int64_t>(shape.group_rows.size()) * shape.expert_width
                  : shape.num_blocks * shape.block_size),
        x(shape.num_tokens, shape.hidden_size, shape.padding, 1.0, random),
        gate_proj(width, shape.hidden_size, shape.padding, scale(), random),
        up_proj(width, shape.hidden_size, shape.padding, scale(), random),
        down_proj(shape.hidden_size, width, shape.padding, 2 * scale(), random),
        grad_y(num_rows, shape.hidden_size, 0, 1.0, random) {
    for (size_t group = 0; group < shape.group_rows.size(); ++group) {
      offsets.push_back(offsets.back() + shape.group_rows[group]);
      row_group.insert(row_group.end(), static_cast<size_t>(shape.group_rows[group]),
                       static_cast<int32_t>(group));
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const auto drawn = static_cast<int32_t>(random() % static_cast<uint32_t>(shape.num_tokens));
      row_token.push_back(shape.has_maps ? drawn : static_cast<int32_t>(row));
    }
  }

  // Large enough for gate and up of about 2, outputs of about 1.
  double scale() const { return 2.0 / std::sqrt(static_cast<double>(shape.hidden_size)); }

  static int64_t count_rows(const FfnCase& shape) {
    int64_t count = 0;
    for (const int32_t rows : shape.group_rows) count += rows;
    return count;
  }

  // Row of gate_proj of neuron i of a group.
  int64_t neuron(int64_t group, int64_t i) const {
    const int64_t at = group * shape.expert_width + i;
    if (shape.kept_blocks.empty()) return at;
    return shape.kept_blocks[static_cast<size_t>(at / shape.block_size)] * shape.block_size +
           at % shape.block_size;
  }

  GroupedFfnCudaParams params() {
    return {.dtype = Traits<T>::kDType,
            .x = x.get(),
            .x_stride = x.stride,
            .row_token = shape.has_maps ? row_token.data() : nullptr,
            .expert_offsets = shape.has_maps ? offsets.data() : nullptr,
            .gate_proj = gate_proj.get(),
            .gate_stride = gate_proj.stride,
            .up_proj = up_proj.get(),
            .up_stride = up_proj.stride,
            .down_proj = down_proj.get(),
            .down_stride = down_proj.stride,
            .blocks = {shape.kept_blocks.empty() ? nullptr : shape.kept_blocks.data(),
                       static_cast<int64_t>(shape.kept_blocks.size()), shape.block_size,
                       shape.num_blocks},
            .num_tokens = shape.num_tokens,
            .num_rows = num_rows,
            .hidden_size = shape.hidden_size,
            .num_experts = static_cast<int64_t>(shape.group_rows.size()),
            .expert_width = shape.expert_width,
            .gate_rows = nullptr,
            .up_rows = nullptr,
            .y = nullptr};
  }
};

// Everything that forward and backward compute; rounded where `round` says so.
struct FfnResults {
  Values gate, up, hidden, y, grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj;
};

// As torch would in T when kRounded, in double otherwise. Weight gradients of neurons outside of
// the kept blocks stay NaN.
template <bool kRounded, typename T>
FfnResults reference(FfnData<T>& data) {
  const auto round = [](double value) { return kRounded ? round_to<T>(value) : value; };
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  const int64_t h = data.shape.expert_width;
  const int64_t d = data.shape.hidden_size;
  const int64_t r = data.num_rows;
  FfnResults out;
  for (Values* values : {&out.gate, &out.up, &out.hidden}) values->resize(at(r * h));
  for (Values* values : {&out.y, &out.grad_rows}) values->resize(at(r * d));
  for (Values* values : {&out.grad_gate_proj, &out.grad_up_proj, &out.grad_down_proj}) {
    values->resize(at(data.width * d), std::nan(""));
  }
  Values grad_gate(at(r * h)), grad_up(at(r * h));
  for (int64_t row = 0; row < r; ++row) {
    const int64_t group = data.row_group[at(row)];
    const int64_t token = data.row_token[at(row)];
    for (int64_t i = 0; i < h; ++i) {
      const int64_t neuron = data.neuron(group, i);
      double gate = 0, up = 0, grad_hidden = 0;
      for (int64_t k = 0; k < d; ++k) {
        gate += data.x(token, k) * data.gate_proj(neuron, k);
        up += data.x(token, k) * data.up_proj(neuron, k);
        grad_hidden += data.grad_y(row, k) * data.down_proj(k, neuron);
      }
      gate = round(gate);
      up = round(up);
      grad_hidden = round(grad_hidden);
      const double s = sigmoid(gate);
      const double silu = round(gate * s);
      out.gate[at(row * h + i)] = gate;
      out.up[at(row * h + i)] = up;
      out.hidden[at(row * h + i)] = round(silu * up);
      grad_gate[at(row * h + i)] = round(round(grad_hidden * up) * s * (1 + gate * (1 - s)));
      grad_up[at(row * h + i)] = round(grad_hidden * silu);
    }
    for (int64_t k = 0; k < d; ++k) {
      double y = 0, from_gate = 0, from_up = 0;
      for (int64_t i = 0; i < h; ++i) {
        const int64_t neuron = data.neuron(group, i);
        y += out.hidden[at(row * h + i)] * data.down_proj(k, neuron);
        from_gate += grad_gate[at(row * h + i)] * data.gate_proj(neuron, k);
        from_up += grad_up[at(row * h + i)] * data.up_proj(neuron, k);
      }
      out.y[at(row * d + k)] = round(y);
      out.grad_rows[at(row * d + k)] = round(round(from_gate) + round(from_up));
    }
  }
  for (int64_t group = 0; group + 1 < static_cast<int64_t>(data.offsets.size()); ++group) {
    for (int64_t i = 0; i < h; ++i) {
      const int64_t neuron = data.neuron(group, i);
      for (int64_t k = 0; k < d; ++k) {
        double gate = 0, up = 0, down = 0;
        for (int64_t row = data.offsets[at(group)]; row < data.offsets[at(group + 1)]; ++row) {
          const double x = data.x(data.row_token[at(row)], k);
          gate += grad_gate[at(row * h + i)] * x;
          up += grad_up[at(row * h + i)] * x;
          down += data.grad_y(row, k) * out.hidden[at(row * h + i)];
        }
        out.grad_gate_proj[at(neuron * d + k)] = round(gate);
        out.grad_up_proj[at(neuron * d + k)] = round(up);
        out.grad_down_proj[at(k * data.width + neuron)] = round(down);
      }
    }
  }
  return out;
}

// max|out - exact| <= 2 * max|torch - exact| + 1e-5; where `exact` is NaN, out must be untouched.
template <typename T>
void check_as_good_as_torch(const std::string& what, Array<T>& out, const Values& exact,
                            const Values& torch) {
  double tolerance = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (!std::isnan(exact[i])) tolerance = std::fmax(tolerance, std::abs(torch[i] - exact[i]));
  }
  tolerance = 2 * tolerance + 1e-5;
  check_equal((what + ", size").c_str(), 0, static_cast<double>(out.size()),
              static_cast<double>(exact.size()));
  for (int64_t i = 0; i < out.size(); ++i) {
    const double value = Traits<T>::value(out[i]);
    const double expected = exact[static_cast<size_t>(i)];
    if (std::isnan(expected)) {
      check_equal((what + ", untouched").c_str(), i, value, expected);
    } else {
      check_close(what.c_str(), i, value, expected, tolerance);
    }
  }
}

template <typename T>
void check_same_bits(const std::string& what, Array<T>& out, Array<T>& expected) {
  for (int64_t i = 0; i < out.size(); ++i) {
    check_equal(what.c_str(), i, out[i].bits, expected[i].bits);
  }
}

// Shapes with tails of 8 in every dimension. Small builds leave out those with most tiles.
inline std::vector<FfnCase> ffn_cases() {
  std::vector<FfnCase> cases{
      {.name = "ragged experts, some empty, strided weights",
       .num_tokens = 60,
       .hidden_size = 72,
       .expert_width = 40,
       .group_rows = {0, 1, 37, 130, 0, 64, 0},
       .padding = 8},
      {.name = "every token on every expert",
       .num_tokens = 5,
       .hidden_size = 8,
       .expert_width = 8,
       .group_rows = {5, 5, 5}},
      {.name = "more experts than lanes",
       .num_tokens = 9,
       .hidden_size = 16,
       .expert_width = 8,
       .group_rows = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0,
                      1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 0, 0, 0, 2, 3, 0, 1, 2, 3, 0}},
      {.name = "kept blocks, one group of all rows",
       .num_tokens = 70,
       .hidden_size = 40,
       .expert_width = 4 * 48,
       .group_rows = {70},
       .has_maps = false,
       .kept_blocks = {4, 0, 3, 1},
       .block_size = 48,
       .num_blocks = 6,
       .padding = 16},
      {.name = "kept blocks shared out to groups that end within one",
       .num_tokens = 30,
       .hidden_size = 24,
       .expert_width = 24,
       .group_rows = {20, 33},
       .kept_blocks = {5, 2, 0},
       .block_size = 16,
       .num_blocks = 7},
      {.name = "a width in its own order without maps",
       .num_tokens = 33,
       .hidden_size = 48,
       .expert_width = 104,
       .group_rows = {33},
       .has_maps = false},
      {.name = "no rows",
       .num_tokens = 4,
       .hidden_size = 16,
       .expert_width = 16,
       .group_rows = {0, 0}},
  };
  if (!emulation::kIsSmall) {
    cases.push_back({.name = "an expert width of BAGEL",
                     .num_tokens = 40,
                     .hidden_size = 72,
                     .expert_width = 592,
                     .group_rows = {3, 40}});
    cases.push_back({.name = "all rows on one expert",
                     .num_tokens = 300,
                     .hidden_size = 264,
                     .expert_width = 136,
                     .group_rows = {0, 300, 0}});
    cases.push_back({.name = "more tiles of rows than one band of the raster",
                     .num_tokens = 20,
                     .hidden_size = 136,
                     .expert_width = 72,
                     .group_rows = {3, 17 * 64 + 5}});
  }
  return cases;
}

// Runs the tests; what a kernel must not do is a failure like others.
template <class Tests>
int run_tests(const char* name, const Tests& tests) {
  try {
    tests();
  } catch (const emulation::Error& error) {
    fail(error.what(), 0, 0, 0);
  }
  return finish(name);
}

inline void set_override(const std::string& text) {
  setenv(kGroupedFfnOverrideVariable, text.c_str(), 1);
}

// The cases of ffn_cases() that tests of one property take.
constexpr size_t kRaggedCase = 0;
constexpr size_t kKeptBlocksCase = 3;
constexpr size_t kNoRowsCase = 6;

// Overrides that run every phase on one tile.
inline std::vector<std::string> tile_overrides() {
  std::vector<std::string> overrides;
  for (const GroupedFfnTile& tile : kGroupedFfnTiles) {
    overrides.push_back("family=sm80,all=" + std::to_string(tile.m) + "x" + std::to_string(tile.n) +
                        "x" + std::to_string(tile.k) + "x" + std::to_string(tile.num_stages));
  }
  return overrides;
}

}  // namespace sparse_unified::test
