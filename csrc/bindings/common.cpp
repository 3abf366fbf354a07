// SPDX-License-Identifier: Apache-2.0
#include "bindings/common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iomanip>
#include <limits>
#include <vector>

#include "sparse_unified/accumulate.h"
#include "sparse_unified/few_rows.h"
#include "sparse_unified/instruction_set.h"

namespace sparse_unified {
namespace {

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return sizes;
}

// Runs a call of torch that takes memory. NOTE: the stable ABI keeps nothing of torch's own error.
template <typename Make, typename Sizes>
Tensor allocate(const Make& make, const Sizes& sizes, size_t element_size) {
  try {
    return make();
  } catch (const std::exception&) {
    auto bytes = static_cast<double>(element_size);  // sizes may be anything
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    std::ostringstream text;
    text << "a tensor of shape " << text_of(sizes) << ", " << std::fixed << std::setprecision(0)
         << bytes << " bytes";
    throw OutOfMemory(text.str());
  }
}

// NOTE: straight at the shim. Through the dispatcher new_empty costs a boxed call, and calls empty.
Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr size_t kMaxRank = 3;
  std::array<int64_t, kMaxRank> strides{};
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes.begin()[dim], 1);
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  Tensor tensor(handle);
#if defined(SPARSE_UNIFIED_EMULATION)
  const size_t num_bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (num_bytes > 0) std::memset(tensor.data_ptr(), 0xff, num_bytes);  // NaN
#endif
  return tensor;
}

// Runs a product of torch, which takes memory of its own.
void multiply(AOTITorchError error, const Tensor& a, const Tensor& b) {
  if (error == AOTI_TORCH_SUCCESS) return;
  const auto bytes = static_cast<size_t>(a.size(0) * b.size(1)) * a.element_size();
  throw OutOfMemory("the product of " + shape_text(a) + " and " + shape_text(b) + ", " +
                    std::to_string(bytes) + " bytes");
}

// Whether torch's own GEMM would be slow for this dtype, and there are rows enough to repay a copy
// of the other matrix; or would be wrong: on AMX tiles it multiplies what lies behind a row of bf16
// by zeros, and the sum is NaN where that is NaN.
bool multiplies_in_fp32(const Tensor& a) {
  constexpr int64_t kLeastRows = 8;
  constexpr int64_t kTileColumns = 32;
  const bool reads_beyond =
      a.scalar_type() == ScalarType::BFloat16 && a.stride(1) == 1 && a.size(1) % kTileColumns != 0;
  return reads_beyond || (a.size(0) >= kLeastRows && !has_arithmetic(dtype_of(a)));
}

// Whether a handful of rows is multiplied by the transpose of a matrix with dense rows.
bool are_few_rows(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == ScalarType::Float && a.size(0) <= kMostFewRows && a.stride(1) == 1 &&
         b.stride(0) == 1 && b.size(1) > 1;
}

// A 16-bit matrix in fp32; one that is a transposed view stays one.
class Widened {
 public:
  explicit Widened(const Tensor& matrix) {
    const bool is_transposed = matrix.size(1) > 1 && matrix.stride(1) != 1;
    const int64_t rows = matrix.size(is_transposed ? 1 : 0);
    const int64_t columns = matrix.size(is_transposed ? 0 : 1);
    const int64_t stride = matrix.stride(is_transposed ? 1 : 0);
    rows_ = empty_like_sized(matrix, {rows, columns}, ScalarType::Float);
    const char* values = static_cast<const char*>(matrix.const_data_ptr());
    auto* out = rows_.mutable_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      widen_cpu({dtype_of(matrix), values + row * stride * 2, out + row * columns, columns});
    }
    view_ = is_transposed ? transposed(rows_) : rows_;
  }

  const Tensor& get() const { return view_; }

 private:
  Tensor rows_;  // whose memory view_ is
  Tensor view_;
};

// out = sum, rounded; rows of any stride.
void round_rows(const Tensor& sum, Tensor out) {
  const int64_t columns = sum.size(1);
  const auto* from = sum.const_data_ptr<float>();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t row = 0; row < sum.size(0); ++row) {
    round_cpu({dtype_of(out), from + row * columns, to + row * out.stride(0) * 2, columns});
  }
}

// Of weights [E, rows, columns]: elements from one row to the next. Sizes of 1 may have any stride.
int64_t row_stride(const Tensor& weights) {
  return weights.size(1) <= 1 ? weights.size(2) : weights.stride(1);
}

bool has_whole_steps(const Tensor& weights) {
  const int64_t stride = row_stride(weights);
  if (weights.size(2) > 1 && weights.stride(2) != 1) return false;
  if (stride < weights.size(2)) return false;
  return weights.size(0) <= 1 || stride == 0 ||
         (weights.stride(0) % stride == 0 && weights.stride(0) >= weights.size(1) * stride);
}

// Of an element of what ops allocate.
size_t allocated_bytes(ScalarType dtype) {
  if (dtype == ScalarType::Byte) return 1;
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? 2 : 4;
}

int64_t storage_bytes(const Tensor& tensor) {
  int64_t bytes = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return bytes;
}

// Whether the storage holds every element; that of a tensor may be resized at any time.
bool has_memory(const Tensor& tensor) {
  int64_t last = tensor.storage_offset();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) return true;
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  return (last + 1) * static_cast<int64_t>(tensor.element_size()) <= storage_bytes(tensor);
}

std::string device_text(const Device& device) {
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  return device.is_cpu() ? "the CPU" : "another device";
}

}  // namespace

std::string shape_text(const Tensor& tensor) { return text_of(sizes_of(tensor)); }

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "scalar type " + std::to_string(static_cast<int>(dtype));
  }
}

Device device_of(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return torch::headeronly::DeviceType::CPU;
  return tensor.device();
}

void check_tensor(const char* op, const char* argument, const Tensor& tensor, int64_t rank,
                  const Device& device) {
  check(tensor.defined(), op, argument, "be a tensor", "None");
  check(tensor.dim() == rank, op, argument, "have " + std::to_string(rank) + " dimensions",
        "shape ", shape_text(tensor));
  // Rows without columns take no memory, so nothing else bounds their number.
  for (int64_t dim = 0; dim < rank; ++dim) {
    check(tensor.size(dim) <= std::numeric_limits<int32_t>::max(), op, argument,
          "have at most 2^31 - 1 rows and columns", "shape ", shape_text(tensor));
  }
  const Device found = device_of(tensor);
  check(found == device, op, argument, "be on " + device_text(device) + " like the other arguments",
        device_text(found));
  check(has_memory(tensor), op, argument, "have memory for all of its elements", "a storage of ",
        storage_bytes(tensor), " bytes for shape ", shape_text(tensor));
}

void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, argument, "have dtype " + dtype_text(dtype),
        dtype_text(tensor.scalar_type()));
}

DType dtype_of(const Tensor& tensor) { return check_float("sparse_unified", "arguments", tensor); }

DType check_float(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, op, argument, "be float32, bfloat16 or float16",
            dtype_text(tensor.scalar_type()));
      return DType::kFloat32;
  }
}

void check_size(const char* op, const char* argument, const Tensor& tensor, int64_t dim,
                int64_t size, const char* meaning) {
  check(tensor.size(dim) == size, op, argument,
        "have " + std::string(meaning) + " = " + std::to_string(size) + " at dimension " +
            std::to_string(dim),
        "shape ", shape_text(tensor));
}

void check_indices(const char* op, const char* argument, const Tensor& indices, int64_t limit) {
  const auto* data = indices.const_data_ptr<int32_t>();
  const int64_t count = indices.numel();
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 0 || data[i] >= limit) {
      fail(op, argument, "hold indices from 0 to " + std::to_string(limit - 1), data[i],
           " at position ", i);
    }
  }
}

void check_bijection(const char* op, const char* argument, const Tensor& indices, int64_t limit) {
  check(indices.numel() == limit, op, argument,
        "hold " + std::to_string(limit) + " indices, one for each row", indices.numel());
  check_indices(op, argument, indices, limit);
  const auto* data = indices.const_data_ptr<int32_t>();
  std::vector<char> seen(static_cast<size_t>(limit));
  for (int64_t i = 0; i < limit; ++i) {
    if (seen[data[i]]) fail(op, argument, "name every row once", data[i], " again at position ", i);
    seen[data[i]] = 1;
  }
}

void check_row_maps(const char* op, const Tensor& row_token, const Tensor& token_rows,
                    int64_t num_tokens) {
  check_tensor(op, "token_rows", token_rows, 2);
  check_dtype(op, "token_rows", token_rows, ScalarType::Int);
  check_size(op, "token_rows", token_rows, 0, num_tokens, "the number of tokens");
  check_bijection(op, "token_rows", token_rows, row_token.size(0));
  const auto* tokens = row_token.const_data_ptr<int32_t>();
  const auto* rows = token_rows.const_data_ptr<int32_t>();
  const int64_t top_k = token_rows.size(1);
  for (int64_t token = 0, slot = 0; token < num_tokens; ++token) {
    for (int64_t k = 0; k < top_k; ++k, ++slot) {
      if (tokens[rows[slot]] != token) {
        fail(op, "row_token", "name the token whose rows token_rows lists", tokens[rows[slot]],
             " at row ", rows[slot], " of token ", token);
      }
    }
  }
}

Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return allocate([&] { return torch::stable::contiguous(tensor); }, sizes_of(tensor),
                  tensor.element_size());
}

Tensor contiguous_copy(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return as_contiguous(tensor);
  return allocate([&] { return torch::stable::clone(tensor); }, sizes_of(tensor),
                  tensor.element_size());
}

Tensor with_dense_rows(const Tensor& tensor) {
  if (tensor.dim() == 3) return has_whole_steps(tensor) ? tensor : as_contiguous(tensor);
  const bool is_dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool is_forward = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
  return is_dense && is_forward ? tensor : as_contiguous(tensor);
}

Matrix matrix_of(const Tensor& tensor) {
  if (tensor.dim() == 3) {
    const int64_t rows = (tensor.size(0) - 1) * expert_step(tensor) + tensor.size(1);
    return {tensor.const_data_ptr(), rows, tensor.size(2), row_stride(tensor)};
  }
  // A single row may have any stride, which kernels would have to align.
  const int64_t stride = tensor.size(0) <= 1 ? tensor.size(1) : tensor.stride(0);
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), stride};
}

int64_t expert_step(const Tensor& weights) {
  const int64_t stride = row_stride(weights);
  return weights.size(0) <= 1 || stride == 0 ? weights.size(1) : weights.stride(0) / stride;
}

ExpertSpacing spacing_of(const Tensor& gate_proj, const Tensor& down_proj) {
  if (gate_proj.dim() != 3) return {};
  return {expert_step(gate_proj) - gate_proj.size(1), expert_step(down_proj)};
}

Tensor with_even_steps(Tensor (*lay_out)(const Tensor&), const Tensor& weights,
                       const Tensor& other) {
  Tensor own = lay_out(weights);
  if (own.dim() != 3 || expert_step(own) == expert_step(lay_out(other))) return own;
  return lay_out(as_contiguous(weights));
}

Matrix bytes_of(const Tensor& tensor) {
  const int64_t element = element_bytes(dtype_of(tensor));
  const Matrix elements = matrix_of(tensor);
  return {elements.data, elements.rows, elements.columns * element, elements.stride * element};
}

Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_like_sized(like, sizes, like.scalar_type());
}

Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes,
                        ScalarType dtype) {
  return allocate([&] { return empty_strided(like, sizes, dtype); }, sizes, allocated_bytes(dtype));
}

Tensor zeros_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate([&] { return torch::stable::new_zeros(like, sizes); }, sizes,
                  like.element_size());
}

Tensor weights_gradient(const Tensor& weights, bool is_wanted, Allocate allocate) {
  const int64_t first = is_wanted ? weights.size(0) : 0;
  if (weights.dim() == 2) return allocate(weights, {first, weights.size(1)});
  return allocate(weights, {first, weights.size(1), weights.size(2)});
}

Tensor matrix_view(void* data, ScalarType dtype, int64_t rows, int64_t columns,
                   int64_t row_stride) {
  return torch::stable::from_blob(data, std::array{rows, columns},
                                  std::array{row_stride, int64_t{1}},
                                  Device(torch::headeronly::DeviceType::CPU), dtype);
}

Tensor transposed(const Tensor& matrix) {
  return torch::stable::from_blob(matrix.data_ptr(), std::array{matrix.size(1), matrix.size(0)},
                                  std::array{int64_t{1}, matrix.stride(0)},
                                  Device(torch::headeronly::DeviceType::CPU), matrix.scalar_type());
}

void matmul_out(Tensor out, const Tensor& a, const Tensor& b) {
  if (are_few_rows(a, b)) {
    return few_rows_cpu({.a = matrix_of(a),
                         .b = {b.const_data_ptr(), b.size(1), b.size(0), b.stride(1)},
                         .out = out.mutable_data_ptr<float>(),
                         .out_stride = out.stride(0)});
  }
  if (multiplies_in_fp32(a)) {
    const Tensor sum = empty_like_sized(a, {a.size(0), b.size(1)}, ScalarType::Float);
    matmul_out(sum, Widened(a).get(), Widened(b).get());
    return round_rows(sum, out);
  }
  multiply(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()), a, b);
}

void matmul_add(Tensor out, const Tensor& a, const Tensor& b) {
  if (multiplies_in_fp32(a)) {
    const Widened sum(out);
    matmul_add(sum.get(), Widened(a).get(), Widened(b).get());
    return round_rows(sum.get(), out);
  }
  multiply(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0), a, b);
}

}  // namespace sparse_unified
