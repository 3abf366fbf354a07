// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.sync.
#include "device/mma.h"

#include "device/vector.h"
#include "emulation/block.h"
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
  warp_collective(name, &lane, sizeof(lane), [](void* data) {
    auto* lanes = static_cast<LoadLane*>(data);
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

struct ProductLane {
  float d[4];
  uint32_t a[4];
  uint32_t b[2];
};

// One product of a warp, from fragments to matrices and back; fp32 sums in the order of k.
template <typename T>
void multiply(void* data) {
  constexpr int kM = 16;
  constexpr int kN = 8;
  constexpr int kK = 16;
  auto* lanes = static_cast<ProductLane*>(data);
  float a[kM][kK];
  float b[kK][kN];
  float d[kM][kN];
  for (int l = 0; l < kLanes; ++l) {
    const ProductLane& lane = lanes[l];
    const int group = l / 4;
    const int pair = 2 * (l % 4);
    unpack<T>(lane.a[0], a[group][pair], a[group][pair + 1]);
    unpack<T>(lane.a[1], a[group + 8][pair], a[group + 8][pair + 1]);
    unpack<T>(lane.a[2], a[group][pair + 8], a[group][pair + 9]);
    unpack<T>(lane.a[3], a[group + 8][pair + 8], a[group + 8][pair + 9]);
    unpack<T>(lane.b[0], b[pair][group], b[pair + 1][group]);
    unpack<T>(lane.b[1], b[pair + 8][group], b[pair + 9][group]);
    std::memcpy(&d[group][pair], &lane.d[0], 2 * sizeof(float));
    std::memcpy(&d[group + 8][pair], &lane.d[2], 2 * sizeof(float));
  }
  for (int m = 0; m < kM; ++m) {
    float row[kN];
    std::memcpy(row, d[m], sizeof(row));
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) row[n] += a[m][k] * b[k][n];
    }
    std::memcpy(d[m], row, sizeof(row));
  }
  for (int l = 0; l < kLanes; ++l) {
    const int group = l / 4;
    const int pair = 2 * (l % 4);
    std::memcpy(&lanes[l].d[0], &d[group][pair], 2 * sizeof(float));
    std::memcpy(&lanes[l].d[2], &d[group + 8][pair], 2 * sizeof(float));
  }
}

template <typename T>
void multiply_add_warp(const char* name, float (&d)[4], const uint32_t (&a)[4],
                       const uint32_t (&b)[2]) {
  const InEmulator in_emulator;
  ProductLane lane;
  std::memcpy(lane.d, d, sizeof(lane.d));
  std::memcpy(lane.a, a, sizeof(lane.a));
  std::memcpy(lane.b, b, sizeof(lane.b));
  warp_collective(name, &lane, sizeof(lane), multiply<T>);
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
