// SPDX-License-Identifier: Apache-2.0
#include "bindings/common.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace sparse_unified {
namespace {

// Runs a call of torch that takes memory. NOTE: the stable ABI keeps nothing of torch's own error.
template <typename Make>
Tensor allocate(const Make& make, const std::string& shape) {
  try {
    return make();
  } catch (const std::exception&) {
    fail("sparse_unified", "arguments", "leave enough memory", "no room for a tensor of shape ",
         shape);
  }
}

std::string shape_text(const std::initializer_list<int64_t>& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::string device_text(const Device& device) {
  if (device.is_cuda()) return "cuda:" + std::to_string(device.index());
  return device.is_cpu() ? "the CPU" : "another device";
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
  text << "]";
  return text.str();
}

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
  return allocate([&] { return torch::stable::contiguous(tensor); }, shape_text(tensor));
}

Tensor with_dense_rows(const Tensor& tensor) {
  const bool is_dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool is_forward = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
  return is_dense && is_forward ? tensor : as_contiguous(tensor);
}

Matrix matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)};
}

Matrix bytes_of(const Tensor& tensor) {
  const int64_t element = element_bytes(dtype_of(tensor));
  return {tensor.const_data_ptr(), tensor.size(0), tensor.size(1) * element,
          tensor.stride(0) * element};
}

Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_like_sized(like, sizes, like.scalar_type());
}

Tensor empty_like_sized(const Tensor& like, std::initializer_list<int64_t> sizes,
                        ScalarType dtype) {
  return allocate([&] { return torch::stable::new_empty(like, sizes, dtype); }, shape_text(sizes));
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

void matmul_add(Tensor out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace sparse_unified
