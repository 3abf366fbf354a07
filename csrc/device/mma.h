// SPDX-License-Identifier: Apache-2.0
// Tensor-core instructions of sm_80: 8 x 8 matrices from shared memory, and m16n8k16 products.
// Lane l of a fragment: row l / 4, columns 2 * (l % 4) and the next (PTX manual, "Matrix fragments
// for mma.m16n8k16").
#pragma once

#include "device/platform.h"
#include "sparse_unified/dtype.h"

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/mma.h"
#else

namespace sparse_unified {

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane l gives the address of row l % 8 of matrix l / 8
// (16 bytes, aligned) and gets two adjacent elements of each of the four matrices.
SPARSE_UNIFIED_DEVICE void load_matrix_x4(uint32_t (&fragment)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared)
               : "memory");
}

// The same with every matrix transposed.
SPARSE_UNIFIED_DEVICE void load_matrix_x4_transposed(uint32_t (&fragment)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared)
               : "memory");
}

// mma.sync.aligned.m16n8k16.row.col.f32: d [16, 8] += a [16, 16] * b [16, 8].
// a: {rows 0-7, k 0-7}, {rows 8-15, k 0-7}, {rows 0-7, k 8-15}, {rows 8-15, k 8-15};
// b: {k 0-7}, {k 8-15}, column l / 4; d: {row l / 4, two columns}, {row l / 4 + 8, two columns}.
template <typename T>
SPARSE_UNIFIED_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]);
template <>
SPARSE_UNIFIED_DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
SPARSE_UNIFIED_DEVICE void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sparse_unified

#endif
