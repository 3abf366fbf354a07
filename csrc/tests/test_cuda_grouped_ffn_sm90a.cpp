// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels of grouped_ffn, run by the emulator.
#include "cuda_grouped_ffn_sm90a_case.h"

namespace sparse_unified::test {
namespace {

template <typename T>
Outputs<T> run(FfnData<T>& data, const GroupedFfnSm90aOptions& options) {
  Outputs<T> out = run_forward(data, options);
  GroupedFfnCudaParams forward = data.params();
  forward.gate_rows = out.gate_rows.get();
  forward.up_rows = out.up_rows.get();
  const int64_t size =
      grouped_ffn_sm90a_padded_rows(data.num_rows, forward.num_experts) * data.shape.expert_width;
  Array<T> hidden(size), grad_gate(size), grad_up(size);
  for (Array<T>* array : {&hidden, &grad_gate, &grad_up}) fill_nan(*array);
  GroupedFfnBackwardCudaParams backward{};
  backward.forward = forward;
  backward.grad_y = data.grad_y.get();
  backward.grad_rows = out.grad_rows.get();
  backward.grad_gate_proj = out.grad_gate_proj.get();
  backward.grad_up_proj = out.grad_up_proj.get();
  backward.grad_down_proj = out.grad_down_proj.get();
  check_success("grad_hidden",
                grouped_ffn_grad_hidden_sm90a(backward, kSmallHopper, grad_gate.get(),
                                              grad_up.get(), hidden.get(), nullptr));
  check_success("grad_rows", grouped_ffn_grad_rows_sm90a(backward, kSmallHopper, grad_gate.get(),
                                                         grad_up.get(), nullptr));
  check_success("grad_weights",
                grouped_ffn_grad_weights_sm90a(backward, kSmallHopper, grad_gate.get(),
                                               grad_up.get(), hidden.get(), nullptr));
  return out;
}

template <typename T>
void check_results(const std::string& name, Outputs<T>& out, const FfnResults& exact,
                   const FfnResults& torch) {
  check_forward(name, out, exact, torch);
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

// Every tile and fence, each in one random schedule.
void test_options_are_as_good_as_torch() {
  using T = BFloat16;
  Random random(2);
  emulation::set_schedule({3, emulation::Order::kRandom, emulation::Copies::kRandom});
  FfnData<T> data(sm90a_cases()[emulation::by_scale<size_t>(1, 3)], random);
  const FfnResults exact = reference<false>(data);
  const FfnResults torch = reference<true>(data);
  const auto check = [&](const GroupedFfnSm90aOptions& options) {
    const std::string name = std::string(data.shape.name) + ", up " +
                             std::to_string(static_cast<int>(options.up)) + ", down " +
                             std::to_string(static_cast<int>(options.down)) + ", fence " +
                             std::to_string(options.fences_producer);
    auto out = run_forward(data, options);
    check_forward(name, out, exact, torch);
  };
  for (const bool fences_producer : {false, true}) {
    for (size_t up = 0; up < std::size(kGroupedFfnSm90aUpTiles); ++up) {
      GroupedFfnSm90aOptions options;
      options.up = static_cast<GroupedFfnSm90aUpTile>(up);
      options.fences_producer = fences_producer;
      check(options);
    }
  }
  for (size_t down = 1; down < std::size(kGroupedFfnSm90aDownTiles); ++down) {
    GroupedFfnSm90aOptions options;
    options.down = static_cast<GroupedFfnSm90aDownTile>(down);
    check(options);
  }
}

template <typename T>
void test_lists_of_blocks_are_as_good_as_torch() {
  Random random(4);
  const auto cases = list_cases();
  for (size_t i = 0; i < cases.size(); i += emulation::by_scale<size_t>(1, 2)) {
    FfnData<T> data(cases[i], random);
    forget_what_is_not_kept(data);
    const FfnResults exact = reference<false>(data);
    const FfnResults torch = reference<true>(data);
    const std::string name = std::string(Traits<T>::kName) + ", " + data.shape.name;
    GroupedFfnSm90aOptions options;
    options.up = GroupedFfnSm90aUpTile::k256x4;
    failures() +=
        emulation::for_each_schedule(name.c_str(), emulation::schedules(0), failures, [&] {
          auto out = run_forward(data, options);
          check_forward(name, out, exact, torch);
        });
    options.fences_producer = true;
    options.down = GroupedFfnSm90aDownTile::k128x6;
    auto out = run_forward(data, options);
    check_forward(name + ", other options", out, exact, torch);
  }
}

// The list is read by the kernels alone; what one call keeps is no matter of the next.
void test_lists_change_from_call_to_call() {
  using T = BFloat16;
  Random random(5);
  FfnData<T> data(list_cases()[0], random);
  setenv(kGroupedFfnOverrideVariable, "family=sm90a", 1);
  for (const std::vector<int32_t>& kept : {std::vector<int32_t>{0, 1, 2}, {4, 2, 1}, {3, 4, 0}}) {
    data.shape.kept_blocks = kept;
    GroupedFfnCudaParams params = data.params();
    Outputs<T> out(data);
    params.y = out.y.get();
    Array<unsigned char> workspace(grouped_ffn_cuda_workspace_bytes(params, kHopper));
    fill_nan(workspace);
    check_success("pruned", grouped_ffn_cuda(params, kHopper, workspace.get(), nullptr));
    check_as_good_as_torch("y of another list", out.y, reference<false>(data).y,
                           reference<true>(data).y);
  }
  unsetenv(kGroupedFfnOverrideVariable);
}

void test_blocks_outside_end_the_kernel() {
  for (const int32_t wrong : {-1, 5}) {
    Random random(6);
    FfnData<BFloat16> data(list_cases()[0], random);
    data.shape.kept_blocks[1] = wrong;
    GroupedFfnSm90aOptions options;
    options.up = GroupedFfnSm90aUpTile::k256x4;
    bool is_refused = false;
    try {
      run_forward(data, options);
    } catch (const emulation::Error&) {
      is_refused = true;
    }
    check_equal("refused", wrong, is_refused, true);
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests("test_cuda_grouped_ffn_sm90a", [] {
    test_as_good_as_torch<BFloat16>();
    if (!emulation::kIsSmall) test_as_good_as_torch<Float16>();
    test_options_are_as_good_as_torch();
    test_lists_of_blocks_are_as_good_as_torch<BFloat16>();
    if (!emulation::kIsSmall) test_lists_of_blocks_are_as_good_as_torch<Float16>();
    if (!emulation::kIsSmall) test_lists_change_from_call_to_call();
    test_blocks_outside_end_the_kernel();
  });
}
