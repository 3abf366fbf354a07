// SPDX-License-Identifier: Apache-2.0
// Element types that every op takes, as storage and as a run-time tag.
#pragma once

#include <cstdint>

namespace sparse_unified {

enum class DType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// run(T{}) with the storage type T of `dtype`.
template <class Run>
auto dispatch_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
  }
  __builtin_unreachable();
}

// The same for the 16-bit types, which tensor cores take.
template <class Run>
auto dispatch_half(DType dtype, const Run& run) {
  return dtype == DType::kBFloat16 ? run(BFloat16{}) : run(Float16{});
}

}  // namespace sparse_unified
