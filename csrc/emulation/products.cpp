// SPDX-License-Identifier: Apache-2.0
#include "emulation/products.h"

#include <cstring>

#include "device/vector.h"

namespace sparse_unified::emulation {
namespace {

// d [M, N] += a [M, K] * b [K, N]. The compiler makes vectors of the rows; their width does not
// change the sums.
template <int kM, int kN, int kK>
SPARSE_UNIFIED_DEVICE void multiply_matrices(const float (&a)[kM][kK], const float (&b)[kK][kN],
                                             float (&d)[kM][kN]) {
  for (int m = 0; m < kM; ++m) {
    float row[kN];
    std::memcpy(row, d[m], sizeof(row));
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) row[n] += a[m][k] * b[k][n];
    }
    std::memcpy(d[m], row, sizeof(row));
  }
}

}  // namespace

template <typename T>
void multiply(ProductLane* lanes) {
  float a[16][16];
  float b[16][8];
  float d[16][8];
  for (int l = 0; l < 32; ++l) {
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
  multiply_matrices(a, b, d);
  for (int l = 0; l < 32; ++l) {
    const int group = l / 4;
    const int pair = 2 * (l % 4);
    std::memcpy(&lanes[l].d[0], &d[group][pair], 2 * sizeof(float));
    std::memcpy(&lanes[l].d[2], &d[group + 8][pair], 2 * sizeof(float));
  }
}

template void multiply<BFloat16>(ProductLane* lanes);
template void multiply<Float16>(ProductLane* lanes);

void multiply_rows(bool is_accumulating, int n, const float (*a)[kWgmmaRows],
                   const float (*b)[kWgmmaMaxN], float (*d)[kWgmmaMaxN]) {
  constexpr int kK = 16;
  for (int m = 0; m < kWgmmaRows; ++m) {
    float* row = d[m];
    if (!is_accumulating) std::memset(row, 0, static_cast<size_t>(n) * sizeof(float));
    for (int k = 0; k < kK; ++k) {
      const float factor = a[k][m];
      for (int i = 0; i < n; ++i) row[i] += factor * b[k][i];
    }
  }
}

}  // namespace sparse_unified::emulation
