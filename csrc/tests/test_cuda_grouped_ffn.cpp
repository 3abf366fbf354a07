// SPDX-License-Identifier: Apache-2.0
// grouped_ffn forward on CUDA, run by the emulator.
#include <sys/mman.h>

#include "cuda_grouped_ffn_case.h"
#include "emulation/testing.h"

namespace sparse_unified::test {
namespace {

template <typename T>
struct ForwardOutputs {
  Array<T> y, gate_rows, up_rows;
  explicit ForwardOutputs(const FfnData<T>& data)
      : y(data.num_rows * data.shape.hidden_size),
        gate_rows(data.num_rows * data.shape.expert_width),
        up_rows(data.num_rows * data.shape.expert_width) {
    for (Array<T>* array : {&y, &gate_rows, &up_rows}) fill_nan(*array);
  }
};

template <typename T>
ForwardOutputs<T> run_forward(FfnData<T>& data, bool keeps_rows) {
  ForwardOutputs<T> out(data);
  GroupedFfnCudaParams params = data.params();
  params.y = out.y.get();
  if (keeps_rows) {
    params.gate_rows = out.gate_rows.get();
    params.up_rows = out.up_rows.get();
  }
  Array<unsigned char> workspace(grouped_ffn_cuda_workspace_bytes(params, kHopper));
  fill_nan(workspace);
  const std::string refusal = grouped_ffn_cuda_refusal(params, kHopper);
  if (!refusal.empty()) fail((std::string(data.shape.name) + ": " + refusal).c_str(), 0, 1, 0);
  const cudaError_t error = grouped_ffn_cuda(params, kHopper, workspace.get(), nullptr);
  check_equal("error of the launch", 0, error, cudaSuccess);
  return out;
}

template <typename T>
void test_forward_is_as_good_as_torch() {
  Random random(1);
  emulation::set_schedule({1, emulation::Order::kRandom, emulation::Copies::kRandom});
  for (const FfnCase& shape : ffn_cases()) {
    FfnData<T> data(shape, random);
    const FfnResults exact = reference<false>(data);
    const FfnResults torch = reference<true>(data);
    for (const std::string& tiles : tile_overrides()) {
      set_override(tiles);
      const std::string name = std::string(Traits<T>::kName) + ", " + shape.name + ", " + tiles;
      auto out = run_forward(data, true);
      check_as_good_as_torch(name + ": y", out.y, exact.y, torch.y);
      check_as_good_as_torch(name + ": gate_rows", out.gate_rows, exact.gate, torch.gate);
      check_as_good_as_torch(name + ": up_rows", out.up_rows, exact.up, torch.up);
    }
  }
}

// Whatever runs first, whatever lands when; and whether rows are kept.
template <typename T>
void test_forward_repeats_bit_for_bit() {
  Random random(2);
  FfnData<T> data(ffn_cases()[kRaggedCase], random);
  for (const std::string& tiles : tile_overrides()) {
    set_override(tiles);
    emulation::set_schedule({});
    auto expected = run_forward(data, true);
    bool keeps_rows = false;
    failures() +=
        emulation::for_each_schedule(tiles.c_str(), emulation::schedules(), failures, [&] {
          auto out = run_forward(data, keeps_rows);
          check_same_bits(tiles + ": y", out.y, expected.y);
          if (keeps_rows) check_same_bits(tiles + ": up_rows", out.up_rows, expected.up_rows);
          keeps_rows = !keeps_rows;
        });
  }
}

// Rows of a token do not depend on where in a tile they are, nor on the tile.
void test_equal_rows_have_equal_results() {
  Random random(3);
  FfnData<BFloat16> data({.name = "equal rows",
                          .num_tokens = 1,
                          .hidden_size = 72,
                          .expert_width = 40,
                          .group_rows = {200}},
                         random);
  for (const std::string& tiles : tile_overrides()) {
    set_override(tiles);
    auto out = run_forward(data, false);
    for (int64_t i = 72; i < out.y.size(); ++i) {
      check_equal((tiles + ": row of the same token").c_str(), i, out.y[i].bits,
                  out.y[i % 72].bits);
    }
  }
}

// Rows of x and weights far apart, so that offsets exceed 2^32 elements. Only pages with values
// become memory.
void test_offsets_beyond_32_bits() {
  using T = BFloat16;
  constexpr int64_t kStride = int64_t{1} << 29;
  constexpr int64_t kRows = 16;
  constexpr size_t kBytes = static_cast<size_t>(kRows * kStride) * sizeof(T);
  Random random(4);
  FfnData<T> data({.name = "far apart",
                   .num_tokens = kRows,
                   .hidden_size = kRows,
                   .expert_width = kRows,
                   .group_rows = {40}},
                  random);
  set_override("");
  auto expected = run_forward(data, false);
  for (const auto matrix :
       {&FfnData<T>::x, &FfnData<T>::gate_proj, &FfnData<T>::up_proj, &FfnData<T>::down_proj}) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return fail("mmap", 0, 0, 1);
    T* far = static_cast<T*>(memory);
    Matrix<T>& near = data.*matrix;
    for (int64_t i = 0; i < kRows; ++i) {
      std::memcpy(far + i * kStride, near.get() + i * near.stride, kRows * sizeof(T));
    }
    GroupedFfnCudaParams params = data.params();
    const struct {
      const void** pointer;
      int64_t* stride;
    } fields[] = {{&params.x, &params.x_stride},
                  {&params.gate_proj, &params.gate_stride},
                  {&params.up_proj, &params.up_stride},
                  {&params.down_proj, &params.down_stride}};
    for (const auto& field : fields) {
      if (*field.pointer != near.get()) continue;
      *field.pointer = far;
      *field.stride = kStride;
    }
    ForwardOutputs<T> out(data);
    params.y = out.y.get();
    Array<unsigned char> workspace(grouped_ffn_cuda_workspace_bytes(params, kHopper));
    check_equal("error", 0, grouped_ffn_cuda(params, kHopper, workspace.get(), nullptr),
                cudaSuccess);
    check_same_bits("rows far apart", out.y, expected.y);
    munmap(memory, kBytes);
  }
}

template <class Spoil>
void check_kernel_refuses(const char* what, FfnData<BFloat16> data, const Spoil& spoil) {
  spoil(data);
  bool is_refused = false;
  try {
    run_forward(data, false);
  } catch (const emulation::Error&) {
    is_refused = true;
  }
  if (!is_refused) fail(what, 0, 0, 1);
}

// What the host cannot see without waiting ends the kernel.
void test_indices_outside_end_the_kernel() {
  set_override("");
  const auto make = [](const FfnCase& shape) {
    Random random(5);
    return FfnData<BFloat16>(shape, random);
  };
  const auto cases = ffn_cases();
  check_kernel_refuses("a token beyond the last", make(cases[kRaggedCase]),
                       [](auto& data) { data.row_token[3] = 60; });
  check_kernel_refuses("a negative token", make(cases[kRaggedCase]),
                       [](auto& data) { data.row_token[3] = -1; });
  check_kernel_refuses("an offset beyond the last row", make(cases[kRaggedCase]),
                       [](auto& data) { data.offsets.back() += 1; });
  check_kernel_refuses("falling offsets", make(cases[kRaggedCase]),
                       [](auto& data) { data.offsets[2] = data.offsets[4] + 1; });
  check_kernel_refuses("a block beyond the last", make(cases[kKeptBlocksCase]),
                       [](auto& data) { data.shape.kept_blocks[1] = 6; });
}

template <class Change>
void check_refusal(const char* words, const Change& change) {
  Random random(6);
  FfnData<BFloat16> data(ffn_cases()[kRaggedCase], random);
  GroupedFfnCudaParams params = data.params();
  DeviceInfo device = kHopper;
  change(params, device);
  const std::string refusal = grouped_ffn_cuda_refusal(params, device);
  const bool is_named = *words == 0 ? refusal.empty() : refusal.find(words) != std::string::npos;
  if (!is_named) {
    fail((std::string("refusal \"") + refusal + "\" instead of " + words).c_str(), 0, 0, 1);
  }
}

void test_refusals_name_what_and_got() {
  set_override("");
  check_refusal("", [](auto&, auto&) {});
  check_refusal("bfloat16 or float16", [](auto& p, auto&) { p.dtype = DType::kFloat32; });
  check_refusal("got 75", [](auto&, auto& device) { device.compute_capability = 75; });
  check_refusal("hidden_size must be a multiple of 8, got 100",
                [](auto& p, auto&) { p.hidden_size = 100; });
  check_refusal("expert_width must be a multiple of 8, got 148",
                [](auto& p, auto&) { p.expert_width = 148; });
  check_refusal("x must start", [](auto& p, auto&) { p.x = static_cast<const char*>(p.x) + 2; });
  check_refusal("down_proj must have rows a multiple of 8 elements apart, got 281",
                [](auto& p, auto&) { p.down_stride = 281; });
  check_refusal("block_size must be a multiple of 16, got 24",
                [](auto& p, auto&) { p.blocks = {p.row_token, 7, 24, 10}; });
  check_refusal("expert_width must share",
                [](auto& p, auto&) { p.blocks = {p.row_token, 7, 32, 10}; });
  check_refusal("rows must be below 2^30", [](auto& p, auto&) { p.num_rows = int64_t{1} << 30; });
  check_refusal("shared memory", [](auto&, auto& device) { device.shared_bytes_block = 4096; });
  set_override("up=1x2x3x4");
  check_refusal("SPARSE_UNIFIED_GROUPED_FFN must be", [](auto&, auto&) {});
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests("test_cuda_grouped_ffn", [] {
    test_forward_is_as_good_as_torch<BFloat16>();
    if (!emulation::kIsSmall) test_forward_is_as_good_as_torch<Float16>();
    test_forward_repeats_bit_for_bit<BFloat16>();
    test_equal_rows_have_equal_results();
    test_offsets_beyond_32_bits();
    test_indices_outside_end_the_kernel();
    test_refusals_name_what_and_got();
  });
}
