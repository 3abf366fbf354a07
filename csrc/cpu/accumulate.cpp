// SPDX-License-Identifier: Apache-2.0
// sum += partial, and out = sum rounded. Elementwise: bound by memory.
#include "sparse_unified/accumulate.h"

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

template <typename T>
SPARSE_UNIFIED_INLINE void accumulate(const AccumulateParams& params) {
  const T* partial = static_cast<const T*>(params.partial);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) {
    store(params.sum + i, load(params.sum + i) + load(partial + i));
  }
  if (const int64_t rest = params.num_values - i; rest > 0) {
    store(params.sum + i, load(params.sum + i, rest) + load(partial + i, rest), rest);
  }
}

template <typename T>
SPARSE_UNIFIED_INLINE void round(const RoundParams& params) {
  T* out = static_cast<T*>(params.out);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) store(out + i, load(params.sum + i));
  if (const int64_t rest = params.num_values - i; rest > 0) {
    store(out + i, load(params.sum + i, rest), rest);
  }
}

#define SPARSE_UNIFIED_INSTANTIATE(T, suffix)                                            \
  SPARSE_UNIFIED_MULTIVERSION void accumulate_##suffix(const AccumulateParams& params) { \
    accumulate<T>(params);                                                               \
  }                                                                                      \
  SPARSE_UNIFIED_MULTIVERSION void round_##suffix(const RoundParams& params) { round<T>(params); }
SPARSE_UNIFIED_INSTANTIATE(float, float32)
SPARSE_UNIFIED_INSTANTIATE(BFloat16, bfloat16)
SPARSE_UNIFIED_INSTANTIATE(Float16, float16)
#undef SPARSE_UNIFIED_INSTANTIATE

}  // namespace

void accumulate_cpu(const AccumulateParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return accumulate_float32(params);
    case DType::kBFloat16:
      return accumulate_bfloat16(params);
    case DType::kFloat16:
      return accumulate_float16(params);
  }
}

void round_cpu(const RoundParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return round_float32(params);
    case DType::kBFloat16:
      return round_bfloat16(params);
    case DType::kFloat16:
      return round_float16(params);
  }
}

}  // namespace sparse_unified
