// SPDX-License-Identifier: Apache-2.0
// What every binding shares: argument checks, allocation, GEMM through the dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "sparse_unified/dtype.h"
#include "sparse_unified/matrix.h"

namespace sparse_unified {

// What there was no room for; where ops are registered, it becomes an error with the op's name.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;

// Throws "<op>: <argument> must <rule>, got <value>".
template <typename... Value>
[[noreturn]] void fail(const char* op, const char* argument, const std::string& rule,
                       const Value&... value) {
  std::ostringstream text;
  text << op << ": " << argument << " must " << rule << ", got ";
  (text << ... << value);
  throw std::runtime_error(text.str());
}

// The same unless `ok`. NOTE: in a loop over elements test first and call `fail`, because the rule
// is built at every call.
template <typename... Value>
void check(bool ok, const char* op, const char* argument, const std::string& rule,
           const Value&... value) {
  if (!ok) fail(op, argument, rule, value...);
}

std::string shape_text(const Tensor& tensor);
std::string dtype_text(ScalarType dtype);

// The device of a tensor; the CPU when it is None, which check_tensor refuses.
Device device_of(const Tensor& tensor);

// The rank, the device (that of the call's first tensor), the memory and the element type of an
// argument.
void check_tensor(const char* op, const char* argument, const Tensor& tensor, int64_t rank,
                  const Device& device = torch::headeronly::DeviceType::CPU);
void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype);
DType check_float(const char* op, const char* argument, const Tensor& tensor);
DType dtype_of(const Tensor& tensor);  // of one that check_float accepts
void check_size(const char* op, const char* argument, const Tensor& tensor, int64_t dim,
                int64_t size, const char* meaning);

// Every index lies in [0, limit); the CPU can afford to look.
void check_indices(const char* op, const char* argument, const Tensor& indices, int64_t limit);

// Every index of [0, limit) occurs once.
void check_bijection(const char* op, const char* argument, const Tensor& indices, int64_t limit);

// token_rows [T, K] and row_token [R] are each other's inverse, as sort_by_expert leaves them:
// every row once, and row_token[token_rows[t, k]] = t. Both contiguous.
void check_row_maps(const char* op, const Tensor& row_token, const Tensor& token_rows,
                    int64_t num_tokens);

// A contiguous tensor of the same values: itself or a copy, or always a copy.
Tensor as_contiguous(const Tensor& tensor);
Tensor contiguous_copy(const Tensor& tensor);

// The tensor itself when its rows are dense (and its experts whole rows apart), a contiguous copy
// otherwise.
Tensor with_dense_rows(const Tensor& tensor);

// A tensor with dense rows as kernels take it: its elements, or its bytes.
Matrix matrix_of(const Tensor& tensor);
Matrix bytes_of(const Tensor& tensor);

// Weights of experts [E, rows, columns] count as one matrix of E * step rows, of which the caller
// uses the first `rows` of each step.
int64_t expert_step(const Tensor& weights);
ExpertSpacing spacing_of(const Tensor& gate_proj, const Tensor& down_proj);

// `lay_out(weights)`, with experts as far apart as in `lay_out(other)`.
Tensor with_even_steps(Tensor (*lay_out)(const Tensor&), const Tensor& weights,
                       const Tensor& other);

// Uninitialised tensors next to `like`.
Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor zeros_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes);

// A tensor for the gradient of weights, of their shape, or without rows where none is wanted.
using Allocate = Tensor (*)(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor weights_gradient(const Tensor& weights, bool is_wanted, Allocate allocate);

// A view of memory somebody else owns: [rows, columns] with a row stride.
Tensor matrix_view(void* data, ScalarType dtype, int64_t rows, int64_t columns, int64_t row_stride);

// The transpose of a matrix with dense rows, as a view.
Tensor transposed(const Tensor& matrix);

// out = a @ b by torch's own CPU GEMM, straight at the kernel: no autograd, no dispatch keys, so
// that worker threads may call it. A handful of fp32 rows times a transpose is few_rows; 16-bit
// types are multiplied in fp32 where the processor has no arithmetic of theirs, and rounded once.
void matmul_out(Tensor out, const Tensor& a, const Tensor& b);
// out += a @ b.
void matmul_add(Tensor out, const Tensor& a, const Tensor& b);

}  // namespace sparse_unified
