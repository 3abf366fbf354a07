// SPDX-License-Identifier: Apache-2.0
// Twin of the instructions of device/wgmma.h.
#pragma once

namespace sparse_unified {
namespace emulation {

// What the lanes of a warp say of a product; all but `d` must agree.
struct WgmmaLane {
  float* d;
  uint64_t a;
  uint64_t b;
  int32_t n;
  bool is_bfloat16;
  bool is_a_mn_major;
  bool is_b_mn_major;
  bool is_accumulating;
};

void issue_product(WgmmaLane lane);
void wait_for_products(int num_pending);

}  // namespace emulation

void wgmma_fence();
void wgmma_commit();

template <int kPending>
SPARSE_UNIFIED_DEVICE void wgmma_wait() {
  emulation::wait_for_products(kPending);
}

template <int kN>
struct Wgmma {
  template <typename T, Major kMajorA, Major kMajorB, int kCount>
  static void issue(float (&d)[kCount], uint64_t a, uint64_t b, bool is_accumulating) {
    static_assert(kN % 8 == 0 && kN <= 256 && kCount >= kN / 2);
    emulation::issue_product({d, a, b, kN, std::is_same_v<T, BFloat16>, kMajorA == Major::kMN,
                              kMajorB == Major::kMN, is_accumulating});
  }
};

}  // namespace sparse_unified
