// SPDX-License-Identifier: Apache-2.0
// Accesses outside of memory or off their alignment, and outputs left unwritten.
#include "device/async_copy.h"
#include "device/mma.h"
#include "device/vector.h"
#include "planted/planted.h"

namespace sparse_unified::planted {
namespace {

constexpr int kThreads = 32;
constexpr int kSharedBytes = kThreads * 16;
constexpr LaunchConfig kConfig{dim3(1), kThreads, kSharedBytes};

template <int kOffset>  // in ints, of the last thread's element
__global__ void shared_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const int at = t == kThreads - 1 ? kSharedBytes / 4 - 1 + kOffset : t;
  shared_ints()[at] = p.in[t];
  p.out[t] = shared_ints()[at];
}

template <bool kIsPlanted>
__global__ void global_write_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < p.n || (kIsPlanted && t == p.n)) p.out[t] = 3 * t + 1;
}

template <bool kIsPlanted>
__global__ void global_read_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= p.n) return;
  const int next = t + 1 < p.n || kIsPlanted ? t + 1 : t;
  p.out[t] = p.in[next] - (next - t) * 3;
}

template <bool kIsPlanted>
__global__ void copy_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const int left = (p.n - 4 * t) * 4;
  const int num_bytes = left < 0 ? 0 : left < 16 && !kIsPlanted ? left : 16;
  copy_async_16(shared_address(shared_ints() + 4 * t), p.in + (num_bytes ? 4 * t : 0), num_bytes);
  copy_async_commit();
  copy_async_wait<0>();
  for (int i = 4 * t; i < 4 * t + 4 && i < p.n; ++i) p.out[i] = shared_ints()[i];
}

template <bool kIsPlanted>
__global__ void unwritten_kernel(const Params p) {
  const int end = kIsPlanted ? p.n / kThreads * kThreads : p.n;
  for (int i = static_cast<int>(threadIdx.x); i < end; i += kThreads) p.out[i] = p.in[i];
}

template <bool kIsPlanted>
__global__ void null_pointer_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const volatile int32_t* in = kIsPlanted ? nullptr : p.in;
  p.out[t] = in[t];
}

template <bool kIsPlanted>
__global__ void misaligned_copy_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t shared = shared_address(shared_ints()) + (kIsPlanted ? 8 : 0);
  if (t == 0) copy_async_16(shared, p.in, 16);
  copy_async_commit();
  copy_async_wait<0>();
  p.out[t] = p.in[t];
}

template <bool kIsPlanted>
__global__ void misaligned_vector_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  const Vector16 vector = load_vector(p.in + 4 * (t / 4) + (kIsPlanted && t == 5 ? 2 : 0));
  p.out[t] = static_cast<int32_t>(vector.words[t % 4]);
}

template <bool kIsPlanted>
__global__ void misaligned_matrix_row_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  store_vector(shared_ints() + 4 * t, Vector16{});
  sync_warp();
  uint32_t fragment[4];
  const int row = kIsPlanted && t == 3 ? 4 * t + 1 : 4 * t;
  load_matrix_x4(fragment, shared_address(shared_ints() + row));
  p.out[t] = p.in[t] + static_cast<int32_t>(fragment[0]);
}

template <bool kIsPlanted>
__global__ void failed_check_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  device_check(p.in[t] != (kIsPlanted ? 22 : 0));
  p.out[t] = p.in[t];
}

// The sum is an array, as accumulators are, so that no compiler sees that it is not set.
template <bool kIsPlanted>
__global__ void uninitialised_register_kernel(const Params p) {
  const int t = static_cast<int>(threadIdx.x);
  int32_t sums[8];
  for (int i = kIsPlanted ? p.n : 0; i < 8; ++i) sums[i] = 0;
  sums[t % 8] += p.in[t];
  p.out[t] = sums[t % 8];
}

}  // namespace

std::string shared_past_end(bool is_planted) {
  return run(is_planted ? shared_kernel<1> : shared_kernel<0>, kConfig, kThreads, same);
}
std::string shared_far_outside(bool is_planted) {
  return run(is_planted ? shared_kernel<-100000> : shared_kernel<0>, kConfig, kThreads, same);
}
std::string global_write_past_end(bool is_planted) {
  return run(is_planted ? global_write_kernel<true> : global_write_kernel<false>, kConfig,
             kThreads - 1, same);
}
std::string global_read_past_end(bool is_planted) {
  return run(is_planted ? global_read_kernel<true> : global_read_kernel<false>, kConfig,
             kThreads - 1, same);
}
std::string copy_past_end(bool is_planted) {
  return run(is_planted ? copy_kernel<true> : copy_kernel<false>, kConfig, kThreads + 3, same);
}
std::string unwritten_output(bool is_planted) {
  return run(is_planted ? unwritten_kernel<true> : unwritten_kernel<false>, kConfig, kThreads + 3,
             same);
}
std::string null_pointer(bool is_planted) {
  return run(is_planted ? null_pointer_kernel<true> : null_pointer_kernel<false>, kConfig, kThreads,
             same);
}
std::string misaligned_copy(bool is_planted) {
  return run(is_planted ? misaligned_copy_kernel<true> : misaligned_copy_kernel<false>, kConfig,
             kThreads, same);
}
std::string misaligned_vector(bool is_planted) {
  return run(is_planted ? misaligned_vector_kernel<true> : misaligned_vector_kernel<false>, kConfig,
             kThreads, same);
}
std::string misaligned_matrix_row(bool is_planted) {
  return run(is_planted ? misaligned_matrix_row_kernel<true> : misaligned_matrix_row_kernel<false>,
             kConfig, kThreads, same);
}
std::string failed_check(bool is_planted) {
  return run(is_planted ? failed_check_kernel<true> : failed_check_kernel<false>, kConfig, kThreads,
             same);
}

std::string uninitialised_register(bool is_planted) {
  return run(
      is_planted ? uninitialised_register_kernel<true> : uninitialised_register_kernel<false>,
      kConfig, kThreads, same);
}

}  // namespace sparse_unified::planted
