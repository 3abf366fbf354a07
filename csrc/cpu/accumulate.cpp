// SPDX-License-Identifier: Apache-2.0
// sum += partial, sum = partial, and out = sum rounded. Elementwise: bound by memory.
#include "sparse_unified/accumulate.h"

#include "cpu/vector.h"

namespace sparse_unified {
namespace {

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void accumulate(const AccumulateParams& params) {
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
SPARSE_UNIFIED_MULTIVERSION void widen(const AccumulateParams& params) {
  const T* partial = static_cast<const T*>(params.partial);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) store(params.sum + i, load(partial + i));
  if (const int64_t rest = params.num_values - i; rest > 0) {
    store(params.sum + i, load(partial + i, rest), rest);
  }
}

template <typename T>
SPARSE_UNIFIED_MULTIVERSION void round(const RoundParams& params) {
  T* out = static_cast<T*>(params.out);
  int64_t i = 0;
  for (; i + kLanes <= params.num_values; i += kLanes) store(out + i, load(params.sum + i));
  if (const int64_t rest = params.num_values - i; rest > 0) {
    store(out + i, load(params.sum + i, rest), rest);
  }
}

}  // namespace

void accumulate_cpu(const AccumulateParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { accumulate<T>(params); });
}

void widen_cpu(const AccumulateParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { widen<T>(params); });
}

void round_cpu(const RoundParams& params) {
  dispatch_dtype(params.dtype, [&]<typename T>(T) { round<T>(params); });
}

}  // namespace sparse_unified
