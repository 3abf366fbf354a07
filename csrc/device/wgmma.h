// SPDX-License-Identifier: Apache-2.0
// wgmma: products of a warpgroup (sm_90a; kernels leave their bodies empty but for a trap where
// __CUDA_ARCH_FEAT_SM90_ALL is not defined), operands in shared memory, accumulators in registers.
//
// Thread t of a warpgroup (warp w = t / 32, lane l) holds of the [64, N] accumulator rows
// 16 w + l / 4 and the one 8 below, in each 8-column group j columns 8 j + 2 (l % 4) and the next:
// d[4 j], d[4 j + 1] of the upper row, d[4 j + 2], d[4 j + 3] of the lower.
#pragma once

#include <type_traits>

#include "device/platform.h"
#include "sparse_unified/dtype.h"

namespace sparse_unified {

// Bytes of one row of the 128-byte swizzle, of the group of 8 rows that it repeats after.
constexpr int kSwizzleRowBytes = 128;
constexpr int kSwizzleAtomBytes = 8 * kSwizzleRowBytes;
// And of one row of the 64-byte swizzle, for MN-major operands that are no multiple of 64 wide.
constexpr int kNarrowRowBytes = 64;

// Offset of 16-byte chunk `chunk` (0 to 7) of row `row` in a swizzled tile that starts at a
// multiple of kSwizzleAtomBytes.
SPARSE_UNIFIED_HOST_DEVICE constexpr int swizzled_offset(int row, int chunk) {
  return row * kSwizzleRowBytes + ((chunk ^ (row % 8)) * 16);
}

// What a descriptor grows by from one step of 16 k to the next: 32 bytes in a K-major tile, two
// groups of 8 rows in an MN-major one, in units of 16 bytes.
constexpr uint64_t kDescriptorStepK = 32 >> 4;
constexpr uint64_t kDescriptorStepMN = 2 * kSwizzleAtomBytes >> 4;
constexpr uint64_t kDescriptorStepNarrow = 16 * kNarrowRowBytes >> 4;

// The shared-memory descriptor of an operand in 128-byte swizzle, whose tile starts at `shared`.
//   K-major:  rows of 64 k elements, 8-row groups kSwizzleAtomBytes apart.
//   MN-major: rows (k) of 64 m or n elements, 8-row groups kSwizzleAtomBytes apart; the next 64
//             elements of m or n are `mn_stride_bytes` further.
// With `row_bytes` of kNarrowRowBytes, of 32 elements in 64-byte swizzle.
SPARSE_UNIFIED_HOST_DEVICE uint64_t operand_descriptor(uint32_t shared, Major major,
                                                       int mn_stride_bytes = 16,
                                                       int row_bytes = kSwizzleRowBytes) {
  const uint64_t address = (shared & 0x3ffffu) >> 4;
  const uint64_t leading = static_cast<uint64_t>(major == Major::kK ? 16 : mn_stride_bytes) >> 4;
  const uint64_t stride = static_cast<uint64_t>(8 * row_bytes) >> 4;
  const uint64_t swizzle = row_bytes == kSwizzleRowBytes ? 1 : 2;
  return address | leading << 16 | stride << 32 | swizzle << 62;
}

}  // namespace sparse_unified

#if defined(SPARSE_UNIFIED_EMULATION)
#include "emulation/wgmma.h"
#else

namespace sparse_unified {

// wgmma.fence: before the first product, and after registers of the accumulator were touched.
SPARSE_UNIFIED_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// wgmma.commit_group: the products issued since the last commit become a group.
SPARSE_UNIFIED_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// wgmma.wait_group: until at most `kPending` groups are under way; accumulators and operands of the
// others may be touched.
template <int kPending>
SPARSE_UNIFIED_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Ten operands as the text of an instruction names them, and as the compiler binds them; `t` is
// the number without its last digit.
#define SPARSE_UNIFIED_NAMES(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define SPARSE_UNIFIED_BOUND(t)                                                             \
  "+f"(d[t##0]), "+f"(d[t##1]), "+f"(d[t##2]), "+f"(d[t##3]), "+f"(d[t##4]), "+f"(d[t##5]), \
      "+f"(d[t##6]), "+f"(d[t##7]), "+f"(d[t##8]), "+f"(d[t##9])

// The product of one N. `names` are those of the N / 2 accumulators, `a` to `y` those of the
// operands after them, the rest binds the accumulators.
#define SPARSE_UNIFIED_WGMMA_TYPE(n, type, names, a, b, p, x, y, ...)                             \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " p                            \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, " a \
               ", " b ", accumulate, 1, 1, " x ", " y ";\n}\n"                                    \
               : __VA_ARGS__                                                                      \
               : "l"(a_tile), "l"(b_tile), "r"(static_cast<int>(is_accumulating)),                \
                 "n"(kMajorA == Major::kMN), "n"(kMajorB == Major::kMN))
#define SPARSE_UNIFIED_WGMMA(n, names, a, b, p, x, y, ...)                                        \
  template <>                                                                                     \
  struct Wgmma<n> {                                                                               \
    template <typename T, Major kMajorA, Major kMajorB, int kCount>                               \
    static SPARSE_UNIFIED_DEVICE void issue(float (&d)[kCount], uint64_t a_tile, uint64_t b_tile, \
                                            bool is_accumulating) {                               \
      static_assert(kCount >= n / 2);                                                             \
      if constexpr (std::is_same_v<T, BFloat16>) {                                                \
        SPARSE_UNIFIED_WGMMA_TYPE(n, "bf16", names, a, b, p, x, y, __VA_ARGS__);                  \
      } else {                                                                                    \
        SPARSE_UNIFIED_WGMMA_TYPE(n, "f16", names, a, b, p, x, y, __VA_ARGS__);                   \
      }                                                                                           \
    }                                                                                             \
  }

template <int kN>
struct Wgmma;

SPARSE_UNIFIED_WGMMA(64,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1)
                         SPARSE_UNIFIED_NAMES(2) "%30,%31",
                     "%32", "%33", "%34", "%35", "%36", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), "+f"(d[30]), "+f"(d[31]));
SPARSE_UNIFIED_WGMMA(96,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) "%40,%41,%42,%43,%44,%45,%46,%47",
                     "%48", "%49", "%50", "%51", "%52", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]),
                     "+f"(d[46]), "+f"(d[47]));
SPARSE_UNIFIED_WGMMA(128,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4)
                             SPARSE_UNIFIED_NAMES(5) "%60,%61,%62,%63",
                     "%64", "%65", "%66", "%67", "%68", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), "+f"(d[60]), "+f"(d[61]),
                     "+f"(d[62]), "+f"(d[63]));
SPARSE_UNIFIED_WGMMA(160,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4) SPARSE_UNIFIED_NAMES(5)
                             SPARSE_UNIFIED_NAMES(6) "%70,%71,%72,%73,%74,%75,%76,%77,%78,%79",
                     "%80", "%81", "%82", "%83", "%84", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), SPARSE_UNIFIED_BOUND(6),
                     SPARSE_UNIFIED_BOUND(7));
SPARSE_UNIFIED_WGMMA(192,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4) SPARSE_UNIFIED_NAMES(5)
                             SPARSE_UNIFIED_NAMES(6) SPARSE_UNIFIED_NAMES(7)
                                 SPARSE_UNIFIED_NAMES(8) "%90,%91,%92,%93,%94,%95",
                     "%96", "%97", "%98", "%99", "%100", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), SPARSE_UNIFIED_BOUND(6),
                     SPARSE_UNIFIED_BOUND(7), SPARSE_UNIFIED_BOUND(8), "+f"(d[90]), "+f"(d[91]),
                     "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]));
SPARSE_UNIFIED_WGMMA(224,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4) SPARSE_UNIFIED_NAMES(5)
                             SPARSE_UNIFIED_NAMES(6) SPARSE_UNIFIED_NAMES(7) SPARSE_UNIFIED_NAMES(8)
                                 SPARSE_UNIFIED_NAMES(9) SPARSE_UNIFIED_NAMES(10) "%110,%111",
                     "%112", "%113", "%114", "%115", "%116", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), SPARSE_UNIFIED_BOUND(6),
                     SPARSE_UNIFIED_BOUND(7), SPARSE_UNIFIED_BOUND(8), SPARSE_UNIFIED_BOUND(9),
                     SPARSE_UNIFIED_BOUND(10), "+f"(d[110]), "+f"(d[111]));
SPARSE_UNIFIED_WGMMA(240,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4) SPARSE_UNIFIED_NAMES(5)
                             SPARSE_UNIFIED_NAMES(6) SPARSE_UNIFIED_NAMES(7) SPARSE_UNIFIED_NAMES(8)
                                 SPARSE_UNIFIED_NAMES(9) SPARSE_UNIFIED_NAMES(10) "%110,%111,%112,"
                     "%113,%114,%115,%116,%117,%118,%119",
                     "%120", "%121", "%122", "%123", "%124", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), SPARSE_UNIFIED_BOUND(6),
                     SPARSE_UNIFIED_BOUND(7), SPARSE_UNIFIED_BOUND(8), SPARSE_UNIFIED_BOUND(9),
                     SPARSE_UNIFIED_BOUND(10), SPARSE_UNIFIED_BOUND(11));
SPARSE_UNIFIED_WGMMA(256,
                     SPARSE_UNIFIED_NAMES() SPARSE_UNIFIED_NAMES(1) SPARSE_UNIFIED_NAMES(2)
                         SPARSE_UNIFIED_NAMES(3) SPARSE_UNIFIED_NAMES(4) SPARSE_UNIFIED_NAMES(5)
                             SPARSE_UNIFIED_NAMES(6) SPARSE_UNIFIED_NAMES(7) SPARSE_UNIFIED_NAMES(8)
                                 SPARSE_UNIFIED_NAMES(9) SPARSE_UNIFIED_NAMES(10)
                                     SPARSE_UNIFIED_NAMES(11) "%120,%121,%122,%123,%124,%125,"
                     "%126,%127",
                     "%128", "%129", "%130", "%131", "%132", SPARSE_UNIFIED_BOUND(),
                     SPARSE_UNIFIED_BOUND(1), SPARSE_UNIFIED_BOUND(2), SPARSE_UNIFIED_BOUND(3),
                     SPARSE_UNIFIED_BOUND(4), SPARSE_UNIFIED_BOUND(5), SPARSE_UNIFIED_BOUND(6),
                     SPARSE_UNIFIED_BOUND(7), SPARSE_UNIFIED_BOUND(8), SPARSE_UNIFIED_BOUND(9),
                     SPARSE_UNIFIED_BOUND(10), SPARSE_UNIFIED_BOUND(11), "+f"(d[120]), "+f"(d[121]),
                     "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]),
                     "+f"(d[127]));

#undef SPARSE_UNIFIED_NAMES
#undef SPARSE_UNIFIED_BOUND
#undef SPARSE_UNIFIED_WGMMA
#undef SPARSE_UNIFIED_WGMMA_TYPE

}  // namespace sparse_unified

#endif

namespace sparse_unified {

// wgmma.mma_async.m64nNk16.f32: d [64, N] = (is_accumulating ? d : 0) + a [64, 16] * b [N, 16]^T,
// operands by descriptor; d may hold more than N columns. T is bf16 or fp16.
template <typename T, int kN, Major kMajorA = Major::kK, Major kMajorB = Major::kK, int kCount>
SPARSE_UNIFIED_DEVICE void wgmma(float (&d)[kCount], uint64_t a_tile, uint64_t b_tile,
                                 bool is_accumulating) {
  Wgmma<kN>::template issue<T, kMajorA, kMajorB>(d, a_tile, b_tile, is_accumulating);
}

// Until all products are done. The accumulators pass through, so that no use of them moves in front
// of the wait, which would make the compiler run the products one by one.
template <int kCount>
SPARSE_UNIFIED_DEVICE void wgmma_finish([[maybe_unused]] float (&d)[kCount]) {
  wgmma_wait<0>();
#if !defined(SPARSE_UNIFIED_EMULATION)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

}  // namespace sparse_unified
