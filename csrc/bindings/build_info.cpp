// SPDX-License-Identifier: Apache-2.0
#include "bindings/build_info.h"

#include <Python.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/version.h>

#include "build_info_generated.h"  // written by setup.py: what no macro of a compiler tells
#include "sparse_unified/instruction_set.h"

#if defined(SPARSE_UNIFIED_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace sparse_unified {
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

}  // namespace

std::vector<std::pair<const char*, std::string>> build_info() {
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
      {"cuda_architectures", SPARSE_UNIFIED_CUDA_ARCHITECTURES},
      {"instruction_sets", instruction_sets_compiled()},
      {"instruction_set", instruction_set_used()},
      {"threads", std::to_string(torch::stable::get_num_threads())},
  };
}

}  // namespace sparse_unified
