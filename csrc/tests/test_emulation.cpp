// SPDX-License-Identifier: Apache-2.0
// Each emulated instruction against a formula for one element, written from the layouts of the PTX
// manual apart from the emulator.
#include "check.h"
#include "device/async_copy.h"
#include "device/launch.h"
#include "device/mma.h"
#include "device/vector.h"
#include "device/warp.h"
#include "emulation/testing.h"

namespace sparse_unified::test {
namespace {

using emulation::DeviceArray;

struct WarpParams {
  const int32_t* in;   // [32]
  int32_t* xored;      // [5, 32]
  int32_t* broadcast;  // [32]
  int32_t* up;         // [32]
  uint32_t* votes;     // [32]
};

__global__ void warp_kernel(const WarpParams p) {
  const int lane = lane_idx();
  const int32_t value = p.in[lane];
  for (int i = 0; i < 5; ++i) p.xored[i * 32 + lane] = shuffle_xor(value, 1 << i);
  p.broadcast[lane] = shuffle(value, (3 * lane + 5) % 32);
  p.up[lane] = shuffle_up(value, 3);
  p.votes[lane] = ballot(value % 3 == 0);
}

void test_warp() {
  DeviceArray<int32_t> in(32), xored(5 * 32), broadcast(32), up(32);
  DeviceArray<uint32_t> votes(32);
  for (int i = 0; i < 32; ++i) in[i] = 7 * i * i + 1;
  launch(warp_kernel, LaunchConfig{dim3(1), 32},
         WarpParams{in.get(), xored.get(), broadcast.get(), up.get(), votes.get()});
  uint32_t expected_votes = 0;
  for (int i = 0; i < 32; ++i) expected_votes |= static_cast<uint32_t>(in[i] % 3 == 0) << i;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 5; ++i) {
      check_equal("shuffle_xor", i * 32 + lane, xored[i * 32 + lane], in[lane ^ (1 << i)]);
    }
    check_equal("shuffle", lane, broadcast[lane], in[(3 * lane + 5) % 32]);
    check_equal("shuffle_up", lane, up[lane], in[lane < 3 ? lane : lane - 3]);
    check_equal("ballot", lane, votes[lane], expected_votes);
  }
}

struct ReverseParams {
  const int32_t* in;  // [blocks, threads]
  int32_t* out;       // [blocks, threads], each block reversed
};

__global__ void reverse_kernel(const ReverseParams p) {
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const int n = static_cast<int>(blockDim.x);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  shared[t] = p.in[first + t];
  sync_threads();
  p.out[first + t] = shared[n - 1 - t];
}

void test_block() {
  for (const int num_threads : {32, 96, 1024}) {
    constexpr int kBlocks = 3;
    DeviceArray<int32_t> in(kBlocks * num_threads), out(kBlocks * num_threads);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = static_cast<int32_t>(i);
    launch(reverse_kernel, LaunchConfig{dim3(kBlocks), num_threads, num_threads * 4},
           ReverseParams{in.get(), out.get()});
    for (int64_t i = 0; i < in.size(); ++i) {
      const int64_t block = i / num_threads * num_threads;
      check_equal("reversed", i, out[i], static_cast<double>(block + num_threads - 1 - i + block));
    }
    out.check_guards("out");
  }
}

struct Case {
  const char* name;
  void (*body)();
};
constexpr Case kCases[] = {{"warp", test_warp}, {"block", test_block}};

int run() {
  int num_failed = 0;
  for (const Case& one : kCases) {
    num_failed +=
        emulation::for_each_schedule(one.name, emulation::schedules(), failures, one.body);
  }
  return finish("test_emulation") || num_failed != 0;
}

}  // namespace
}  // namespace sparse_unified::test

int main() { return sparse_unified::test::run(); }
