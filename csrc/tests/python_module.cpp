// SPDX-License-Identifier: Apache-2.0
// The torch-free kernels as numpy functions, for tests. Storage is passed as it is: float32 arrays,
// or uint16 arrays of bits with the name of their 16-bit type. Every call runs on one thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/vector.h"
#include "sparse_unified/combine.h"
#include "sparse_unified/permute.h"
#include "sparse_unified/route_topk.h"
#include "sparse_unified/sort_by_expert.h"
#include "sparse_unified/swiglu.h"

namespace py = pybind11;

namespace sparse_unified {
namespace {

template <typename T>
using Dense = py::array_t<T, py::array::c_style | py::array::forcecast>;

DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("dtype must be float32, bfloat16 or float16, got " + name);
}

// A C-contiguous array whose element size is that of `dtype`.
py::array checked(const char* name, const py::array& array, DType dtype, py::ssize_t rank) {
  if (array.ndim() != rank || array.itemsize() != element_bytes(dtype) ||
      !(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + " must be a C-contiguous array of rank " +
                          std::to_string(rank) + " in the storage of its dtype, got rank " +
                          std::to_string(array.ndim()) + ", item size " +
                          std::to_string(array.itemsize()));
  }
  return array;
}

py::array empty_like(const py::array& like, std::vector<py::ssize_t> shape) {
  return py::array(like.dtype(), std::move(shape));
}

template <typename T>
Dense<T> empty(std::vector<py::ssize_t> shape) {
  return Dense<T>(std::move(shape));
}

// Applies f to 16 values at a time.
template <typename F>
Dense<float> map_lanes(const Dense<float>& x, const F& f) {
  Dense<float> out = empty<float>({x.size()});
  float lanes[kLanes];
  for (int64_t i = 0; i < x.size(); i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, x.size() - i);
    store(lanes, f(load(x.data() + i, n)));
    std::memcpy(out.mutable_data() + i, lanes, static_cast<size_t>(n) * sizeof(float));
  }
  return out;
}

template <typename T>
Dense<float> widen_bits(const Dense<uint16_t>& bits) {
  Dense<float> out = empty<float>({bits.size()});
  for (int64_t i = 0; i < bits.size(); ++i) {
    const T stored{bits.data()[i]};
    out.mutable_data()[i] = load(&stored, 1)[0];
  }
  return out;
}

template <typename T>
Dense<uint16_t> narrow_values(const Dense<float>& values) {
  Dense<uint16_t> out = empty<uint16_t>({values.size()});
  for (int64_t i = 0; i < values.size(); ++i) {
    T stored[1];
    store(stored, broadcast(values.data()[i]), 1);
    out.mutable_data()[i] = stored[0].bits;
  }
  return out;
}

Dense<float> widen_by_name(const Dense<uint16_t>& bits, const std::string& dtype) {
  return parse_dtype(dtype) == DType::kBFloat16 ? widen_bits<BFloat16>(bits)
                                                : widen_bits<Float16>(bits);
}

Dense<uint16_t> narrow_by_name(const Dense<float>& values, const std::string& dtype) {
  return parse_dtype(dtype) == DType::kBFloat16 ? narrow_values<BFloat16>(values)
                                                : narrow_values<Float16>(values);
}

py::array swiglu(const py::array& gate_in, const py::array& up_in, const std::string& dtype_name) {
  const DType dtype = parse_dtype(dtype_name);
  const py::array gate = checked("gate", gate_in, dtype, 1);
  const py::array up = checked("up", up_in, dtype, 1);
  if (gate.size() != up.size()) throw py::value_error("up must have the size of gate");
  py::array hidden = empty_like(gate, {gate.size()});
  swiglu_cpu({dtype, gate.data(), up.data(), hidden.mutable_data(), gate.size()});
  return hidden;
}

// -> logits [T, E], topk_logits [T, K], topk_idx [T, K]
py::tuple route_topk(const py::array& x_in, const py::array& gate_in, int64_t top_k,
                     const std::string& dtype_name) {
  const DType dtype = parse_dtype(dtype_name);
  const py::array x = checked("x", x_in, dtype, 2);
  const py::array gate = checked("gate", gate_in, dtype, 2);
  const int64_t num_tokens = x.shape(0);
  const int64_t hidden_size = x.shape(1);
  const int64_t num_experts = gate.shape(0);
  if (gate.shape(1) != hidden_size) throw py::value_error("gate must have the hidden size of x");
  if (top_k < 1 || top_k > num_experts) throw py::value_error("top_k must be from 1 to E");
  Dense<float> gate_t = empty<float>({hidden_size, padded_experts(num_experts)});
  Dense<float> logits = empty<float>({num_tokens, num_experts});
  Dense<float> topk_logits = empty<float>({num_tokens, top_k});
  Dense<int32_t> topk_idx = empty<int32_t>({num_tokens, top_k});
  const RouteTopkParams params{.dtype = dtype,
                               .x = {x.data(), num_tokens, hidden_size, hidden_size},
                               .gate = {gate.data(), num_experts, hidden_size, hidden_size},
                               .gate_t = gate_t.data(),
                               .logits = logits.mutable_data(),
                               .topk_logits = topk_logits.mutable_data(),
                               .topk_idx = topk_idx.mutable_data(),
                               .top_k = top_k};
  pack_gate(dtype, params.gate, gate_t.mutable_data());
  route_topk_cpu(params, 0, num_tokens);
  return py::make_tuple(logits, topk_logits, topk_idx);
}

// -> expert_offsets [E + 1], row_token [R], token_rows [T, K]
py::tuple sort_by_expert(const Dense<int32_t>& topk_idx, int64_t num_experts) {
  if (topk_idx.ndim() != 2) throw py::value_error("topk_idx must have rank 2");
  Dense<int32_t> offsets = empty<int32_t>({num_experts + 1});
  Dense<int32_t> row_token = empty<int32_t>({topk_idx.size()});
  Dense<int32_t> token_rows = empty<int32_t>({topk_idx.shape(0), topk_idx.shape(1)});
  const SortByExpertParams params{topk_idx.data(),          offsets.mutable_data(),
                                  row_token.mutable_data(), token_rows.mutable_data(),
                                  topk_idx.size(),          num_experts,
                                  topk_idx.shape(1)};
  if (find_bad_expert(params) >= 0) throw py::value_error("topk_idx must be from 0 to E - 1");
  sort_by_expert_cpu(params);
  return py::make_tuple(offsets, row_token, token_rows);
}

void check_range(const char* name, const Dense<int32_t>& indices, int64_t limit) {
  for (int64_t i = 0; i < indices.size(); ++i) {
    if (indices.data()[i] < 0 || indices.data()[i] >= limit) {
      throw py::value_error(std::string(name) + " must be from 0 to " + std::to_string(limit - 1));
    }
  }
}

py::array permute(const py::array& x_in, const Dense<int32_t>& token_rows,
                  const std::string& dtype_name) {
  const DType dtype = parse_dtype(dtype_name);
  const py::array x = checked("x", x_in, dtype, 2);
  if (token_rows.ndim() != 2 || token_rows.shape(0) != x.shape(0)) {
    throw py::value_error("token_rows must be [T, K]");
  }
  check_range("token_rows", token_rows, token_rows.size());
  py::array y = empty_like(x, {token_rows.size(), x.shape(1)});
  const int64_t row_bytes = x.shape(1) * element_bytes(dtype);
  const PermuteParams params{.x = {x.data(), x.shape(0), row_bytes, row_bytes},
                             .row_token = nullptr,
                             .token_rows = token_rows.data(),
                             .y = y.mutable_data(),
                             .num_rows = token_rows.size(),
                             .top_k = token_rows.shape(1)};
  permute_cpu(params, 0, x.shape(0));
  return y;
}

py::array combine(const py::array& y_in, const std::optional<Dense<float>>& weights,
                  const Dense<int32_t>& token_rows, const std::string& dtype_name) {
  const DType dtype = parse_dtype(dtype_name);
  const py::array y = checked("y", y_in, dtype, 2);
  if (token_rows.ndim() != 2) throw py::value_error("token_rows must have rank 2");
  if (weights && weights->size() != token_rows.size()) {
    throw py::value_error("weights must have the size of token_rows");
  }
  check_range("token_rows", token_rows, y.shape(0));
  py::array out = empty_like(y, {token_rows.shape(0), y.shape(1)});
  const CombineParams params{.dtype = dtype,
                             .y = {y.data(), y.shape(0), y.shape(1), y.shape(1)},
                             .weights = weights ? weights->data() : nullptr,
                             .token_rows = token_rows.data(),
                             .out = out.mutable_data(),
                             .num_tokens = token_rows.shape(0),
                             .top_k = token_rows.shape(1)};
  combine_cpu(params, 0, params.num_tokens);
  return out;
}

}  // namespace
}  // namespace sparse_unified

PYBIND11_MODULE(sparse_unified_test, m) {
  using namespace sparse_unified;
  m.doc() = "Kernels of sparse_unified without torch, for tests.";
  m.def("widen", &widen_by_name, py::arg("bits"), py::arg("dtype"));
  m.def("narrow", &narrow_by_name, py::arg("values"), py::arg("dtype"));
  m.def("exp", [](const Dense<float>& x) { return map_lanes(x, [](Float v) { return exp(v); }); });
  m.def("sigmoid",
        [](const Dense<float>& x) { return map_lanes(x, [](Float v) { return sigmoid(v); }); });
  m.def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), py::arg("dtype") = "float32");
  m.def("route_topk", &route_topk, py::arg("x"), py::arg("gate"), py::arg("top_k"),
        py::arg("dtype") = "float32");
  m.def("sort_by_expert", &sort_by_expert, py::arg("topk_idx"), py::arg("num_experts"));
  m.def("permute", &permute, py::arg("x"), py::arg("token_rows"), py::arg("dtype") = "float32");
  m.def("combine", &combine, py::arg("y"), py::arg("weights").none(true), py::arg("token_rows"),
        py::arg("dtype") = "float32");
}
