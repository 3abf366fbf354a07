// SPDX-License-Identifier: Apache-2.0
// Which of the FFN kernels this processor runs.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/vector.h"
#include "sparse_unified/grouped_ffn.h"
#include "sparse_unified/instruction_set.h"
#include "sparse_unified/pruned_ffn.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPARSE_UNIFIED_HAS_FFN
#include "cpu/bf16_instructions.h"
#endif

namespace sparse_unified {

const char* ffn_level_name(FfnLevel level) {
  constexpr const char* kNames[] = {"none", "AVX2", "AVX-512", "AVX512_BF16", "AMX"};
  return kNames[static_cast<int>(level)];
}

#ifdef SPARSE_UNIFIED_HAS_FFN

#define SPARSE_UNIFIED_DECLARE(level)                                           \
  namespace level {                                                             \
  void grouped_ffn_cpu(const GroupedFfnParams&, const GroupedFfnRows&, float*); \
  int64_t grouped_ffn_workspace_floats(int64_t, int64_t);                       \
  void pruned_ffn_cpu(const PrunedFfnParams&, int64_t, int64_t, float*);        \
  int64_t pruned_ffn_workspace_floats(int64_t);                                 \
  }

SPARSE_UNIFIED_DECLARE(avx2)
SPARSE_UNIFIED_DECLARE(avx512)
SPARSE_UNIFIED_DECLARE(avx512bf16)
SPARSE_UNIFIED_DECLARE(amx)

namespace {

FfnLevel level_of_processor() {
  if (!__builtin_cpu_supports("x86-64-v3")) return FfnLevel::kNone;
#ifdef SPARSE_UNIFIED_SINGLE_VERSION
  return FfnLevel::kAvx2;
#else
  if (!__builtin_cpu_supports("x86-64-v4")) return FfnLevel::kAvx2;
#ifndef SPARSE_UNIFIED_EMULATED_BF16
  if (!__builtin_cpu_supports("avx512bf16")) return FfnLevel::kAvx512;
  if (!__builtin_cpu_supports("amx-bf16") || !request_tiles()) {
    // NOTE: Intel's dot products of bf16 take four times as long as its fp32 multiply-adds, for two
    // times as much; AMD's take no longer.
    return __builtin_cpu_is("intel") ? FfnLevel::kAvx512 : FfnLevel::kAvx512Bf16;
  }
#endif
  return FfnLevel::kAmx;
#endif
}

FfnLevel most_allowed() {
  constexpr const char* kVariable = "SPARSE_UNIFIED_CPU_FFN";
  constexpr const char* kNames[] = {"none", "avx2", "avx512", "avx512bf16", "amx"};
  const char* text = std::getenv(kVariable);
  if (text == nullptr) return FfnLevel::kAmx;
  const auto* name = std::find(std::begin(kNames), std::end(kNames), std::string(text));
  if (name == std::end(kNames)) {
    throw std::invalid_argument(std::string(kVariable) +
                                " must be none, avx2, avx512, avx512bf16 or amx, got " + text);
  }
  return static_cast<FfnLevel>(name - kNames);
}

// What each namespace defines.
struct Functions {
  decltype(&avx2::grouped_ffn_cpu) grouped_ffn;
  decltype(&avx2::grouped_ffn_workspace_floats) grouped_ffn_workspace;
  decltype(&avx2::pruned_ffn_cpu) pruned_ffn;
  decltype(&avx2::pruned_ffn_workspace_floats) pruned_ffn_workspace;
};

#define SPARSE_UNIFIED_FUNCTIONS(level)                                                \
  {level::grouped_ffn_cpu, level::grouped_ffn_workspace_floats, level::pruned_ffn_cpu, \
   level::pruned_ffn_workspace_floats}

const Functions& functions_of(DType dtype) {
  static constexpr Functions kFunctions[] = {
      SPARSE_UNIFIED_FUNCTIONS(avx2),  // what tests call where nothing is preferred
      SPARSE_UNIFIED_FUNCTIONS(avx2), SPARSE_UNIFIED_FUNCTIONS(avx512),
      SPARSE_UNIFIED_FUNCTIONS(avx512bf16), SPARSE_UNIFIED_FUNCTIONS(amx)};
  return kFunctions[static_cast<int>(ffn_level(dtype))];
}

}  // namespace

FfnLevel ffn_level(DType dtype) {
  static const FfnLevel kLevel = std::min(level_of_processor(), most_allowed());
  return dtype == DType::kBFloat16 ? kLevel : std::min(kLevel, FfnLevel::kAvx512);
}

bool has_arithmetic(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return true;
    case DType::kBFloat16:
      return __builtin_cpu_supports("avx512bf16");
    case DType::kFloat16:
      return __builtin_cpu_supports("avx512fp16");
  }
  __builtin_unreachable();
}

void grouped_ffn_cpu(const GroupedFfnParams& params, const GroupedFfnRows& rows, float* workspace) {
  functions_of(params.dtype).grouped_ffn(params, rows, workspace);
}

int64_t grouped_ffn_workspace_floats(DType dtype, int64_t hidden_size, int64_t expert_width) {
  return functions_of(dtype).grouped_ffn_workspace(hidden_size, expert_width);
}

void pruned_ffn_cpu(const PrunedFfnParams& params, int64_t token_begin, int64_t token_end,
                    float* workspace) {
  functions_of(params.dtype).pruned_ffn(params, token_begin, token_end, workspace);
}

int64_t pruned_ffn_workspace_floats(DType dtype, int64_t hidden_size) {
  return functions_of(dtype).pruned_ffn_workspace(hidden_size);
}

#else

FfnLevel ffn_level(DType) { return FfnLevel::kNone; }
bool has_arithmetic(DType) { return true; }
void grouped_ffn_cpu(const GroupedFfnParams&, const GroupedFfnRows&, float*) {}
int64_t grouped_ffn_workspace_floats(DType, int64_t, int64_t) { return 0; }
void pruned_ffn_cpu(const PrunedFfnParams&, int64_t, int64_t, float*) {}
int64_t pruned_ffn_workspace_floats(DType, int64_t) { return 0; }

#endif

}  // namespace sparse_unified
