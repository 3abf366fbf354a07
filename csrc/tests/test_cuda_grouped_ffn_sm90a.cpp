// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels of grouped_ffn, run by the emulator.
#include "cuda/grouped_ffn_sm90a.h"
#include "cuda_grouped_ffn_case.h"
#include "emulation/testing.h"

namespace sparse_unified::test {
namespace {

// Widths are multiples of 16; tails in every other dimension, and in tiles of 120 and 256 neurons.
std::vector<FfnCase> sm90a_cases() {
  return {
      {.name = "ragged experts, some empty, strided weights",
       .num_tokens = 60,
       .hidden_size = 200,
       .expert_width = 144,
       .group_rows = {0, 1, 37, 130, 0, 64, 0},
       .padding = 8},
      {.name = "all rows on one expert, wider than a tile",
       .num_tokens = 300,
       .hidden_size = 264,
       .expert_width = 272,
       .group_rows = {0, 300, 0}},
      {.name = "every token on every expert",
       .num_tokens = 5,
       .hidden_size = 8,
       .expert_width = 16,
       .group_rows = {5, 5, 5}},
      {.name = "a long sum over one step of rows",
       .num_tokens = 40,
       .hidden_size = 520,
       .expert_width = 48,
       .group_rows = {64, 65}},
  };
}

template <typename T>
struct Outputs {
  Array<T> y, gate_rows, up_rows, grad_rows, grad_gate_proj, grad_up_proj, grad_down_proj;
  explicit Outputs(const FfnData<T>& data)
      : y(data.num_rows * data.shape.hidden_size),
        gate_rows(data.num_rows * data.shape.expert_width),
        up_rows(data.num_rows * data.shape.expert_width),
        grad_rows(data.num_rows * data.shape.hidden_size),
        grad_gate_proj(data.width * data.shape.hidden_size),
        grad_up_proj(data.width * data.shape.hidden_size),
        grad_down_proj(data.width * data.shape.hidden_size) {
    for (Array<T>* array :
         {&y, &gate_rows, &up_rows, &grad_rows, &grad_gate_proj, &grad_up_proj, &grad_down_proj}) {
      fill_nan(*array);
    }
  }
};

// Few multiprocessors, so that a block computes several tiles.
constexpr DeviceInfo kSmallHopper{90, 3, 227 * 1024, 228 * 1024};

template <typename T>
Outputs<T> run(FfnData<T>& data, const GroupedFfnSm90aOptions& options) {
  Outputs<T> out(data);
  GroupedFfnCudaParams forward = data.params();
  forward.y = out.y.get();
  forward.gate_rows = out.gate_rows.get();
  forward.up_rows = out.up_rows.get();
  const int64_t size =
      grouped_ffn_sm90a_padded_rows(data.num_rows, forward.num_experts) * data.shape.expert_width;
  Array<T> hidden(size), grad_gate(size), grad_up(size);
  for (Array<T>* array : {&hidden, &grad_gate, &grad_up}) fill_nan(*array);
  const auto ok = [](const char* what, cudaError_t error) {
    check_equal(what, 0, error, cudaSuccess);
  };
  ok("up", grouped_ffn_up_sm90a(forward, kSmallHopper, options, hidden.get(), nullptr));
  ok("down", grouped_ffn_down_sm90a(forward, kSmallHopper, options, hidden.get(), nullptr));

  GroupedFfnBackwardCudaParams backward{};
  backward.forward = forward;
  backward.grad_y = data.grad_y.get();
  backward.grad_rows = out.grad_rows.get();
  backward.grad_gate_proj = out.grad_gate_proj.get();
  backward.grad_up_proj = out.grad_up_proj.get();
  backward.grad_down_proj = out.grad_down_proj.get();
  fill_nan(hidden);
  ok("grad_hidden", grouped_ffn_grad_hidden_sm90a(backward, kSmallHopper, grad_gate.get(),
                                                  grad_up.get(), hidden.get(), nullptr));
  ok("grad_rows",
     grouped_ffn_grad_rows_sm90a(backward, kSmallHopper, grad_gate.get(), grad_up.get(), nullptr));
  ok("grad_weights", grouped_ffn_grad_weights_sm90a(backward, kSmallHopper, grad_gate.get(),
                                                    grad_up.get(), hidden.get(), nullptr));
  return out;
}

template <typename T>
void check_results(const std::string& name, Outputs<T>& out, const FfnResults& exact,
                   const FfnResults& torch) {
  check_as_good_as_torch(name + ": gate_rows", out.gate_rows, exact.gate, torch.gate);
  check_as_good_as_torch(name + ": up_rows", out.up_rows, exact.up, torch.up);
  check_as_good_as_torch(name + ": y", out.y, exact.y, torch.y);
  check_as_good_as_torch(name + ": grad_rows", out.grad_rows, exact.grad_rows, torch.grad_rows);
  check_as_good_as_torch(name + ": grad_gate_proj", out.grad_gate_proj, exact.grad_gate_proj,
                         torch.grad_gate_proj);
  check_as_good_as_torch(name + ": grad_up_proj", out.grad_up_proj, exact.grad_up_proj,
                         torch.grad_up_proj);
  check_as_good_as_torch(name + ": grad_down_proj", out.grad_down_proj, exact.grad_down_proj,
                         torch.grad_down_proj);
}

template <typename T>
void test_as_good_as_torch() {
  Random random(1);
  const auto cases = sm90a_cases();
  for (size_t i = 0; i < cases.size(); i += emulation::by_scale<size_t>(1, 3)) {
    const FfnCase& shape = cases[i];
    FfnData<T> data(shape, random);
    const FfnResults exact = reference<false>(data);
    const FfnResults torch = reference<true>(data);
    const std::string name = std::string(Traits<T>::kName) + ", " + shape.name;
    failures() +=
        emulation::for_each_schedule(name.c_str(), emulation::schedules(0), failures, [&] {
          auto out = run(data, {});
          check_results(name, out, exact, torch);
        });
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  using namespace sparse_unified;
  test::test_as_good_as_torch<BFloat16>();
  if (!emulation::kIsSmall) test::test_as_good_as_torch<Float16>();
  return test::finish("test_cuda_grouped_ffn_sm90a");
}
