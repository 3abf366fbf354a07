// SPDX-License-Identifier: Apache-2.0
// The checked arguments of grouped_ffn and grouped_ffn_combine on the CPU, shared by forward and
// backward.
#pragma once

#include <vector>

#include "bindings/arguments.h"
#include "sparse_unified/grouped_ffn.h"

namespace sparse_unified {

// Rows [begin, end) of y, all of one expert.
struct ExpertRows {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t count() const { return end - begin; }
};

struct GroupedFfn : GroupedFfnSizes {
  // Checks the arguments in order; `op` names the caller in the messages.
  GroupedFfn(const char* op, Tensor x, Tensor row_token, Tensor expert_offsets, Tensor gate_proj,
             Tensor up_proj, Tensor down_proj);

  // Every non-empty expert in parts of at most `max_rows` rows, all but its last a multiple of
  // `multiple`.
  std::vector<ExpertRows> split(int64_t max_rows, int64_t multiple = 1) const;

  // Whether the kernel of csrc/cpu takes these arguments, and its view of them.
  bool has_kernel() const;
  GroupedFfnParams kernel_params() const;

  // out [n, D] = x[row_token[begin, end)].
  void gather(const ExpertRows& rows, void* out) const;

  // Views of one expert's weights: rows of gate_proj / up_proj, columns of down_proj.
  Tensor expert_rows(const Tensor& weight, int64_t expert) const;     // [h, D]
  Tensor expert_columns(const Tensor& weight, int64_t expert) const;  // [D, h]

  // Contiguous [n, columns] matrix at `data`.
  Tensor matrix(void* data, int64_t n, int64_t columns) const;

  // First byte of row `row` of a contiguous matrix of `columns` columns.
  void* row(const Tensor& matrix, int64_t row, int64_t columns) const;

  // Bytes of an [n, columns] matrix, rounded up to a cache line.
  int64_t matrix_bytes(int64_t n, int64_t columns) const;

  ScalarType scalar_type;
  Tensor x;               // [T, D]
  Tensor row_token;       // [R] int32
  Tensor expert_offsets;  // [E + 1] int32
  Tensor gate_proj;       // [E * h, D] or [E, h, D]
  Tensor up_proj;         // likewise
  Tensor down_proj;       // [D, E * h] or [E, D, h]
};

// Most rows that a task takes.
// NOTE: a constant, not a function of the thread count, so that results do not depend on it.
constexpr int64_t kTaskRows = 512;

// Activations before SwiGLU, which backward needs.
struct KeptActivations {
  Tensor gate_rows;  // [R, h]
  Tensor up_rows;    // [R, h]
};

// y [R, D] of the whole op, by whichever path takes its dtype; or by torch's GEMMs, which leave the
// two activations in `kept`.
Tensor grouped_ffn_forward(const GroupedFfn& ffn);
Tensor grouped_ffn_forward(const GroupedFfn& ffn, const KeptActivations& kept);

// What grouped_ffn_combine takes beside it.
struct CombinedFfn : GroupedFfn {
  // Checks the arguments in order; `op` names the caller in the messages.
  CombinedFfn(const char* op, Tensor x, Tensor weights, Tensor row_token, Tensor token_rows,
              Tensor expert_offsets, Tensor gate_proj, Tensor up_proj, Tensor down_proj,
              double weight_offset);

  // row_weights[token_rows[t, k]] = weight_offset + weights[t, k] for tokens [begin, end).
  void spread_weights(int64_t begin, int64_t end, float* row_weights) const;

  Tensor weights;     // [T, K]
  Tensor token_rows;  // [T, K] int32
  float weight_offset;
};

}  // namespace sparse_unified
