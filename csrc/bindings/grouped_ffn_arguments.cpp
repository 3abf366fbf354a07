// SPDX-License-Identifier: Apache-2.0
#include "bindings/context.h"
#include "bindings/grouped_ffn.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/instruction_set.h"
#include "sparse_unified/permute.h"

namespace sparse_unified {

GroupedFfn::GroupedFfn(const char* op, Tensor x_in, Tensor row_token_in, Tensor expert_offsets_in,
                       Tensor gate_proj_in, Tensor up_proj_in, Tensor down_proj_in)
    : GroupedFfnSizes(check_grouped_ffn(op, x_in, row_token_in, expert_offsets_in, gate_proj_in,
                                        up_proj_in, down_proj_in)),
      scalar_type(x_in.scalar_type()),
      x(with_dense_rows(x_in)),
      row_token(own_indices(row_token_in)),
      expert_offsets(own_indices(expert_offsets_in)),
      gate_proj(with_even_steps(with_dense_rows, gate_proj_in, up_proj_in)),
      up_proj(with_even_steps(with_dense_rows, up_proj_in, gate_proj_in)),
      down_proj(with_dense_rows(down_proj_in)) {
  check_indices(op, "row_token", row_token, x.size(0));
  const auto* offsets = expert_offsets.const_data_ptr<int32_t>();
  check(offsets[0] == 0 && offsets[num_experts] == num_rows, op, "expert_offsets",
        "start at 0 and end at the number of rows " + std::to_string(num_rows), offsets[0], " and ",
        offsets[num_experts]);
  for (int64_t e = 0; e < num_experts; ++e) {
    check(offsets[e] <= offsets[e + 1], op, "expert_offsets", "not decrease", offsets[e + 1],
          " after ", offsets[e]);
  }
}

std::vector<ExpertRows> GroupedFfn::split(int64_t max_rows, int64_t multiple) const {
  const auto* offsets = expert_offsets.const_data_ptr<int32_t>();
  std::vector<ExpertRows> parts;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t end = offsets[expert + 1];
    const int64_t count = end - offsets[expert];
    const int64_t num_parts = (count + max_rows - 1) / max_rows;
    // Equal parts: a GEMM of a few left-over rows costs almost as much as one of many.
    for (int64_t part = 0, begin = offsets[expert]; part < num_parts; ++part) {
      const int64_t share = (end - begin + num_parts - part - 1) / (num_parts - part);
      const int64_t rounded = (share + multiple - 1) / multiple * multiple;
      parts.push_back({expert, begin, std::min(begin + rounded, end)});
      begin = parts.back().end;
    }
  }
  return parts;
}

bool GroupedFfn::has_kernel() const { return prefers_ffn_cpu(dtype); }

GroupedFfnParams GroupedFfn::kernel_params() const {
  return {dtype,
          matrix_of(x),
          matrix_of(gate_proj),
          matrix_of(up_proj),
          matrix_of(down_proj),
          expert_width,
          spacing_of(gate_proj, down_proj)};
}

void GroupedFfn::gather(const ExpertRows& rows, void* out) const {
  gather_rows_cpu({.x = bytes_of(x),
                   .row_token = row_token.const_data_ptr<int32_t>() + rows.begin,
                   .token_rows = nullptr,
                   .y = out,
                   .num_rows = rows.count(),
                   .top_k = 0});
}

Tensor GroupedFfn::expert_rows(const Tensor& weight, int64_t expert) const {
  const int64_t stride = matrix_of(weight).stride;
  const int64_t step = weight.dim() == 3 ? expert_step(weight) : expert_width;
  return matrix_view(row(weight, expert * step, stride), scalar_type, expert_width, hidden_size,
                     stride);
}

Tensor GroupedFfn::expert_columns(const Tensor& weight, int64_t expert) const {
  const int64_t stride = matrix_of(weight).stride;
  const int64_t first = weight.dim() == 3 ? expert * expert_step(weight) * stride  // elements
                                          : expert * expert_width;
  return matrix_view(row(weight, first, 1), scalar_type, hidden_size, expert_width, stride);
}

Tensor GroupedFfn::matrix(void* data, int64_t n, int64_t columns) const {
  return matrix_view(data, scalar_type, n, columns, columns);
}

void* GroupedFfn::row(const Tensor& matrix, int64_t row, int64_t columns) const {
  return static_cast<char*>(matrix.data_ptr()) + row * columns * element_bytes(dtype);
}

int64_t GroupedFfn::matrix_bytes(int64_t n, int64_t columns) const {
  return round_to_line(n * columns * element_bytes(dtype));
}

}  // namespace sparse_unified
