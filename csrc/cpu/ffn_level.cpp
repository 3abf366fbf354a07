// SPDX-License-Identifier: Apache-2.0
// Which of the two FFN kernels this processor runs.
#include "cpu/vector.h"
#include "sparse_unified/grouped_ffn.h"
#include "sparse_unified/instruction_set.h"
#include "sparse_unified/pruned_ffn.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

namespace sparse_unified {

#define SPARSE_UNIFIED_DECLARE(level)                                           \
  namespace level {                                                             \
  void grouped_ffn_cpu(const GroupedFfnParams&, const GroupedFfnRows&, float*); \
  int64_t grouped_ffn_workspace_floats(int64_t, int64_t);                       \
  void pruned_ffn_cpu(const PrunedFfnParams&, int64_t, int64_t, float*);        \
  int64_t pruned_ffn_workspace_floats(int64_t);                                 \
  }

SPARSE_UNIFIED_DECLARE(avx2)
SPARSE_UNIFIED_DECLARE(avx512)

namespace {

#ifdef SPARSE_UNIFIED_SINGLE_VERSION
bool has_avx512() { return false; }
#else
bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
#endif

}  // namespace

bool ffn_cpu_supported() { return __builtin_cpu_supports("x86-64-v3"); }

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
  return has_avx512() ? avx512::grouped_ffn_cpu(params, rows, workspace)
                      : avx2::grouped_ffn_cpu(params, rows, workspace);
}

int64_t grouped_ffn_workspace_floats(int64_t hidden_size, int64_t expert_width) {
  return has_avx512() ? avx512::grouped_ffn_workspace_floats(hidden_size, expert_width)
                      : avx2::grouped_ffn_workspace_floats(hidden_size, expert_width);
}

void pruned_ffn_cpu(const PrunedFfnParams& params, int64_t token_begin, int64_t token_end,
                    float* workspace) {
  return has_avx512() ? avx512::pruned_ffn_cpu(params, token_begin, token_end, workspace)
                      : avx2::pruned_ffn_cpu(params, token_begin, token_end, workspace);
}

int64_t pruned_ffn_workspace_floats(int64_t hidden_size) {
  return has_avx512() ? avx512::pruned_ffn_workspace_floats(hidden_size)
                      : avx2::pruned_ffn_workspace_floats(hidden_size);
}

}  // namespace sparse_unified

#else

namespace sparse_unified {

bool ffn_cpu_supported() { return false; }
bool has_arithmetic(DType) { return true; }
void grouped_ffn_cpu(const GroupedFfnParams&, const GroupedFfnRows&, float*) {}
int64_t grouped_ffn_workspace_floats(int64_t, int64_t) { return 0; }
void pruned_ffn_cpu(const PrunedFfnParams&, int64_t, int64_t, float*) {}
int64_t pruned_ffn_workspace_floats(int64_t) { return 0; }

}  // namespace sparse_unified

#endif
