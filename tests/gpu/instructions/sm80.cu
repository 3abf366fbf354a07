// SPDX-License-Identifier: Apache-2.0
// Every instruction of csrc/device that sm_80 has, alone, against a formula for one element written
// from the PTX manual: "shfl.sync", "vote.sync", "ldmatrix", "Matrix Fragments for mma.m16n8k16",
// "cp.async", "cvt", "ld.global.nc".
#include <vector>

#include "device/async_copy.h"
#include "device/launch.h"
#include "device/mma.h"
#include "device/vector.h"
#include "device/warp.h"
#include "testing.h"

namespace sparse_unified::instructions {
namespace {

struct WarpParams {
  const int32_t* in;  // [32]
  int32_t* out;       // [6, 32]: xor 1 and 16, lane (3 l + 5) % 32, up 3, ballot, bits
  float* sums;        // [32]
};

__global__ void warp_kernel(const WarpParams p) {
  const int lane = lane_idx();
  const int32_t own = p.in[lane];
  p.out[lane] = shuffle_xor(own, 1);
  p.out[32 + lane] = shuffle_xor(own, 16);
  p.out[64 + lane] = shuffle(own, (3 * lane + 5) % 32);
  p.out[96 + lane] = shuffle_up(own, 3);
  const uint32_t votes = ballot(own % 3 == 0);
  p.out[128 + lane] = static_cast<int32_t>(votes);
  p.out[160 + lane] = 100 * count_bits(votes >> lane) + find_first_bit(votes >> lane);
  p.sums[lane] = warp_sum(static_cast<float>(own));
}

void test_warp() {
  DeviceArray<int32_t> in(32), out(6 * 32);
  DeviceArray<float> sums(32);
  uint32_t votes = 0;
  float sum = 0;
  for (int i = 0; i < 32; ++i) {
    in[i] = 7 * i * i + 1;
    votes |= static_cast<uint32_t>(in[i] % 3 == 0) << i;
    sum += static_cast<float>(in[i]);
  }
  check_launch(
      launch(warp_kernel, LaunchConfig{dim3(1), 32}, WarpParams{in.get(), out.get(), sums.get()}));
  synchronize();
  for (int lane = 0; lane < 32; ++lane) {
    check_equal("shfl.bfly 1", lane, out[lane], in[lane ^ 1]);
    check_equal("shfl.bfly 16", lane, out[32 + lane], in[lane ^ 16]);
    check_equal("shfl.idx", lane, out[64 + lane], in[(3 * lane + 5) % 32]);
    check_equal("shfl.up", lane, out[96 + lane], in[lane < 3 ? lane : lane - 3]);
    check_equal("ballot", lane, static_cast<uint32_t>(out[128 + lane]), votes);
    int count = 0, first = 0;
    for (int bit = 31; bit >= 0; --bit) {
      if (votes >> lane >> bit & 1) {
        ++count;
        first = bit + 1;
      }
    }
    check_equal("popc and ffs", lane, out[160 + lane], 100 * count + first);
    check_equal("sum", lane, sums[lane], sum);
  }
}

struct BlockParams {
  const int32_t* in;  // [blocks, threads]
  int32_t* out;       // [blocks, threads], each block reversed
};

__global__ void block_kernel(const BlockParams p) {
  auto* shared = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const int n = static_cast<int>(blockDim.x);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * n;
  shared[t] = p.in[first + t];
  sync_threads();
  p.out[first + t] = shared[n - 1 - t];
}

// Also with more shared memory than a kernel gets unasked.
void test_block() {
  constexpr int kBlocks = 5;
  for (const int num_threads : {32, 96, 1024}) {
    DeviceArray<int32_t> in(kBlocks * num_threads), out(kBlocks * num_threads);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = static_cast<int32_t>(3 * i);
    check_launch(launch(block_kernel, LaunchConfig{dim3(kBlocks), num_threads, 96 * 1024},
                        BlockParams{in.get(), out.get()}));
    synchronize();
    for (int64_t i = 0; i < in.size(); ++i) {
      const int64_t first = i / num_threads * num_threads;
      check_equal("reversed", i, out[i], in[first + num_threads - 1 - (i - first)]);
    }
  }
}

struct MatrixParams {
  const uint16_t* in;  // [32, 8]: four matrices of 8 rows
  uint32_t* out;       // [2, 4, 32]: plain and transposed
};

__global__ void matrix_kernel(const MatrixParams p) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
  const int lane = lane_idx();
  for (int i = 0; i < 8; ++i) shared[8 * lane + i] = p.in[8 * lane + i];
  sync_threads();
  uint32_t fragment[4];
  load_matrix_x4(fragment, shared_address(shared + 8 * lane));
  for (int m = 0; m < 4; ++m) p.out[32 * m + lane] = fragment[m];
  load_matrix_x4_transposed(fragment, shared_address(shared + 8 * lane));
  for (int m = 0; m < 4; ++m) p.out[128 + 32 * m + lane] = fragment[m];
}

// Lane l holds row l / 4, columns 2 (l % 4) and the next, of each matrix or of its transpose.
void test_load_matrix() {
  DeviceArray<uint16_t> in(256);
  DeviceArray<uint32_t> out(256);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(1000 + 7 * i);
  check_launch(
      launch(matrix_kernel, LaunchConfig{dim3(1), 32, 512}, MatrixParams{in.get(), out.get()}));
  synchronize();
  for (int i = 0; i < 128; ++i) {
    const int matrix = i / 32, lane = i % 32, row = lane / 4, column = 2 * (lane % 4);
    const auto at = [&](int r, int c) {
      return static_cast<uint32_t>(in[64 * matrix + 8 * r + c]);
    };
    check_equal("ldmatrix", i, out[i], at(row, column) | at(row, column + 1) << 16);
    check_equal("ldmatrix.trans", i, out[128 + i], at(column, row) | at(column + 1, row) << 16);
  }
}

template <typename T>
struct ProductParams {
  const T* a;      // [16, 16]
  const T* b;      // [8, 16]: b[n][k]
  const float* c;  // [16, 8]
  float* d;        // [16, 8]
};

template <typename T>
__global__ void product_kernel(const ProductParams<T> p) {
  const int row = lane_idx() / 4, column = 2 * (lane_idx() % 4);
  const auto pair = [](const T* first) {
    return static_cast<uint32_t>(first[0].bits) | static_cast<uint32_t>(first[1].bits) << 16;
  };
  const uint32_t a[4] = {pair(p.a + 16 * row + column), pair(p.a + 16 * (row + 8) + column),
                         pair(p.a + 16 * row + column + 8),
                         pair(p.a + 16 * (row + 8) + column + 8)};
  const uint32_t b[2] = {pair(p.b + 16 * row + column), pair(p.b + 16 * row + column + 8)};
  float d[4] = {p.c[8 * row + column], p.c[8 * row + column + 1], p.c[8 * (row + 8) + column],
                p.c[8 * (row + 8) + column + 1]};
  multiply_add<T>(d, a, b);
  p.d[8 * row + column] = d[0];
  p.d[8 * row + column + 1] = d[1];
  p.d[8 * (row + 8) + column] = d[2];
  p.d[8 * (row + 8) + column + 1] = d[3];
}

template <typename T>
void test_product() {
  DeviceArray<T> a(256), b(128);
  DeviceArray<float> c(128), d(128);
  for (int i = 0; i < 256; ++i) a[i] = stored<T>(draw(i));
  for (int i = 0; i < 128; ++i) b[i] = stored<T>(draw(1000 + i));
  for (int i = 0; i < 128; ++i) c[i] = static_cast<float>(draw(2000 + i));
  check_launch(launch(product_kernel<T>, LaunchConfig{dim3(1), 32},
                      ProductParams<T>{a.get(), b.get(), c.get(), d.get()}));
  synchronize();
  for (int i = 0; i < 128; ++i) {
    double expected = c[i];
    for (int k = 0; k < 16; ++k)
      expected += value(a[16 * (i / 8) + k]) * value(b[16 * (i % 8) + k]);
    check_equal("mma", i, d[i], expected);
  }
}

struct CopyParams {
  const uint8_t* in;  // [17, 16]
  uint8_t* out;       // [17, 16]
};

// Thread t copies its first t bytes, the rest becomes zero; three groups are waited for in turn.
__global__ void copy_kernel(const CopyParams p) {
  unsigned char* shared = dynamic_shared_memory();
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 17 * 16; i += static_cast<int>(blockDim.x)) shared[i] = 0xee;
  sync_threads();
  if (t < 6) copy_async_16(shared_address(shared + 16 * t), p.in + 16 * t, t);
  copy_async_commit();
  if (t >= 6 && t < 12) copy_async_16(shared_address(shared + 16 * t), p.in + 16 * t, t);
  copy_async_commit();
  if (t >= 12 && t < 17) copy_async_16(shared_address(shared + 16 * t), p.in + 16 * t, t);
  copy_async_commit();
  copy_async_wait<2>();
  if (t < 6)
    for (int i = 0; i < 16; ++i) p.out[16 * t + i] = shared[16 * t + i];
  copy_async_wait<0>();
  sync_threads();
  // What other threads copied, after their wait and a barrier.
  if (t < 11)
    for (int i = 0; i < 16; ++i) p.out[16 * (6 + t) + i] = shared[16 * (6 + t) + i];
}

void test_copies() {
  DeviceArray<uint8_t> in(17 * 16), out(17 * 16);
  for (int i = 0; i < 17 * 16; ++i) in[i] = static_cast<uint8_t>(i * 5 + 1);
  check_launch(
      launch(copy_kernel, LaunchConfig{dim3(1), 32, 17 * 16}, CopyParams{in.get(), out.get()}));
  synchronize();
  for (int i = 0; i < 17 * 16; ++i) check_equal("cp.async", i, out[i], i % 16 < i / 16 ? in[i] : 0);
}

template <typename T>
struct ConvertParams {
  const float* in;  // [count]
  T* narrow;        // [count]
  float* wide;      // [65536], of every bit pattern
  int64_t count;
};

template <typename T>
__global__ void convert_kernel(const ConvertParams<T> p) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t < 0x10000) p.wide[t] = to_float(T{static_cast<uint16_t>(t)});
  if (t < p.count) p.narrow[t] = from_float<T>(p.in[t]);
}

// Every pattern widens to its meaning. Between neighbours the nearer wins, half way the even one.
template <typename T>
void test_conversions() {
  const uint32_t infinity = ((1u << Half<T>::kExponentBits) - 1) << Half<T>::kMantissaBits;
  std::vector<float> in;
  std::vector<uint32_t> expected;
  const auto expect = [&](double from, uint32_t bits) {
    in.push_back(static_cast<float>(from));
    expected.push_back(bits);
  };
  for (uint32_t bits = 0; bits < 0x10000u; bits += 1) {
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude > infinity) continue;
    const double exact = value(T{static_cast<uint16_t>(bits)});
    expect(exact, bits);
    if (magnitude + 1 >= infinity) continue;
    const auto half = static_cast<float>((exact + value(T{static_cast<uint16_t>(bits + 1)})) / 2);
    expect(std::nextafter(half, 0.0f), bits);
    expect(half, bits % 2 ? bits + 1 : bits);
    expect(std::nextafter(half, bits >> 15 ? -INFINITY : INFINITY), bits + 1);
  }
  const auto count = static_cast<int64_t>(in.size());
  DeviceArray<float> from(count), wide(0x10000);
  DeviceArray<T> narrow(count);
  for (int64_t i = 0; i < count; ++i) from[i] = in[static_cast<size_t>(i)];
  check_launch(launch(convert_kernel<T>,
                      LaunchConfig{dim3(static_cast<unsigned>(count / 256 + 1)), 256},
                      ConvertParams<T>{from.get(), narrow.get(), wide.get(), count}));
  synchronize();
  for (int bits = 0; bits < 0x10000; ++bits) {
    check_equal("widened", bits, wide[bits], value(T{static_cast<uint16_t>(bits)}));
  }
  for (int64_t i = 0; i < count; ++i) {
    check_equal("narrowed", i, narrow[i].bits, expected[static_cast<size_t>(i)]);
  }
}

struct VectorParams {
  const uint32_t* in;  // [32, 4]
  uint32_t* out;       // [32, 4]
  float* floats;       // [32]: exponential
};

__global__ void vector_kernel(const VectorParams p) {
  const int lane = lane_idx();
  Vector16 vector = load_vector_once(p.in + 4 * lane);
  // Low and high half of each word trade places.
  for (uint32_t& word : vector.words) {
    float low, high;
    unpack<BFloat16>(word, low, high);
    word = pack<BFloat16>(high, low);
  }
  store_vector(p.out + 4 * lane, vector);
  p.floats[lane] = exponential(static_cast<float>(lane) - 20.0f);
}

void test_vectors() {
  DeviceArray<uint32_t> in(128), out(128);
  DeviceArray<float> floats(32);
  for (int i = 0; i < 128; ++i) {
    in[i] = stored<BFloat16>(draw(i)).bits |
            static_cast<uint32_t>(stored<BFloat16>(draw(500 + i)).bits) << 16;
  }
  check_launch(launch(vector_kernel, LaunchConfig{dim3(1), 32},
                      VectorParams{in.get(), out.get(), floats.get()}));
  synchronize();
  for (int i = 0; i < 128; ++i) check_equal("swapped", i, out[i], in[i] >> 16 | in[i] << 16);
  for (int i = 0; i < 32; ++i) {
    const double expected = std::exp(i - 20.0);
    check_equal("exponential", i, std::abs(floats[i] - expected) <= 2.5e-7 * expected, 1);
  }
}

int run() {
  test("warp collectives", test_warp);
  test("block barrier, shared memory", test_block);
  test("ldmatrix", test_load_matrix);
  test("mma bf16", test_product<BFloat16>);
  test("mma fp16", test_product<Float16>);
  test("cp.async", test_copies);
  test("conversions bf16", test_conversions<BFloat16>);
  test("conversions fp16", test_conversions<Float16>);
  test("vectors, exponential", test_vectors);
  return failures() != 0;
}

}  // namespace
}  // namespace sparse_unified::instructions

int main() { return sparse_unified::instructions::run(); }
