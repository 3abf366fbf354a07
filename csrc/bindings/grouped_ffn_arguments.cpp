// SPDX-License-Identifier: Apache-2.0
#include "bindings/arguments.h"
#include "bindings/grouped_ffn.h"
#include "sparse_unified/permute.h"

namespace sparse_unified {

GroupedFfn::GroupedFfn(const char* op, Tensor x_in, Tensor row_token_in, Tensor expert_offsets_in,
                       Tensor gate_proj_in, Tensor up_proj_in, Tensor down_proj_in)
    : x(x_in),
      row_token(row_token_in),
      expert_offsets(expert_offsets_in),
      gate_proj(gate_proj_in),
      up_proj(up_proj_in),
      down_proj(down_proj_in) {
  const GroupedFfnSizes sizes =
      check_grouped_ffn(op, x, row_token, expert_offsets, gate_proj, up_proj, down_proj);
  dtype = sizes.dtype;
  scalar_type = x.scalar_type();
  num_rows = sizes.num_rows;
  hidden_size = sizes.hidden_size;
  num_experts = sizes.num_experts;
  expert_width = sizes.expert_width;
  row_token = as_contiguous(row_token);
  check_indices(op, "row_token", row_token, x.size(0));
  expert_offsets = as_contiguous(expert_offsets);
  const auto* offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
  check(offsets[0] == 0 && offsets[num_experts] == num_rows, op, "expert_offsets",
        "start at 0 and end at the number of rows " + std::to_string(num_rows), offsets[0], " and ",
        offsets[num_experts]);
  for (int64_t e = 0; e < num_experts; ++e) {
    check(offsets[e] <= offsets[e + 1], op, "expert_offsets", "not decrease", offsets[e + 1],
          " after ", offsets[e]);
  }
  x = with_dense_rows(x);
  gate_proj = with_dense_rows(gate_proj);
  up_proj = with_dense_rows(up_proj);
  down_proj = with_dense_rows(down_proj);
}

std::vector<ExpertRows> GroupedFfn::split(int64_t max_rows, int64_t multiple) const {
  const auto* offsets = static_cast<const int32_t*>(expert_offsets.const_data_ptr());
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

bool GroupedFfn::has_kernel() const {
  return dtype == DType::kFloat32 && grouped_ffn_cpu_supported();
}

GroupedFfnParams GroupedFfn::kernel_params() const {
  GroupedFfnParams params{};
  params.x = static_cast<const float*>(x.const_data_ptr());
  params.x_stride = x.stride(0);
  params.gate_proj = static_cast<const float*>(gate_proj.const_data_ptr());
  params.gate_stride = gate_proj.stride(0);
  params.up_proj = static_cast<const float*>(up_proj.const_data_ptr());
  params.up_stride = up_proj.stride(0);
  params.down_proj = static_cast<const float*>(down_proj.const_data_ptr());
  params.down_stride = down_proj.stride(0);
  params.hidden_size = hidden_size;
  params.expert_width = expert_width;
  return params;
}

void GroupedFfn::gather(const ExpertRows& rows, void* out) const {
  GatherRowsParams params{};
  params.x = x.const_data_ptr();
  params.x_stride_bytes = x.stride(0) * element_bytes(dtype);
  params.row_token = static_cast<const int32_t*>(row_token.const_data_ptr()) + rows.begin;
  params.y = out;
  params.row_bytes = hidden_size * element_bytes(dtype);
  params.num_rows = rows.count();
  gather_rows_cpu(params);
}

Tensor GroupedFfn::expert_rows(const Tensor& weight, int64_t expert) const {
  const int64_t stride = weight.stride(0);
  char* data = static_cast<char*>(weight.data_ptr());
  return matrix_view(data + expert * expert_width * stride * element_bytes(dtype), scalar_type,
                     expert_width, hidden_size, stride);
}

Tensor GroupedFfn::expert_rows_t(const Tensor& weight, int64_t expert) const {
  const int64_t stride = weight.stride(0);
  char* data = static_cast<char*>(weight.data_ptr());
  return transposed_view(data + expert * expert_width * stride * element_bytes(dtype), scalar_type,
                         expert_width, hidden_size, stride);
}

Tensor GroupedFfn::expert_columns(const Tensor& weight, int64_t expert) const {
  char* data = static_cast<char*>(weight.data_ptr());
  return matrix_view(data + expert * expert_width * element_bytes(dtype), scalar_type, hidden_size,
                     expert_width, weight.stride(0));
}

Tensor GroupedFfn::expert_columns_t(const Tensor& weight, int64_t expert) const {
  char* data = static_cast<char*>(weight.data_ptr());
  return transposed_view(data + expert * expert_width * element_bytes(dtype), scalar_type,
                         hidden_size, expert_width, weight.stride(0));
}

Tensor GroupedFfn::matrix(void* data, int64_t n, int64_t columns) const {
  return matrix_view(data, scalar_type, n, columns, columns);
}

Tensor GroupedFfn::matrix_t(void* data, int64_t n, int64_t columns) const {
  return transposed_view(data, scalar_type, n, columns, columns);
}

void* GroupedFfn::row(const Tensor& matrix, int64_t row, int64_t columns) const {
  return static_cast<char*>(matrix.data_ptr()) + row * columns * element_bytes(dtype);
}

int64_t GroupedFfn::matrix_bytes(int64_t n, int64_t columns) const {
  return round_to_line(n * columns * element_bytes(dtype));
}

}  // namespace sparse_unified
