// SPDX-License-Identifier: Apache-2.0
#include "sparse_unified/instruction_set.h"

#include "cpu/vector.h"

namespace sparse_unified {

#if defined(SPARSE_UNIFIED_HAS_MULTIVERSION)

const char* instruction_sets_compiled() { return "baseline, x86-64-v3, x86-64-v4"; }

// The choice that the resolver of a multiversioned function makes, by the same question.
const char* instruction_set_used() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2, FMA)";
  return "baseline";
}

#else

const char* instruction_sets_compiled() { return instruction_set_used(); }

const char* instruction_set_used() {
#if defined(__AVX512F__)
  return "x86-64-v4 (AVX-512)";
#elif defined(__AVX2__)
  return "x86-64-v3 (AVX2, FMA)";
#else
  return "baseline";
#endif
}

#endif

}  // namespace sparse_unified
