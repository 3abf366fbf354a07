// SPDX-License-Identifier: Apache-2.0
// grouped_ffn backward on CUDA, run by the emulator.
#include "cuda_grouped_ffn_case.h"
#include "emulation/testing.h"

namespace sparse_unified::test {
namespace {

template <typename T>
struct BackwardOutputs {
  Array<T> grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj;
  explicit BackwardOutputs(const FfnData<T>& data)
      : grad_rows(data.num_rows * data.shape.hidden_size),
        grad_gate_proj(data.width * data.shape.hidden_size),
        grad_up_proj(data.width * data.shape.hidden_size),
        grad_down_proj(data.width * data.shape.hidden_size) {
    for (Array<T>* array : {&grad_rows, &grad_gate_proj, &grad_up_proj, &grad_down_proj}) {
      fill_nan(*array);
    }
  }
};

// Rows that forward kept: the rounded activations.
template <typename T>
Array<T> stored(const Values& values) {
  Array<T> out(static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < out.size(); ++i) {
    const double value = values[static_cast<size_t>(i)];
    out[i] = Traits<T>::stored(std::abs(value) < 0x1p-14 ? 0.0 : value);
  }
  return out;
}

struct Wanted {
  bool grad_rows = true;
  bool grad_gate_up = true;
  bool grad_down = true;
};

template <typename T>
BackwardOutputs<T> run_backward(FfnData<T>& data, Array<T>& gate_rows, Array<T>& up_rows,
                                const Wanted& wanted = {}) {
  BackwardOutputs<T> out(data);
  GroupedFfnBackwardCudaParams params{
      .forward = data.params(),
      .grad_y = data.grad_y.get(),
      .grad_rows = wanted.grad_rows ? out.grad_rows.get() : nullptr,
      .grad_gate_proj = wanted.grad_gate_up ? out.grad_gate_proj.get() : nullptr,
      .grad_up_proj = wanted.grad_gate_up ? out.grad_up_proj.get() : nullptr,
      .grad_down_proj = wanted.grad_down ? out.grad_down_proj.get() : nullptr};
  params.forward.gate_rows = gate_rows.get();
  params.forward.up_rows = up_rows.get();
  Array<unsigned char> workspace(grouped_ffn_backward_cuda_workspace_bytes(params, kHopper));
  fill_nan(workspace);
  check_equal("error of the launch", 0,
              grouped_ffn_backward_cuda(params, kHopper, workspace.get(), nullptr), cudaSuccess);
  return out;
}

template <typename T>
void check_same_bits(const std::string& what, BackwardOutputs<T>& out,
                     BackwardOutputs<T>& expected) {
  check_same_bits(what + ": grad_rows", out.grad_rows, expected.grad_rows);
  check_same_bits(what + ": grad_gate_proj", out.grad_gate_proj, expected.grad_gate_proj);
  check_same_bits(what + ": grad_up_proj", out.grad_up_proj, expected.grad_up_proj);
  check_same_bits(what + ": grad_down_proj", out.grad_down_proj, expected.grad_down_proj);
}

template <typename T>
void test_backward_is_as_good_as_torch() {
  Random random(11);
  emulation::set_schedule({11, emulation::Order::kRandom, emulation::Copies::kRandom});
  for (const FfnCase& shape : ffn_cases()) {
    FfnData<T> data(shape, random);
    const FfnResults exact = reference<false>(data);
    const FfnResults torch = reference<true>(data);
    Array<T> gate_rows = stored<T>(torch.gate);
    Array<T> up_rows = stored<T>(torch.up);
    for (const std::string& tiles : tile_overrides()) {
      set_override(tiles);
      const std::string name = std::string(Traits<T>::kName) + ", " + shape.name + ", " + tiles;
      auto out = run_backward(data, gate_rows, up_rows);
      check_as_good_as_torch(name + ": grad_rows", out.grad_rows, exact.grad_rows, torch.grad_rows);
      check_as_good_as_torch(name + ": grad_gate_proj", out.grad_gate_proj, exact.grad_gate_proj,
                             torch.grad_gate_proj);
      check_as_good_as_torch(name + ": grad_up_proj", out.grad_up_proj, exact.grad_up_proj,
                             torch.grad_up_proj);
      check_as_good_as_torch(name + ": grad_down_proj", out.grad_down_proj, exact.grad_down_proj,
                             torch.grad_down_proj);
    }
  }
}

// Whatever runs first, whatever lands when.
template <typename T>
void test_backward_repeats_bit_for_bit() {
  Random random(12);
  FfnData<T> data(ffn_cases()[kRaggedCase], random);
  const FfnResults torch = reference<true>(data);
  Array<T> gate_rows = stored<T>(torch.gate);
  Array<T> up_rows = stored<T>(torch.up);
  for (const std::string& tiles : tile_overrides()) {
    set_override(tiles);
    emulation::set_schedule({});
    auto expected = run_backward(data, gate_rows, up_rows);
    failures() +=
        emulation::for_each_schedule(tiles.c_str(), emulation::schedules(), failures, [&] {
          auto out = run_backward(data, gate_rows, up_rows);
          check_same_bits(tiles, out, expected);
        });
  }
}

// What is not wanted stays untouched; what is does not change.
template <typename T>
void test_frozen_weights_are_skipped() {
  Random random(13);
  set_override("");
  for (const size_t idx : {kRaggedCase, kKeptBlocksCase}) {
    FfnData<T> data(ffn_cases()[idx], random);
    const FfnResults torch = reference<true>(data);
    Array<T> gate_rows = stored<T>(torch.gate);
    Array<T> up_rows = stored<T>(torch.up);
    auto all = run_backward(data, gate_rows, up_rows);
    BackwardOutputs<T> none(data);
    for (int bits = 0; bits < 8; ++bits) {
      const Wanted wanted{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
      auto out = run_backward(data, gate_rows, up_rows, wanted);
      auto& gate_up = wanted.grad_gate_up ? all : none;
      check_same_bits("grad_rows", out.grad_rows, (wanted.grad_rows ? all : none).grad_rows);
      check_same_bits("grad_gate_proj", out.grad_gate_proj, gate_up.grad_gate_proj);
      check_same_bits("grad_up_proj", out.grad_up_proj, gate_up.grad_up_proj);
      check_same_bits("grad_down_proj", out.grad_down_proj,
                      (wanted.grad_down ? all : none).grad_down_proj);
    }
  }
}

// The empty experts of the first case, and all experts without any row.
void test_experts_without_rows_get_zeros() {
  using T = BFloat16;
  Random random(14);
  set_override("");
  for (const size_t idx : {kRaggedCase, kNoRowsCase}) {
    FfnData<T> data(ffn_cases()[idx], random);
    const FfnResults torch = reference<true>(data);
    Array<T> gate_rows = stored<T>(torch.gate);
    Array<T> up_rows = stored<T>(torch.up);
    auto out = run_backward(data, gate_rows, up_rows);
    const int64_t h = data.shape.expert_width;
    const int64_t d = data.shape.hidden_size;
    for (size_t group = 0; group < data.shape.group_rows.size(); ++group) {
      if (data.shape.group_rows[group] != 0) continue;
      for (int64_t i = 0; i < h * d; ++i) {
        const int64_t neuron = static_cast<int64_t>(group) * h + i / d;
        const int64_t column = i % d;
        check_equal("gate", i, out.grad_gate_proj[neuron * d + column].bits, 0);
        check_equal("up", i, out.grad_up_proj[neuron * d + column].bits, 0);
        check_equal("down", i, out.grad_down_proj[column * data.width + neuron].bits, 0);
      }
    }
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests("test_cuda_grouped_ffn_backward", [] {
    test_backward_is_as_good_as_torch<BFloat16>();
    if (!emulation::kIsSmall) test_backward_is_as_good_as_torch<Float16>();
    test_backward_repeats_bit_for_bit<BFloat16>();
    test_frozen_weights_are_skipped<Float16>();
    test_experts_without_rows_get_zeros();
  });
}
