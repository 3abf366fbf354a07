// SPDX-License-Identifier: Apache-2.0
// Every instruction of csrc/device that sm_90a adds, alone, against a formula for one element
// written from the PTX manual: "mbarrier", "cp.async.bulk.tensor", "Swizzling Modes", "wgmma
// Register Fragment and Shared Memory Matrix Layout", "bar.sync", "elect.sync", "setmaxnreg",
// "mapa", "barrier.cluster".
#include <utility>

#include "device/async_copy.h"
#include "device/barrier.h"
#include "device/cluster.h"
#include "device/launch.h"
#include "device/tensor_copy.h"
#include "device/warp.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "testing.h"

namespace sparse_unified::instructions {
namespace {

// Where a kernel puts its barriers, in front of its tiles, which start at a swizzle atom.
constexpr int kBarrierBytes = kSwizzleAtomBytes;

__device__ uint32_t tile_address() {
  return shared_address(dynamic_shared_memory()) + kBarrierBytes;
}
__device__ unsigned char* tile() { return dynamic_shared_memory() + kBarrierBytes; }
__device__ uint32_t barrier_address(int i) {
  return shared_address(dynamic_shared_memory()) + 8 * static_cast<uint32_t>(i);
}

struct PhaseParams {
  int32_t* out;  // [rounds, 32]
  int num_rounds;
};

// Warp 0 fills a slot, warp 1 empties it, many times: full and empty barrier, parities in turn.
__global__ void phase_kernel(const PhaseParams p) {
  auto* slot = reinterpret_cast<int32_t*>(tile());
  const uint32_t full = barrier_address(0), empty = barrier_address(1);
  if (threadIdx.x == 0) {
    barrier_init(full, 32);
    barrier_init(empty, 32);
    fence_barrier_init();
  }
  sync_threads();
  for (int round = 0; round < p.num_rounds; ++round) {
    if (warp_idx() == 0) {
      barrier_wait(empty, (round & 1) ^ 1);  // the phase before the first counts as ended
      slot[lane_idx()] = 100 * round + lane_idx();
      barrier_arrive(full);
    } else {
      barrier_wait(full, round & 1);
      p.out[32 * round + lane_idx()] = slot[31 - lane_idx()];
      barrier_arrive(empty);
    }
  }
}

void test_phases() {
  constexpr int kRounds = 9;
  DeviceArray<int32_t> out(kRounds * 32);
  check_launch(launch(phase_kernel, LaunchConfig{dim3(1), 64, kBarrierBytes + 128},
                      PhaseParams{out.get(), kRounds}));
  synchronize();
  for (int i = 0; i < kRounds * 32; ++i) {
    check_equal("slot", i, out[i], 100 * (i / 32) + 31 - i % 32);
  }
}

struct AfterCopiesParams {
  const int32_t* in;  // [128]
  int32_t* out;       // [128]
};

// 32 threads copy 16 bytes each; a barrier tells another warp when all have landed.
__global__ void after_copies_kernel(const AfterCopiesParams p) {
  if (threadIdx.x == 0) {
    barrier_init(barrier_address(0), 32);
    fence_barrier_init();
  }
  sync_threads();
  const int lane = lane_idx();
  if (warp_idx() == 0) {
    copy_async_16(tile_address() + 16 * static_cast<uint32_t>(lane), p.in + 4 * lane, 16);
    barrier_arrive_after_copies(barrier_address(0));
  } else {
    barrier_wait(barrier_address(0), 0);
    for (int i = 0; i < 4; ++i) {
      p.out[32 * i + lane] = reinterpret_cast<const int32_t*>(tile())[127 - 32 * i - lane];
    }
  }
}

void test_after_copies() {
  DeviceArray<int32_t> in(128), out(128);
  for (int i = 0; i < 128; ++i) in[i] = 3 * i + 1;
  check_launch(launch(after_copies_kernel, LaunchConfig{dim3(1), 64, kBarrierBytes + 512},
                      AfterCopiesParams{in.get(), out.get()}));
  synchronize();
  for (int i = 0; i < 128; ++i) check_equal("copied", i, out[i], in[127 - i]);
}

struct BoxParams {
  TensorMap source;
  TensorMap target;
  uint16_t* out;  // the box as it lies in shared memory
  int row, column, num_elements;
};

// One thread loads a box and stores it again; all dump it.
__global__ void box_kernel(const __grid_constant__ BoxParams p) {
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    prefetch_tensor_map(&p.source);
    barrier_init(barrier_address(0), 1);
    fence_barrier_init();
  }
  sync_threads();
  if (t == 0) {
    barrier_arrive_expect_bytes(barrier_address(0), 2 * p.num_elements);
    load_box(tile_address(), &p.source, p.row, p.column, barrier_address(0));
  }
  barrier_wait(barrier_address(0), 0);
  for (int i = t; i < p.num_elements; i += static_cast<int>(blockDim.x)) {
    p.out[i] = reinterpret_cast<const uint16_t*>(tile())[i];
  }
  fence_async_proxy();
  sync_threads();
  if (t == 0) {
    store_box(&p.target, p.row, p.column, tile_address());
    store_commit();
    store_wait_read<0>();
    store_wait<0>();
  }
}

// Boxes inside, across the right edge, across the lower edge, and of strided rows.
template <int kBoxColumns, bool kIsSwizzled>
void test_boxes() {
  constexpr int64_t kRows = 40, kColumns = 88, kStride = 104;
  constexpr int kBoxRows = 16;
  for (const auto& [row, column] : {std::pair{0, 0}, {8, 16}, {3, 40}, {32, 64}, {39, 8}}) {
    DeviceArray<BFloat16> in(kRows * kStride), out(kRows * kStride);
    DeviceArray<uint16_t> box(kBoxRows * kBoxColumns);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = stored<BFloat16>(static_cast<int>(i % 255));
    for (int64_t i = 0; i < out.size(); ++i) out[i] = stored<BFloat16>(-7);
    BoxParams p{{}, {}, box.get(), row, column, kBoxRows * kBoxColumns};
    check_launch(make_tensor_map(&p.source, DType::kBFloat16, in.get(), kRows, kColumns, kStride,
                                 kBoxRows, kBoxColumns, kIsSwizzled));
    check_launch(make_tensor_map(&p.target, DType::kBFloat16, out.get(), kRows, kColumns, kStride,
                                 kBoxRows, kBoxColumns, kIsSwizzled));
    check_launch(launch(box_kernel,
                        LaunchConfig{dim3(1), 128, kBarrierBytes + 2 * kBoxRows * kBoxColumns}, p));
    synchronize();
    for (int r = 0; r < kBoxRows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const bool inside = row + r < kRows && column + c < kColumns;
        const double expected = inside ? value(in[(row + r) * kStride + column + c]) : 0;
        // Bits 4 to 6 of the byte offset are XORed with bits 7 to 9, in the 64-byte swizzle bits 4
        // and 5 with bits 7 and 8.
        int offset = 2 * (r * kBoxColumns + c);
        if (kIsSwizzled) offset ^= (offset >> 7 & (kBoxColumns / 8 - 1)) << 4;
        check_equal("loaded", offset / 2, value(BFloat16{box[offset / 2]}), expected);
      }
    }
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t r = i / kStride, c = i % kStride;
      const bool stored_here =
          r >= row && r < row + kBoxRows && c >= column && c < column + kBoxColumns && c < kColumns;
      check_equal("stored", i, value(out[i]), stored_here ? value(in[i]) : -7.0);
    }
  }
}

struct ClusterParams {
  int32_t* out;  // [grid blocks, 3, 32]
  int num_blocks;
};

// Every block says its rank; the warps of two blocks arrive at each other's barriers, round by
// round, and what one wrote the other reads after the cluster's barrier. A block may be alone.
__global__ void cluster_kernel(const ClusterParams p) {
  constexpr int kRounds = 5;
  const int rank = cluster_rank();
  const int other = (rank ^ 1) % p.num_blocks;
  if (threadIdx.x == 0) {
    barrier_init(barrier_address(1), 32);
    fence_barrier_init();
  }
  sync_cluster();
  const auto slot = [&](int block, int row) {
    const int first_block = static_cast<int>(blockIdx.x) - rank;
    return p.out + ((first_block + block) * 3 + row) * kWarpSize + lane_idx();
  };
  *slot(rank, 0) = rank;
  for (int round = 0; round < kRounds; ++round) {
    barrier_arrive_cluster(map_to_block(barrier_address(1), other));
    barrier_wait(barrier_address(1), round & 1);
    sync_warp();  // a lane that waits while others arrive again would miss the phase
  }
  *slot(rank, 1) = 100 * rank + lane_idx();
  sync_cluster();
  *slot(rank, 2) = *slot(other, 1);
}

void test_clusters() {
  for (const int num_blocks : {1, 2, 4}) {
    constexpr int kClusters = 3;
    DeviceArray<int32_t> out(kClusters * num_blocks * 3 * 32);
    LaunchConfig config{dim3(static_cast<unsigned>(kClusters * num_blocks)), 32, kBarrierBytes};
    config.cluster_blocks = num_blocks;
    check_launch(launch(cluster_kernel, config, ClusterParams{out.get(), num_blocks}));
    synchronize();
    for (int block = 0; block < kClusters * num_blocks; ++block) {
      const int rank = block % num_blocks;
      for (int lane = 0; lane < 32; ++lane) {
        const int at = block * 3 * 32 + lane;
        check_equal("rank", at, out[at], rank);
        check_equal("own", at, out[at + 32], 100 * rank + lane);
        check_equal("of the other block", at, out[at + 64], 100 * ((rank ^ 1) % num_blocks) + lane);
      }
    }
  }
}

struct MulticastParams {
  TensorMap source;
  uint16_t* out;  // [blocks, num_elements]: the boxes as they lie in each block
  int num_blocks;
  int num_boxes;  // one more than blocks: the last goes to block 0 alone
  int box_elements;
};

// Block b brings box b to all blocks, and block 1 the last one to block 0.
__global__ void multicast_kernel(const __grid_constant__ MulticastParams p) {
  const int rank = cluster_rank();
  const int box_bytes = 2 * p.box_elements;
  const uint32_t barrier = barrier_address(0);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
  }
  for (int i = static_cast<int>(threadIdx.x); i < p.num_boxes * p.box_elements; i += 32) {
    reinterpret_cast<uint16_t*>(tile())[i] = 7;
  }
  fence_async_proxy();
  sync_cluster();
  if (threadIdx.x == 0) {
    const auto all = static_cast<uint16_t>((1 << p.num_blocks) - 1);
    barrier_arrive_expect_bytes(barrier, (p.num_blocks + (rank == 0 ? 1 : 0)) * box_bytes);
    load_box_to_blocks(tile_address() + static_cast<uint32_t>(rank * box_bytes), &p.source,
                       16 * rank, 0, barrier, all);
    if (rank == 1) {
      load_box_to_blocks(tile_address() + static_cast<uint32_t>(p.num_blocks * box_bytes),
                         &p.source, 16 * p.num_blocks, 0, barrier, 1);
    }
  }
  barrier_wait(barrier, 0);
  const int num_elements = p.num_boxes * p.box_elements;
  for (int i = static_cast<int>(threadIdx.x); i < num_elements; i += 32) {
    p.out[rank * num_elements + i] = reinterpret_cast<const uint16_t*>(tile())[i];
  }
  sync_cluster();
}

void test_multicast() {
  constexpr int kBoxRows = 16, kBoxColumns = 64;
  constexpr int kBoxElements = kBoxRows * kBoxColumns;
  for (const int num_blocks : {2, 4}) {
    const int num_boxes = num_blocks + 1;
    DeviceArray<BFloat16> in(num_boxes * kBoxElements);
    DeviceArray<uint16_t> out(num_blocks * num_boxes * kBoxElements);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = stored<BFloat16>(static_cast<int>(i % 251));
    MulticastParams p{{}, out.get(), num_blocks, num_boxes, kBoxElements};
    check_launch(make_tensor_map(&p.source, DType::kBFloat16, in.get(), num_boxes * kBoxRows,
                                 kBoxColumns, kBoxColumns, kBoxRows, kBoxColumns, true));
    LaunchConfig config{dim3(static_cast<unsigned>(num_blocks)), 32,
                        kBarrierBytes + 2 * num_boxes * kBoxElements};
    config.cluster_blocks = num_blocks;
    check_launch(launch(multicast_kernel, config, p));
    synchronize();
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t block = i / (num_boxes * kBoxElements);
      const int64_t at = i % (num_boxes * kBoxElements);
      // 128-byte swizzle: bits 4 to 6 of the byte offset are XORed with bits 7 to 9.
      const int64_t source = (2 * at ^ (2 * at >> 7 & 7) << 4) / 2;
      const bool is_brought = at < num_blocks * kBoxElements || block == 0;
      check_equal("brought", i, out[i], is_brought ? in[source].bits : 7);
    }
  }
}

template <typename T>
struct ProductParams {
  const T* a;  // [64, 64]: m, k
  const T* b;  // [N, 64]: n, k
  float* d;    // [2, 64, N]: of the first 16 k alone, and of 3 times all
};

// Byte offset of element (mn, k) of an operand: rows of `row_bytes` of the contiguous index,
// swizzled; MN-major blocks of 64 rows one behind the other.
__device__ int operand_offset(int mn, int k, Major major, int row_bytes = kSwizzleRowBytes) {
  const int row = major == Major::kK ? mn : k;
  const int elements = row_bytes / 2;
  const int column = major == Major::kK ? k : mn % elements;
  const int block = major == Major::kK ? 0 : mn / elements * 64 * row_bytes;
  const int offset = row * row_bytes + 2 * column;
  return block + (offset ^ (offset >> 7 & (row_bytes / 16 - 1)) << 4);
}

template <typename T, int kN, Major kMajorA, Major kMajorB, int kRowBytesB>
__global__ void __launch_bounds__(128, 1) product_kernel(const ProductParams<T> p) {
#if defined(SPARSE_UNIFIED_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kBytesA = 64 * 64 * 2;
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 64 * 64; i += 128) {
    *reinterpret_cast<T*>(tile() + operand_offset(i / 64, i % 64, kMajorA)) = p.a[i];
  }
  for (int i = t; i < kN * 64; i += 128) {
    const int offset = operand_offset(i / 64, i % 64, kMajorB, kRowBytesB);
    *reinterpret_cast<T*>(tile() + kBytesA + offset) = p.b[i];
  }
  fence_async_proxy();
  sync_threads();
  constexpr int kBlockBytes = 64 * kSwizzleRowBytes;
  const uint64_t a = operand_descriptor(tile_address(), kMajorA, kBlockBytes);
  const uint64_t b =
      operand_descriptor(tile_address() + kBytesA, kMajorB, 64 * kRowBytesB, kRowBytesB);
  constexpr uint64_t kStepA = (kMajorA == Major::kK ? 32 : 16 * kSwizzleRowBytes) >> 4;
  constexpr uint64_t kStepB = (kMajorB == Major::kK ? 32 : 16 * kRowBytesB) >> 4;
  const auto store = [&](const float (&d)[kN / 2], float* out) {
    const int row = 16 * warp_idx() + lane_idx() / 4;
    for (int j = 0; j < kN / 8; ++j) {
      const int column = 8 * j + 2 * (lane_idx() % 4);
      out[row * kN + column] = d[4 * j];
      out[row * kN + column + 1] = d[4 * j + 1];
      out[(row + 8) * kN + column] = d[4 * j + 2];
      out[(row + 8) * kN + column + 1] = d[4 * j + 3];
    }
  };
  float d[kN / 2];
  for (float& element : d) element = 1e30f;  // not accumulating leaves nothing of it
  wgmma_fence();
  wgmma<T, kN, kMajorA, kMajorB>(d, a, b, false);
  wgmma_commit();
  wgmma_wait<0>();
  store(d, p.d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 12; ++step) {
    const auto k = static_cast<uint64_t>(step % 4);
    wgmma<T, kN, kMajorA, kMajorB>(d, a + k * kStepA, b + k * kStepB, step > 0);
    if (step % 4 == 3) wgmma_commit();
  }
  wgmma_wait<0>();
  store(d, p.d + 64 * kN);
#else
  device_check(false);
#endif
}

template <typename T, int kN, Major kMajorA, Major kMajorB, int kRowBytesB = kSwizzleRowBytes>
void test_product() {
  char name[64];
  std::snprintf(name, sizeof(name), "wgmma %s n%d a %s b %s%s", Half<T>::kName, kN,
                kMajorA == Major::kK ? "K" : "M", kMajorB == Major::kK ? "K" : "N",
                kRowBytesB == kSwizzleRowBytes ? "" : " narrow");
  test(name, [] {
    DeviceArray<T> a(64 * 64), b(kN * 64);
    DeviceArray<float> d(2 * 64 * kN);
    for (int i = 0; i < 64 * 64; ++i) a[i] = stored<T>(draw(i));
    for (int i = 0; i < kN * 64; ++i) b[i] = stored<T>(draw(10000 + i));
    constexpr int kBytes = kBarrierBytes + 64 * 128 + (kN + 63) / 64 * 64 * 128;
    check_launch(launch(product_kernel<T, kN, kMajorA, kMajorB, kRowBytesB>,
                        LaunchConfig{dim3(1), 128, kBytes},
                        ProductParams<T>{a.get(), b.get(), d.get()}));
    synchronize();
    for (int i = 0; i < 64 * kN; ++i) {
      double first = 0, all = 0;
      for (int k = 0; k < 64; ++k) {
        const double term = value(a[i / kN * 64 + k]) * value(b[i % kN * 64 + k]);
        first += k < 16 ? term : 0;
        all += 3 * term;
      }
      check_equal("first 16 k", i, d[i], first);
      check_equal("three times 64 k", i, d[64 * kN + i], all);
    }
  });
}

template <typename T>
void test_products() {
  test_product<T, 128, Major::kK, Major::kK>();
  test_product<T, 240, Major::kK, Major::kK>();
  test_product<T, 256, Major::kK, Major::kK>();
  test_product<T, 128, Major::kMN, Major::kK>();
  test_product<T, 128, Major::kK, Major::kMN>();
  test_product<T, 128, Major::kMN, Major::kMN>();
  test_product<T, 256, Major::kMN, Major::kMN>();
  // In 64-byte swizzle, as the last columns of a group come.
  test_product<T, 64, Major::kK, Major::kMN, kNarrowRowBytes>();
  test_product<T, 96, Major::kK, Major::kMN, kNarrowRowBytes>();
  test_product<T, 128, Major::kK, Major::kMN, kNarrowRowBytes>();
  test_product<T, 160, Major::kMN, Major::kMN, kNarrowRowBytes>();
  test_product<T, 192, Major::kMN, Major::kMN, kNarrowRowBytes>();
  test_product<T, 224, Major::kMN, Major::kMN, kNarrowRowBytes>();
}

struct RoleParams {
  int32_t* out;      // [384]
  int32_t* elected;  // [3, 4]: lanes elected of each warp
};

// A producer gives registers up, two consumers take them; the consumers meet at a barrier of
// their own while the producer does not come.
__global__ void __launch_bounds__(384, 1) role_kernel(const RoleParams p) {
#if defined(SPARSE_UNIFIED_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  auto* shared = reinterpret_cast<int32_t*>(tile());
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t elected = ballot(elect_lane());
  if (lane_idx() == 0) p.elected[warp_idx()] = count_bits(elected);
  if (t / kWarpgroupSize == 0) {
    decrease_registers<40>();
    p.out[t] = -t;
  } else {
    increase_registers<232>();
    shared[t - kWarpgroupSize] = t;
    sync_named(3, 2 * kWarpgroupSize);
    p.out[t] = shared[255 - (t - kWarpgroupSize)];
  }
#else
  device_check(false);
#endif
}

void test_roles() {
  DeviceArray<int32_t> out(384), elected(12);
  check_launch(launch(role_kernel, LaunchConfig{dim3(1), 384, kBarrierBytes + 1024},
                      RoleParams{out.get(), elected.get()}));
  synchronize();
  for (int t = 0; t < 384; ++t) check_equal("role", t, out[t], t < 128 ? -t : 383 - (t - 128));
  for (int warp = 0; warp < 12; ++warp) check_equal("elected", warp, elected[warp], 1);
}

struct ChainParams {
  int32_t* numbers;  // [256]
};

__global__ void chain_kernel(const ChainParams p) {
  wait_for_previous_kernel();
  p.numbers[threadIdx.x] = 2 * p.numbers[threadIdx.x] + 1;
  allow_next_kernel();
}

void test_chain() {
  DeviceArray<int32_t> numbers(256);
  for (int i = 0; i < 256; ++i) numbers[i] = i;
  const ChainParams params{numbers.get()};
  for (int i = 0; i < 5; ++i) {
    check_launch(launch(chain_kernel, LaunchConfig{dim3(1), 256}, params));
  }
  synchronize();
  for (int i = 0; i < 256; ++i) check_equal("chain", i, numbers[i], 32 * i + 31);
}

int run() {
  test("mbarrier phases", test_phases);
  test("cp.async and mbarrier", test_after_copies);
  test("TMA boxes", test_boxes<24, false>);
  test("TMA boxes, swizzled", test_boxes<64, true>);
  test("TMA boxes, swizzled by 64 bytes", test_boxes<32, true>);
  test("clusters", test_clusters);
  test("TMA boxes to several blocks", test_multicast);
  test_products<BFloat16>();
  test_products<Float16>();
  test("setmaxnreg, bar.sync, elect", test_roles);
  test("dependent launches", test_chain);
  return failures() != 0;
}

}  // namespace
}  // namespace sparse_unified::instructions

int main() { return sparse_unified::instructions::run(); }
