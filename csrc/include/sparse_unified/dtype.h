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

}  // namespace sparse_unified
