// SPDX-License-Identifier: Apache-2.0
// The checked arguments of pruned_ffn on the CPU, shared by forward and backward, and its GEMMs
// through torch.
#pragma once

#include <vector>

#include "bindings/arguments.h"
#include "bindings/parallel_tasks.h"
#include "sparse_unified/pruned_ffn.h"

namespace sparse_unified {

// Adjacent kept neurons: [first, first + count) of the width, columns from `offset` of [T, J].
struct KeptRun {
  int64_t first;
  int64_t count;
  int64_t offset;
};

// Kept neurons that one GEMM takes together: adjacent columns of [T, J].
struct KeptSlab {
  std::vector<KeptRun> runs;
  int64_t offset;
  int64_t width;
};

// [begin, begin + count) of the tokens or of the hidden size.
struct Range {
  int64_t begin;
  int64_t count;
};

// 0 to `size` in equal parts of at most `largest`.
std::vector<Range> split_range(int64_t size, int64_t largest);

struct PrunedFfn : PrunedFfnSizes {
  // Checks the arguments in order; `op` names the caller in the messages.
  PrunedFfn(const char* op, Tensor x, Tensor kept_blocks, Tensor gate_proj, Tensor up_proj,
            Tensor down_proj, int64_t block_size);

  // The kept blocks in their order, neighbours joined, in slabs of at most kMaxSlabNeurons.
  std::vector<KeptSlab> slabs() const;
  static constexpr int64_t kMaxSlabNeurons = 256;

  // Of a slab, the rows of gate_proj or up_proj [n, columns], or the columns of down_proj
  // [rows, n]: a view where the slab is one run, else gathered into `scratch`.
  Tensor neuron_rows(const Tensor& weight, const KeptSlab& slab, Range columns,
                     char* scratch) const;
  Tensor neuron_columns(const Tensor& weight, const KeptSlab& slab, Range rows,
                        char* scratch) const;
  // The way back: rows [n, D] or columns [D, n] of a slab into `weight`.
  void scatter_rows(const char* rows, const Tensor& weight, const KeptSlab& slab) const;
  void scatter_columns(const char* columns, const Tensor& weight, const KeptSlab& slab) const;
  // Bytes of scratch they need for at most `hidden` rows or columns.
  int64_t scratch_bytes(int64_t hidden) const;

  // Views of some rows: of columns of a contiguous [T, J], of the columns of any [T, D].
  Tensor kept_view(const Tensor& matrix, Range tokens, int64_t offset, int64_t n) const;
  Tensor hidden_view(const Tensor& matrix, Range tokens, Range columns) const;

  // The address of element [row, column].
  char* at(const Tensor& matrix, int64_t row, int64_t column) const;

  ScalarType scalar_type;
  Tensor x;            // [T, D]
  Tensor kept_blocks;  // [B] int32
  Tensor gate_proj;    // [I, D]
  Tensor up_proj;      // [I, D]
  Tensor down_proj;    // [D, I]
  int64_t block_size;
};

// Sums matrix products into `out` [n, m], rows of any stride: in fp32, with one rounding to 16
// bits. `scratch` holds scratch_bytes(n, m).
class ProductSum {
 public:
  ProductSum(const Tensor& out, int64_t num_products, char* scratch);
  static int64_t scratch_bytes(int64_t n, int64_t m);
  // The last one completes out.
  void add(const Tensor& a, const Tensor& b);

 private:
  bool is_direct() const;  // GEMMs add to out themselves

  Tensor out_;
  int64_t num_products_;
  int64_t num_added_ = 0;
  float* sum_;     // [n, m]
  char* partial_;  // [n, m], one product
};

// The most tokens and outputs of a GEMM, which is a task for one thread.
constexpr int64_t kGemmTokens = 512;
constexpr int64_t kGemmOutputs = 256;

// What backward needs of forward, and the gradients of it.
struct Activations {
  Tensor gate_rows;  // [T, J]
  Tensor up_rows;    // [T, J]
};

inline Activations empty_activations(const PrunedFfn& ffn) {
  return {empty_like_sized(ffn.x, {ffn.num_tokens, ffn.kept_width}),
          empty_like_sized(ffn.x, {ffn.num_tokens, ffn.kept_width})};
}

// out [T, D] = sum over the slabs of products that `add(sum, slab, tokens, outputs, scratch)` adds
// to one part of it.
template <typename Add>
Tensor sum_over_slabs(const PrunedFfn& ffn, const std::vector<KeptSlab>& slabs,
                      int64_t products_a_slab, const Add& add) {
  Tensor out = empty_like_sized(ffn.x, {ffn.num_tokens, ffn.hidden_size});
  if (slabs.empty()) torch::stable::zero_(out);
  const std::vector<Range> token_parts = split_range(ffn.num_tokens, kGemmTokens);
  const std::vector<Range> outputs = split_range(ffn.hidden_size, kGemmOutputs);
  const auto num_outputs = static_cast<int64_t>(outputs.size());
  const auto num_slabs = static_cast<int64_t>(slabs.size());
  const int64_t num_tasks = num_slabs ? static_cast<int64_t>(token_parts.size()) * num_outputs : 0;
  const int64_t weight_bytes = ffn.scratch_bytes(kGemmOutputs);
  const Workspace workspace(ffn.x, num_workers(num_tasks),
                            weight_bytes + ProductSum::scratch_bytes(kGemmTokens, kGemmOutputs));
  parallel_tasks(num_tasks, [&](int64_t task, int64_t worker) {
    char* scratch = workspace.get(worker);
    const Range tokens = token_parts[task / num_outputs];
    const Range columns = outputs[task % num_outputs];
    ProductSum sum(ffn.hidden_view(out, tokens, columns), num_slabs * products_a_slab,
                   scratch + weight_bytes);
    for (const KeptSlab& slab : slabs) add(sum, slab, tokens, columns, scratch);
  });
  return out;
}

}  // namespace sparse_unified
