// SPDX-License-Identifier: Apache-2.0
// wgmma, warp by warp: a product reads its operands from the view of the asynchronous proxy at some
// time between its issue and the wait for its group. In between the accumulators hold NaN.
#include "device/wgmma.h"

#include <algorithm>
#include <deque>
#include <limits>

#include "device/vector.h"
#include "emulation/async_proxy.h"
#include "emulation/products.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

constexpr int kM = kWgmmaRows;  // of a warp; a warpgroup has 64
constexpr int kK = 16;
constexpr int kMaxN = kWgmmaMaxN;
constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;

struct Product {
  WgmmaLane what;  // but for d
  int group;
  bool is_done;
};

// The accumulators of one array d in the lanes of a warp, while products on them are under way.
struct Accumulators {
  float* lanes[kLanes];
  float values[kM][kMaxN];
  int n;
  std::vector<Product> products;
};

struct WarpProducts {
  std::vector<Accumulators> accumulators;
  int group = 0;           // that the next product belongs to
  int64_t num_issued = 0;  // products
  bool is_fenced = false;
};

std::vector<WarpProducts> warps;

// The products that not all four warps of a warpgroup have issued yet.
struct WarpgroupProducts {
  struct Issued {
    WgmmaLane what;  // but for d
    int num_warps;
  };
  std::deque<Issued> issued;
  int64_t first = 0;  // number of the oldest
};

constexpr int kWarpgroupWarps = 4;
std::vector<WarpgroupProducts> warpgroups;

// What the lanes did comes before the products, or the other way round.
void order_lanes_before_products() {
  const int warp = current->warp();
  for (int l = 0; l < kLanes; ++l) race::order(warp * kLanes + l, race::products_of(warp));
}
void order_products_before_lanes() {
  const int warp = current->warp();
  for (int l = 0; l < kLanes; ++l) race::order(race::products_of(warp), warp * kLanes + l);
}

WarpProducts& mine() { return warps[static_cast<size_t>(current->warp())]; }

// Row and column of accumulator i of lane l (PTX manual, "wgmma: register fragments, D").
int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// PTX manual, "Matrix descriptor format" and "Shared memory layout": 128- and 64-byte swizzle.
struct Descriptor {
  uint32_t start;
  uint32_t leading;
  uint32_t stride;
  uint32_t row_bytes;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        row_bytes(bits >> 62 == 1 ? kSwizzleRowBytes : kNarrowRowBytes) {
    if (bits >> 62 != 1 && bits >> 62 != 2) {
      fail("wgmma: the swizzle of a descriptor must be 1 (128 bytes) or 2 (64)");
    }
    if (bits >> 49 & 7) fail("wgmma: the base offset of a descriptor must be 0");
  }

  // The 8 elements from (mn, k) on that are contiguous: along k, or along m or n.
  const uint16_t* chunk(int mn, int k, bool is_mn_major) const {
    const auto row = static_cast<uint32_t>(is_mn_major ? k : mn);
    const auto along = static_cast<uint32_t>(is_mn_major ? mn : k);
    const uint32_t elements = row_bytes / 2;
    uint32_t address = start + row / 8 * stride + row % 8 * row_bytes + along % elements * 2;
    if (is_mn_major) address += along / elements * leading;
    address ^= (address >> 7 & (row_bytes / kChunkBytes - 1)) << 4;
    race::access(race::products_of(current->warp()),
                 shared_pointer("wgmma", address, kChunkBytes, kChunkBytes), kChunkBytes,
                 race::Kind::kRead, reinterpret_cast<const void*>(&issue_product));
    return static_cast<const uint16_t*>(
        async_pointer("wgmma", current->rank, address, kChunkBytes, kChunkBytes));
  }
};

float widen(uint16_t bits, bool is_bfloat16) {
  return is_bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

// values[k][mn - first] of an operand.
template <int kStride>
void read_operand(uint64_t bits, bool is_mn_major, bool is_bfloat16, int first, int count,
                  float (*values)[kStride]) {
  const Descriptor descriptor(bits);
  if (is_mn_major) {
    for (int k = 0; k < kK; ++k) {
      for (int mn = 0; mn < count; mn += kChunkElements) {
        const uint16_t* chunk = descriptor.chunk(first + mn, k, true);
        for (int i = 0; i < kChunkElements; ++i) values[k][mn + i] = widen(chunk[i], is_bfloat16);
      }
    }
    return;
  }
  for (int mn = 0; mn < count; ++mn) {
    for (int k = 0; k < kK; k += kChunkElements) {
      const uint16_t* chunk = descriptor.chunk(first + mn, k, false);
      for (int i = 0; i < kChunkElements; ++i) values[k + i][mn] = widen(chunk[i], is_bfloat16);
    }
  }
}

void multiply(Accumulators& target, Product& product) {
  if (product.is_done) return;
  product.is_done = true;
  const WgmmaLane& what = product.what;
  static float a[kK][kM];
  static float b[kK][kMaxN];
  read_operand(what.a, what.is_a_mn_major, what.is_bfloat16, current->warp() % 4 * kM, kM, a);
  read_operand(what.b, what.is_b_mn_major, what.is_bfloat16, 0, what.n, b);
  multiply_rows(what.is_accumulating, what.n, a, b, target.values);
}

Accumulators& find_accumulators(WarpProducts& warp, const WgmmaLane* lanes) {
  for (Accumulators& one : warp.accumulators) {
    if (one.lanes[0] == lanes[0].d) return one;
  }
  Accumulators& added = warp.accumulators.emplace_back();
  added.n = lanes[0].n;
  for (int l = 0; l < kLanes; ++l) {
    added.lanes[l] = lanes[l].d;
    for (int i = 0; i < added.n / 2; ++i) {
      added.values[row_of(l, i)][column_of(l, i)] = lanes[l].d[i];
      lanes[l].d[i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return added;
}

void give_back(const Accumulators& done) {
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < done.n / 2; ++i) {
      done.lanes[l][i] = done.values[row_of(l, i)][column_of(l, i)];
    }
  }
}

bool is_same(const WgmmaLane& x, const WgmmaLane& y) {
  return x.a == y.a && x.b == y.b && x.n == y.n && x.is_bfloat16 == y.is_bfloat16 &&
         x.is_a_mn_major == y.is_a_mn_major && x.is_b_mn_major == y.is_b_mn_major &&
         x.is_accumulating == y.is_accumulating;
}

// The four warps of a warpgroup must issue the same products, though not at the same time here.
void compare_with_warpgroup(WarpProducts& warp, const WgmmaLane& what) {
  WarpgroupProducts& group = warpgroups[static_cast<size_t>(current->warp() / kWarpgroupWarps)];
  const auto idx = static_cast<size_t>(warp.num_issued++ - group.first);
  if (idx == group.issued.size()) group.issued.push_back({what, 0});
  if (!is_same(group.issued[idx].what, what)) {
    fail("wgmma: the warps of a warpgroup issue different products");
  }
  ++group.issued[idx].num_warps;
  if (group.issued.front().num_warps < kWarpgroupWarps) return;
  group.issued.pop_front();
  ++group.first;
}

void issue(WgmmaLane* lanes) {
  for (int l = 1; l < kLanes; ++l) {
    if (!is_same(lanes[l], lanes[0])) fail("wgmma: lanes 0 and %d issue different products", l);
  }
  WarpProducts& warp = mine();
  if (!warp.is_fenced) {
    fail("wgmma: wgmma_fence must come before it, since registers could be touched");
  }
  compare_with_warpgroup(warp, lanes[0]);
  order_lanes_before_products();
  Accumulators& target = find_accumulators(warp, lanes);
  if (target.n != lanes[0].n) fail("wgmma: accumulators of another product");
  target.products.push_back({lanes[0], warp.group, false});
  const bool is_now = cluster.schedule.copies == Copies::kEager ||
                      (cluster.schedule.copies == Copies::kRandom && one_in(2));
  if (is_now) {
    for (Product& product : target.products) multiply(target, product);
  }
}

void finish_products(int num_pending) {
  WarpProducts& warp = mine();
  for (Accumulators& target : warp.accumulators) {
    for (Product& product : target.products) {
      if (product.group < warp.group - num_pending) multiply(target, product);
    }
    std::erase_if(target.products,
                  [&](const Product& product) { return product.group < warp.group - num_pending; });
    if (target.products.empty()) give_back(target);
  }
  std::erase_if(warp.accumulators,
                [](const Accumulators& target) { return target.products.empty(); });
  order_products_before_lanes();
  warp.is_fenced = false;
}

}  // namespace

void issue_product(WgmmaLane lane) {
  const InEmulator in_emulator;
  if (cluster.block_threads % 128 != 0) fail("wgmma: the block must consist of warpgroups");
  warp_collective<WgmmaLane>("wgmma", lane, issue);
}

void wait_for_products(int num_pending) {
  const InEmulator in_emulator;
  warp_collective<int>("wgmma_wait", num_pending, [](int* lanes) { finish_products(*lanes); });
  maybe_yield();
}

void begin_products() {
  warps.assign(static_cast<size_t>(cluster.num_warps()), {});
  warpgroups.assign(warps.size() / kWarpgroupWarps, {});
}

std::string find_unfinished_products() {
  for (const WarpProducts& warp : warps) {
    if (!warp.accumulators.empty()) return "wgmma: products that nobody waited for";
  }
  for (const WarpgroupProducts& group : warpgroups) {
    if (!group.issued.empty()) return "wgmma: a product that not all warps of a warpgroup issued";
  }
  return "";
}

}  // namespace emulation

void wgmma_fence() {
  using namespace emulation;
  const InEmulator in_emulator;
  bool nothing = false;
  warp_collective<bool>("wgmma_fence", nothing, [](bool*) { mine().is_fenced = true; });
}

void wgmma_commit() {
  using namespace emulation;
  const InEmulator in_emulator;
  bool nothing = false;
  warp_collective<bool>("wgmma_commit", nothing, [](bool*) { ++mine().group; });
}

}  // namespace sparse_unified
