// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.sync.
#include "device/mma.h"

#include "emulation/block.h"
#include "emulation/products.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

constexpr int kMatrixRows = 8;
constexpr int kRowBytes = 16;

struct LoadLane {
  uint32_t shared;
  uint32_t fragment[4];
};

template <bool kIsTransposed>
void load_matrix(const char* name, uint32_t (&fragment)[4], uint32_t shared, const void* code) {
  const InEmulator in_emulator;
  LoadLane lane{};
  lane.shared = shared;
  const void* row = shared_pointer(name, shared, kRowBytes, kRowBytes);
  race::access(current->idx, row, kRowBytes, race::Kind::kRead, code);
  warp_collective<LoadLane>(name, lane, [](LoadLane* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[kMatrixRows][kMatrixRows];
      for (int row = 0; row < kMatrixRows; ++row) {
        const uint32_t address = lanes[matrix * kMatrixRows + row].shared;
        std::memcpy(elements[row], shared_pointer("ldmatrix", address, kRowBytes, kRowBytes),
                    kRowBytes);
      }
      for (int l = 0; l < kLanes; ++l) {
        const int row = l / 4;
        const int column = 2 * (l % 4);
        const uint32_t low = kIsTransposed ? elements[column][row] : elements[row][column];
        const uint32_t high = kIsTransposed ? elements[column + 1][row] : elements[row][column + 1];
        lanes[l].fragment[matrix] = low | high << 16;
      }
    }
  });
  std::memcpy(fragment, lane.fragment, sizeof(lane.fragment));
}

template <typename T>
void multiply_add_warp(const char* name, float (&d)[4], const uint32_t (&a)[4],
                       const uint32_t (&b)[2]) {
  const InEmulator in_emulator;
  ProductLane lane;
  std::memcpy(lane.d, d, sizeof(lane.d));
  std::memcpy(lane.a, a, sizeof(lane.a));
  std::memcpy(lane.b, b, sizeof(lane.b));
  warp_collective<ProductLane>(name, lane, multiply<T>);
  std::memcpy(d, lane.d, sizeof(lane.d));
}

}  // namespace
}  // namespace emulation

void load_matrix_x4(uint32_t (&fragment)[4], uint32_t shared) {
  emulation::load_matrix<false>("load_matrix_x4", fragment, shared, __builtin_return_address(0));
}
void load_matrix_x4_transposed(uint32_t (&fragment)[4], uint32_t shared) {
  emulation::load_matrix<true>("load_matrix_x4_transposed", fragment, shared,
                               __builtin_return_address(0));
}

template <>
void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add_warp<BFloat16>("multiply_add<BFloat16>", d, a, b);
}
template <>
void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add_warp<Float16>("multiply_add<Float16>", d, a, b);
}

}  // namespace sparse_unified
