// SPDX-License-Identifier: Apache-2.0
// A module in the limited API: importing it loads the library, which registers the ops.
#include <Python.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/version.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "build_info_generated.h"  // written by setup.py: what no macro of a compiler tells
#include "sparse_unified/cuda/grouped_ffn_config.h"
#include "sparse_unified/instruction_set.h"

#if defined(SPARSE_UNIFIED_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

std::string dotted(int major, int minor) {
  return std::to_string(major) + "." + std::to_string(minor);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string standard_library() {
#if defined(_GLIBCXX_USE_CXX11_ABI)
  return "libstdc++, _GLIBCXX_USE_CXX11_ABI=" + std::to_string(_GLIBCXX_USE_CXX11_ABI);
#else
  return "unknown";
#endif
}

std::string cuda_toolkit() {
#if defined(SPARSE_UNIFIED_WITH_CUDA)
  return dotted(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
#else
  return "none";
#endif
}

// The newest CUDA that the driver runs. Loads the driver, no more.
std::string cuda_driver() {
#if defined(SPARSE_UNIFIED_WITH_CUDA)
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess && version > 0) {
    return dotted(version / 1000, version % 1000 / 10);
  }
#endif
  return "none";
}

using sparse_unified::DType;
using sparse_unified::ffn_level;
using sparse_unified::ffn_level_name;
using sparse_unified::instruction_set_used;
using sparse_unified::instruction_sets_compiled;
using sparse_unified::prefers_ffn_cpu;

// What the FFN kernels are the fastest way for on this processor, and the instructions they use.
std::string cpu_ffn_kernels() {
  std::string names;
  for (const auto& [dtype, name] : {std::pair{DType::kFloat32, "float32"},
                                    {DType::kBFloat16, "bfloat16"},
                                    {DType::kFloat16, "float16"}}) {
    if (!prefers_ffn_cpu(dtype)) continue;
    names += std::string(names.empty() ? "" : ", ") + name + " (" +
             ffn_level_name(ffn_level(dtype)) + ")";
  }
  return names.empty() ? "none" : names;
}

// What the library was built from, as (name, text).
std::vector<std::pair<const char*, std::string>> build_facts() {
  constexpr auto kTarget = static_cast<uint64_t>(TORCH_TARGET_VERSION);
  return {
      {"version", SPARSE_UNIFIED_VERSION},
      {"commit", SPARSE_UNIFIED_COMMIT},
      {"torch_built", TORCH_VERSION},
      {"torch_abi", dotted(kTarget >> 56 & 0xff, kTarget >> 48 & 0xff)},
      {"python_abi", "abi3 " + dotted(Py_LIMITED_API >> 24 & 0xff, Py_LIMITED_API >> 16 & 0xff)},
      {"cxx_abi", standard_library()},
      {"compiler", compiler()},
      {"compiler_flags", SPARSE_UNIFIED_CXX_FLAGS},
      {"cuda_toolkit", cuda_toolkit()},
      {"cuda_driver", cuda_driver()},
      {"cuda_architectures", SPARSE_UNIFIED_CUDA_ARCHITECTURES},
      {"instruction_sets", instruction_sets_compiled()},
      {"instruction_set", instruction_set_used()},
      {"cpu_ffn_kernels", cpu_ffn_kernels()},
      {"threads", std::to_string(torch::stable::get_num_threads())},
  };
}

PyObject* build_info(PyObject*, PyObject*) {
  try {
    const auto facts = build_facts();
    PyObject* result = PyDict_New();
    for (const auto& [name, text] : facts) {
      PyObject* value = result == nullptr ? nullptr : PyUnicode_FromString(text.c_str());
      const bool is_set = value != nullptr && PyDict_SetItemString(result, name, value) == 0;
      Py_XDECREF(value);
      if (!is_set) {
        Py_XDECREF(result);
        return nullptr;
      }
    }
    return result;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* grouped_ffn_variants(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const std::string& variant : sparse_unified::grouped_ffn_variants()) {
    PyObject* text = list == nullptr ? nullptr : PyUnicode_FromString(variant.c_str());
    const bool is_added = text != nullptr && PyList_Append(list, text) == 0;
    Py_XDECREF(text);
    if (!is_added) {
      Py_XDECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* set_grouped_ffn_rules(PyObject*, PyObject* text) {
  const char* chars = nullptr;
  if (!PyArg_Parse(text, "s", &chars)) return nullptr;
  sparse_unified::set_grouped_ffn_rules(chars);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What the library was built from, as {name: text}."},
    {"grouped_ffn_variants", grouped_ffn_variants, METH_NOARGS,
     "Values of SPARSE_UNIFIED_GROUPED_FFN worth timing side by side, as [text]."},
    {"set_grouped_ffn_rules", set_grouped_ffn_rules, METH_O,
     "Replaces what was found out about the expert GEMMs on devices; grouped_ffn_config.h."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "Registers torch.ops.sparse_unified.",
                                          -1,
                                          methods,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  return PyModule_Create(&definition);
}
