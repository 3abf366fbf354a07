// SPDX-License-Identifier: Apache-2.0
// Each emulated instruction against a formula for one element, written from the layouts of the PTX
// manual ("Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "cp.async",
// "shfl.sync") apart from the emulator; and what a launch promises.
#include <algorithm>
#include <numeric>
#include <vector>

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
  float* sums;         // [32]
};

__global__ void warp_kernel(const WarpParams p) {
  const int lane = lane_idx();
  const int32_t value = p.in[lane];
  for (int i = 0; i < 5; ++i) p.xored[i * 32 + lane] = shuffle_xor(value, 1 << i);
  p.broadcast[lane] = shuffle(value, (3 * lane + 5) % 32);
  p.up[lane] = shuffle_up(value, 3);
  p.votes[lane] = ballot(value % 3 == 0);
  p.sums[lane] = warp_sum(static_cast<float>(value));
}

void test_warp() {
  DeviceArray<int32_t> in(32), xored(5 * 32), broadcast(32), up(32);
  DeviceArray<uint32_t> votes(32);
  DeviceArray<float> sums(32);
  uint32_t expected_votes = 0;
  float expected_sum = 0;
  for (int i = 0; i < 32; ++i) {
    in[i] = 7 * i * i + 1;
    expected_votes |= static_cast<uint32_t>(in[i] % 3 == 0) << i;
    expected_sum += static_cast<float>(in[i]);
  }
  launch(warp_kernel, LaunchConfig{dim3(1), 32},
         WarpParams{in.get(), xored.get(), broadcast.get(), up.get(), votes.get(), sums.get()});
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 5; ++i) {
      check_equal("shuffle_xor", i * 32 + lane, xored[i * 32 + lane], in[lane ^ (1 << i)]);
    }
    check_equal("shuffle", lane, broadcast[lane], in[(3 * lane + 5) % 32]);
    check_equal("shuffle_up", lane, up[lane], in[lane < 3 ? lane : lane - 3]);
    check_equal("ballot", lane, votes[lane], expected_votes);
    check_equal("warp_sum", lane, sums[lane], expected_sum);
  }
  check_equal("count_bits", 0, count_bits(0xf0f00001u), 9);
  check_equal("find_first_bit", 0, find_first_bit(0x50u), 5);
  check_equal("find_first_bit", 1, find_first_bit(0u), 0);
}

struct ReverseParams {
  const int32_t* in;  // [blocks, threads]
  int32_t* out;       // [blocks, threads], each block reversed
};

__global__ void reverse_kernel(const ReverseParams p) {
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const int n = static_cast<int>(blockDim.x);
  const int t = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int64_t>(blockIdx.x + gridDim.x * (blockIdx.y + 2 * blockIdx.z));
  shared[t] = p.in[block * n + t];
  sync_threads();
  p.out[block * n + t] = shared[n - 1 - t];
}

void test_block() {
  for (const int num_threads : {32, 96, 1024}) {
    constexpr int kBlocks = 3 * 2 * 2;
    DeviceArray<int32_t> in(kBlocks * num_threads), out(kBlocks * num_threads);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = static_cast<int32_t>(i);
    launch(reverse_kernel, LaunchConfig{dim3(3, 2, 2), num_threads, num_threads * 4},
           ReverseParams{in.get(), out.get()});
    for (int64_t i = 0; i < in.size(); ++i) {
      const int64_t block = i / num_threads * num_threads;
      check_equal("reversed", i, out[i], static_cast<double>(2 * block + num_threads - 1 - i));
    }
    out.check_guards("out");
  }
}

// What a device would refuse is refused in the same words, and an empty grid is no launch.
void test_launch() {
  const auto code = [](dim3 grid, int num_threads, int64_t shared_bytes) {
    return static_cast<double>(
        launch(reverse_kernel, LaunchConfig{grid, num_threads, shared_bytes}, ReverseParams{}));
  };
  check_equal("empty grid", 0, code(dim3(0), 32, 0), cudaSuccess);
  check_equal("threads", 0, code(dim3(1), 0, 0), cudaErrorInvalidConfiguration);
  check_equal("threads", 2048, code(dim3(1), 2048, 0), cudaErrorInvalidConfiguration);
  check_equal("grid.y", 65536, code(dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration);
  check_equal("shared", 0, code(dim3(1), 32, 227 * 1024 + 1), cudaErrorInvalidValue);
  LaunchConfig config{dim3(3), 32};
  for (const int cluster_blocks : {0, 2, 9}) {
    config.cluster_blocks = cluster_blocks;
    check_equal("cluster", cluster_blocks, launch(reverse_kernel, config, ReverseParams{}),
                cudaErrorInvalidConfiguration);
  }
}

__global__ void check_kernel(const int wrong_thread) {
  sync_threads();
  device_check(static_cast<int>(threadIdx.x) != wrong_thread);
  sync_threads();
}

// A kernel that fails says where; the next one runs as if nothing had been.
void test_failure() {
  const LaunchConfig config{dim3(2), 64};
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::string message;
    try {
      launch(check_kernel, config, 40);
    } catch (const emulation::Error& error) {
      message = error.what();
    }
    for (const char* part : {"device_check failed", "check_kernel", "of (2, 1, 1)",
                             "thread 40 (warp 1, lane 8)", "SPARSE_UNIFIED_EMULATION_SEED="}) {
      check_equal(part, repeat, message.find(part) != std::string::npos, true);
    }
    check_equal("next launch", repeat, launch(check_kernel, config, -1), cudaSuccess);
  }
}

struct FillParams {
  float* out;  // [shared floats]
  int n;
};

__global__ void fill_kernel(const FillParams p) {
  const auto* shared = reinterpret_cast<const float*>(dynamic_shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < p.n; i += 32) {
    p.out[i] = shared[i];
    reinterpret_cast<float*>(dynamic_shared_memory())[i] = 1.0f;
  }
}

// Every block finds NaN in shared memory, whatever blocks before it left there.
void test_shared_memory_starts_as_nan() {
  constexpr int kFloats = 999;
  DeviceArray<float> out(kFloats);
  for (int repeat = 0; repeat < 2; ++repeat) {
    launch(fill_kernel, LaunchConfig{dim3(1), 32, kFloats * 4}, FillParams{out.get(), kFloats});
    for (int i = 0; i < kFloats; ++i) check_equal("shared", i, out[i], std::nan(""));
  }
}

struct MatrixParams {
  const uint16_t* in;  // [32, 8], row r of matrix m at row (8 m + r) * 5 % 32
  uint32_t* out;       // [32, 4]
  bool is_transposed;
};

__global__ void load_matrix_kernel(const MatrixParams p) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
  const int lane = lane_idx();
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = p.in[lane * 8 + i];
  sync_warp();
  uint32_t fragment[4];
  const uint32_t address = shared_address(shared + lane * 5 % 32 * 8);
  if (p.is_transposed) {
    load_matrix_x4_transposed(fragment, address);
  } else {
    load_matrix_x4(fragment, address);
  }
  for (int i = 0; i < 4; ++i) p.out[lane * 4 + i] = fragment[i];
}

void test_load_matrix() {
  DeviceArray<uint16_t> in(32 * 8);
  DeviceArray<uint32_t> out(32 * 4);
  for (int i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(257 * i + 3);
  for (const bool is_transposed : {false, true}) {
    launch(load_matrix_kernel, LaunchConfig{dim3(1), 32, 32 * 16},
           MatrixParams{in.get(), out.get(), is_transposed});
    for (int i = 0; i < 32 * 4 * 2; ++i) {
      const int lane = i / 8, matrix = i / 2 % 4, half = i % 2;
      int row = lane / 4, column = 2 * (lane % 4) + half;
      if (is_transposed) std::swap(row, column);
      const uint32_t word = out[lane * 4 + matrix];
      check_equal("ldmatrix", i, word >> (16 * half) & 0xffffu,
                  in[(8 * matrix + row) * 5 % 32 * 8 + column]);
    }
  }
}

struct ProductParams {
  const uint32_t* a;  // [32, 4]
  const uint32_t* b;  // [32, 2]
  const float* c;     // [32, 4]
  float* d;           // [32, 4]
};

template <typename T>
__global__ void product_kernel(const ProductParams p) {
  const int lane = lane_idx();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = p.a[lane * 4 + i];
    b[i % 2] = p.b[lane * 2 + i % 2];
    d[i] = p.c[lane * 4 + i];
  }
  multiply_add<T>(d, a, b);
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

// Element i of a fragment of lane `lane`, as the manual numbers them (two in a register).
struct Place {
  int row, column;
};
Place place_a(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const bool is_upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {is_upper ? group : group + 8, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place place_b(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
Place place_c(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

template <typename T>
void test_product() {
  Random random(7);
  Array<T> a(16 * 16), b(16 * 8);
  Array<float> c(16 * 8);
  fill_integers(a, 9, random);
  fill_integers(b, 9, random);
  fill_integers(c, 100, random);
  DeviceArray<uint32_t> fragments_a(32 * 4), fragments_b(32 * 2);
  DeviceArray<float> fragments_c(32 * 4), fragments_d(32 * 4);
  auto* halves_a = reinterpret_cast<uint16_t*>(fragments_a.get());
  auto* halves_b = reinterpret_cast<uint16_t*>(fragments_b.get());
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const Place at = place_a(lane, i);
      halves_a[lane * 8 + i] = a[at.row * 16 + at.column].bits;
    }
    for (int i = 0; i < 4; ++i) {
      const Place at_b = place_b(lane, i), at_c = place_c(lane, i);
      halves_b[lane * 4 + i] = b[at_b.row * 8 + at_b.column].bits;
      fragments_c[lane * 4 + i] = c[at_c.row * 8 + at_c.column];
    }
  }
  launch(product_kernel<T>, LaunchConfig{dim3(1), 32},
         ProductParams{fragments_a.get(), fragments_b.get(), fragments_c.get(), fragments_d.get()});
  for (int i = 0; i < 32 * 4; ++i) {
    const Place at = place_c(i / 4, i % 4);
    double expected = c[at.row * 8 + at.column];
    for (int k = 0; k < 16; ++k) {
      expected += Traits<T>::value(a[at.row * 16 + k]) * Traits<T>::value(b[k * 8 + at.column]);
    }
    check_equal("mma", i, fragments_d[i], expected);
  }
}

struct CopyParams {
  const uint8_t* in;  // [17 * 16]
  uint8_t* out;       // [17 * 16]
};

// Thread i < 17 copies i bytes.
__global__ void zero_fill_kernel(const CopyParams p) {
  const int t = static_cast<int>(threadIdx.x);
  unsigned char* shared = dynamic_shared_memory() + t * 16;
  if (t <= 16) copy_async_16(shared_address(shared), p.in + t * 16, t);
  copy_async_commit();
  copy_async_wait<0>();
  if (t > 16) return;
  for (int i = 0; i < 16; ++i) p.out[t * 16 + i] = shared[i];
}

void test_copy_fills_with_zeros() {
  DeviceArray<uint8_t> in(17 * 16), out(17 * 16);
  for (int i = 0; i < in.size(); ++i) in[i] = static_cast<uint8_t>(i % 250 + 1);
  launch(zero_fill_kernel, LaunchConfig{dim3(1), 32, 17 * 16}, CopyParams{in.get(), out.get()});
  for (int i = 0; i < in.size(); ++i) {
    check_equal("cp.async", i, out[i], i % 16 < i / 16 ? in[i] : 0);
  }
}

// Group g writes the value in[g] over the one before; what is visible after a wait for all but
// kPending groups tells which groups have landed.
struct GroupParams {
  const int32_t* in;  // [4, 4]
  int32_t* out;       // [3]
};

__global__ void groups_kernel(const GroupParams p) {
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  if (threadIdx.x != 0) return;
  for (int g = 0; g < 3; ++g) {
    copy_async_16(shared_address(shared + 4 * g), p.in + 4 * g, 16);
    copy_async_commit();
  }
  copy_async_16(shared_address(shared + 12), p.in + 12, 16);  // never committed
  copy_async_wait<2>();
  p.out[0] = shared[0];
  copy_async_wait<1>();
  p.out[1] = shared[4];
  copy_async_wait<0>();
  p.out[2] = shared[8];
  p.out[3] = shared[12];
}

void test_copy_groups() {
  DeviceArray<int32_t> in(16), out(4);
  for (int i = 0; i < 16; ++i) in[i] = 10 + i;
  launch(groups_kernel, LaunchConfig{dim3(1), 32, 64}, GroupParams{in.get(), out.get()});
  for (int g = 0; g < 3; ++g) check_equal("group", g, out[g], in[4 * g]);
  if (emulation::schedule().copies == emulation::Copies::kLazy) {
    check_equal("uncommitted", 3, out[3], -1);
  }
}

// Every 16-bit value widens to its meaning; every fp32 value at, beside and between neighbours
// narrows to the nearest, ties to even.
template <typename T>
void test_conversions(const Format& format) {
  const auto bits_of = [](float value) { return static_cast<double>(from_float<T>(value).bits); };
  const uint32_t infinity = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const T stored{static_cast<uint16_t>(bits)};
    const double value = decode(format, bits);
    check_equal("to_float", bits, to_float(stored), value);
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude > infinity) {
      check_equal("nan", bits, bits_of(static_cast<float>(value)), 0x7fff);
      continue;
    }
    check_equal("from_float", bits, bits_of(static_cast<float>(value)), bits);
    if (magnitude == infinity) continue;
    // Half way to the next larger magnitude; behind the largest value the next is infinity's place.
    const double next =
        magnitude + 1 == infinity ? 2 * value - decode(format, bits - 1) : decode(format, bits + 1);
    const auto half = static_cast<float>((value + next) / 2);
    const float outward = bits >> 15 ? -INFINITY : INFINITY;
    check_equal("below half", bits, bits_of(std::nextafter(half, 0.0f)), bits);
    check_equal("half", bits, bits_of(half), bits % 2 ? bits + 1 : bits);
    check_equal("above half", bits, bits_of(std::nextafter(half, outward)), bits + 1);
  }
  check_equal("-nan", 0, bits_of(-std::nanf("")), 0x7fff);
  check_equal("huge", 0, bits_of(-3.4e38f), 0x8000u | infinity);
  const uint32_t word = pack<T>(1.5f, -2.0f);
  float low, high;
  unpack<T>(word, low, high);
  check_equal("pack", 0, word & 0xffffu, from_float<T>(1.5f).bits);
  check_equal("unpack", 0, low, 1.5);
  check_equal("unpack", 1, high, -2.0);
}

void test_exponential() {
  for (float x = -100; x < 88; x += 0.37f) {
    check_close("exponential", static_cast<int64_t>(x), exponential(x), std::exp(double{x}),
                std::exp(double{x}) * 2 * 0x1p-23 + 0x1p-149);
  }
}

struct OrderParams {
  int32_t* order;  // [blocks * threads]
  int32_t* next;   // [1]
};

// Threads number themselves, which races on purpose.
__global__ void order_kernel(const OrderParams p) {
  sync_threads();
  const auto t = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  p.order[(*p.next)++] = t;
}

std::vector<int32_t> run_order(const emulation::Schedule& schedule) {
  constexpr int kBlocks = 3, kThreads = 96;
  DeviceArray<int32_t> order(kBlocks * kThreads), next(1);
  next[0] = 0;
  emulation::set_schedule(schedule);
  launch(order_kernel, LaunchConfig{dim3(kBlocks), kThreads}, OrderParams{order.get(), next.get()});
  return {order.get(), order.get() + order.size()};
}

// Forward and reverse are what they say; a seed gives the same order every time, another another.
void test_orders() {
  using emulation::Copies, emulation::Order;
  const emulation::Schedule before = emulation::schedule();
  std::vector<int32_t> expected(3 * 96);
  std::iota(expected.begin(), expected.end(), 0);
  check_equal("forward", 0, run_order({1, Order::kForward, Copies::kLazy}) == expected, true);
  std::reverse(expected.begin(), expected.end());
  check_equal("reverse", 0, run_order({1, Order::kReverse, Copies::kLazy}) == expected, true);
  for (const Order order : {Order::kRandom, Order::kPriorities}) {
    const auto first = run_order({5, order, Copies::kLazy});
    check_equal("again", 0, first == run_order({5, order, Copies::kLazy}), true);
    check_equal("other seed", 0, first == run_order({6, order, Copies::kLazy}), false);
    auto sorted = first;
    std::sort(sorted.rbegin(), sorted.rend());
    check_equal("all", 0, sorted == expected, true);
  }
  emulation::set_schedule(before);
}

struct Case {
  const char* name;
  void (*body)();
};
constexpr Case kCases[] = {
    {"warp", test_warp},
    {"block", test_block},
    {"launch", test_launch},
    {"failure", test_failure},
    {"shared memory", test_shared_memory_starts_as_nan},
    {"ldmatrix", test_load_matrix},
    {"mma bf16", test_product<BFloat16>},
    {"mma fp16", test_product<Float16>},
    {"cp.async", test_copy_fills_with_zeros},
    {"cp.async groups", test_copy_groups},
};

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  std::vector<Test> tests;
  for (const Case& one : kCases) {
    tests.push_back({one.name, [&] {
                       failures() += emulation::for_each_schedule(one.name, emulation::schedules(),
                                                                  failures, one.body);
                     }});
  }
  tests.push_back({"conversions bfloat16", [] { test_conversions<BFloat16>({8, 7}); }});
  tests.push_back({"conversions float16", [] { test_conversions<Float16>({5, 10}); }});
  tests.push_back({"exponential", test_exponential});
  if (!emulation::kDetectsRaces) tests.push_back({"orders", test_orders});
  return run_tests(argc, argv, tests);
}
