// SPDX-License-Identifier: Apache-2.0
// Twin of device/mma.h.
#pragma once

namespace sparse_unified {

void load_matrix_x4(uint32_t (&fragment)[4], uint32_t shared);
void load_matrix_x4_transposed(uint32_t (&fragment)[4], uint32_t shared);

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace sparse_unified
