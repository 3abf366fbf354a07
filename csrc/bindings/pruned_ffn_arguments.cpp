// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "bindings/context.h"
#include "bindings/pruned_ffn.h"
#include "sparse_unified/accumulate.h"

namespace sparse_unified {
namespace {

// NOTE: a constant, not a function of the thread count. With fewer tokens a GEMM costs the reading
// of its weights, and gathering them would double that: slabs are then single runs, in place.
constexpr int64_t kGatherTokens = 32;

void check_kept_blocks(const char* op, const Tensor& kept_blocks, int64_t num_blocks) {
  check_indices(op, "kept_blocks", kept_blocks, num_blocks);
  const auto* data = kept_blocks.const_data_ptr<int32_t>();
  std::vector<char> seen(static_cast<size_t>(num_blocks));
  for (int64_t i = 0; i < kept_blocks.numel(); ++i) {
    if (seen[data[i]]) {
      fail(op, "kept_blocks", "name no block twice", data[i], " again at position ", i);
    }
    seen[data[i]] = 1;
  }
}

}  // namespace

PrunedFfn::PrunedFfn(const char* op, Tensor x_in, Tensor kept_blocks_in, Tensor gate_proj_in,
                     Tensor up_proj_in, Tensor down_proj_in, int64_t block_size_in)
    : PrunedFfnSizes(check_pruned_ffn(op, x_in, kept_blocks_in, gate_proj_in, up_proj_in,
                                      down_proj_in, block_size_in)),
      scalar_type(x_in.scalar_type()),
      x(with_dense_rows(x_in)),
      kept_blocks(own_indices(kept_blocks_in)),
      gate_proj(with_dense_rows(gate_proj_in)),
      up_proj(with_dense_rows(up_proj_in)),
      down_proj(with_dense_rows(down_proj_in)),
      block_size(block_size_in) {
  check_kept_blocks(op, kept_blocks, width / block_size);
}

std::vector<KeptSlab> PrunedFfn::slabs() const {
  const auto* blocks = kept_blocks.const_data_ptr<int32_t>();
  std::vector<KeptSlab> found;
  for (int64_t i = 0; i < num_kept; ++i) {
    const int64_t first = blocks[i] * block_size;
    KeptSlab* slab = found.empty() ? nullptr : &found.back();
    const bool fits = slab != nullptr && slab->width + block_size <= kMaxSlabNeurons;
    const bool follows =
        slab != nullptr && slab->runs.back().first + slab->runs.back().count == first;
    if (!fits || (!follows && num_tokens < kGatherTokens)) {
      found.push_back({{{first, block_size, i * block_size}}, i * block_size, block_size});
      continue;
    }
    if (follows) {
      slab->runs.back().count += block_size;
    } else {
      slab->runs.push_back({first, block_size, i * block_size});
    }
    slab->width += block_size;
  }
  return found;
}

Tensor PrunedFfn::neuron_rows(const Tensor& weight, const KeptSlab& slab, Range columns,
                              char* scratch) const {
  const int64_t n = columns.count;
  if (slab.runs.size() == 1) {
    return matrix_view(at(weight, slab.runs[0].first, columns.begin), scalar_type, slab.width, n,
                       weight.stride(0));
  }
  char* target = scratch;
  const int64_t row_bytes = n * element_bytes(dtype);
  for (const KeptRun& run : slab.runs) {
    for (int64_t row = run.first; row < run.first + run.count; ++row, target += row_bytes) {
      std::memcpy(target, at(weight, row, columns.begin), static_cast<size_t>(row_bytes));
    }
  }
  return matrix_view(scratch, scalar_type, slab.width, n, n);
}

Tensor PrunedFfn::neuron_columns(const Tensor& weight, const KeptSlab& slab, Range rows,
                                 char* scratch) const {
  if (slab.runs.size() == 1) {
    return matrix_view(at(weight, rows.begin, slab.runs[0].first), scalar_type, rows.count,
                       slab.width, weight.stride(0));
  }
  char* target = scratch;
  for (int64_t row = rows.begin; row < rows.begin + rows.count; ++row) {
    for (const KeptRun& run : slab.runs) {
      const int64_t run_bytes = run.count * element_bytes(dtype);
      std::memcpy(target, at(weight, row, run.first), static_cast<size_t>(run_bytes));
      target += run_bytes;
    }
  }
  return matrix_view(scratch, scalar_type, rows.count, slab.width, slab.width);
}

void PrunedFfn::scatter_rows(const char* rows, const Tensor& weight, const KeptSlab& slab) const {
  const int64_t row_bytes = hidden_size * element_bytes(dtype);
  for (const KeptRun& run : slab.runs) {
    for (int64_t row = run.first; row < run.first + run.count; ++row, rows += row_bytes) {
      std::memcpy(at(weight, row, 0), rows, static_cast<size_t>(row_bytes));
    }
  }
}

void PrunedFfn::scatter_columns(const char* columns, const Tensor& weight,
                                const KeptSlab& slab) const {
  for (int64_t row = 0; row < hidden_size; ++row) {
    for (const KeptRun& run : slab.runs) {
      const int64_t run_bytes = run.count * element_bytes(dtype);
      std::memcpy(at(weight, row, run.first), columns, static_cast<size_t>(run_bytes));
      columns += run_bytes;
    }
  }
}

int64_t PrunedFfn::scratch_bytes(int64_t hidden) const {
  return round_to_line(hidden * std::min(kMaxSlabNeurons, kept_width) * element_bytes(dtype));
}

Tensor PrunedFfn::kept_view(const Tensor& matrix, Range tokens, int64_t offset, int64_t n) const {
  return matrix_view(at(matrix, tokens.begin, offset), scalar_type, tokens.count, n, kept_width);
}

Tensor PrunedFfn::hidden_view(const Tensor& matrix, Range tokens, Range columns) const {
  return matrix_view(at(matrix, tokens.begin, columns.begin), scalar_type, tokens.count,
                     columns.count, matrix.stride(0));
}

char* PrunedFfn::at(const Tensor& matrix, int64_t row, int64_t column) const {
  return static_cast<char*>(matrix.data_ptr()) +
         (row * matrix.stride(0) + column) * element_bytes(dtype);
}

std::vector<Range> split_range(int64_t size, int64_t largest) {
  const int64_t num_parts = (size + largest - 1) / largest;
  std::vector<Range> parts;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t begin = size * part / num_parts;
    parts.push_back({begin, size * (part + 1) / num_parts - begin});
  }
  return parts;
}

ProductSum::ProductSum(const Tensor& out, int64_t num_products, char* scratch)
    : out_(out),
      num_products_(num_products),
      sum_(reinterpret_cast<float*>(scratch)),
      partial_(scratch + round_to_line(out.size(0) * out.size(1) * 4)) {
  if (!is_direct()) std::memset(sum_, 0, static_cast<size_t>(out.size(0) * out.size(1) * 4));
}

int64_t ProductSum::scratch_bytes(int64_t n, int64_t m) {
  return round_to_line(n * m * 4) + round_to_line(n * m * 2);
}

bool ProductSum::is_direct() const {
  return num_products_ <= 1 || out_.scalar_type() == ScalarType::Float;
}

void ProductSum::add(const Tensor& a, const Tensor& b) {
  const bool is_first = num_added_++ == 0;
  if (is_direct()) return is_first ? matmul_out(out_, a, b) : matmul_add(out_, a, b);
  const int64_t n = out_.size(0);
  const int64_t m = out_.size(1);
  const DType dtype = dtype_of(out_);
  matmul_out(matrix_view(partial_, out_.scalar_type(), n, m, m), a, b);
  accumulate_cpu({dtype, partial_, sum_, n * m});
  if (num_added_ < num_products_) return;
  for (int64_t row = 0; row < n; ++row) {
    char* out = static_cast<char*>(out_.data_ptr()) + row * out_.stride(0) * element_bytes(dtype);
    round_cpu({dtype, sum_ + row * m, out, m});
  }
}

}  // namespace sparse_unified
