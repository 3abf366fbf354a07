// SPDX-License-Identifier: Apache-2.0
// The choice of kernels for grouped_ffn: BAGEL's shapes and odd ones, on every kind of device.
#include <string>

#include "check.h"
#include "sparse_unified/cuda/grouped_ffn.h"
#include "sparse_unified/cuda/grouped_ffn_config.h"

namespace sparse_unified::test {
namespace {

// Limits of the architectures; multiprocessors of A100, RTX 3090, RTX 4090, H200, B200, RTX 5090.
constexpr DeviceInfo kDevices[] = {
    {80, 108, 163 * 1024, 164 * 1024},  {86, 82, 99 * 1024, 100 * 1024},
    {89, 128, 99 * 1024, 100 * 1024},   {90, 132, 227 * 1024, 228 * 1024},
    {100, 148, 227 * 1024, 228 * 1024}, {120, 170, 99 * 1024, 100 * 1024},
};
constexpr const DeviceInfo& kH200 = kDevices[3];
constexpr const DeviceInfo& kRtx4090 = kDevices[2];

void check_text(const char* what, const std::string& out, const std::string& expected) {
  if (out != expected) {
    fail((std::string(what) + ": \"" + out + "\" instead of \"" + expected + "\"").c_str(), 0, 0,
         1);
  }
}

GroupedFfnProblem bagel(int64_t num_tokens, int64_t num_experts, int64_t top_k,
                        int64_t hidden_size = 3584, int64_t intermediate_size = 18944) {
  return {DType::kBFloat16,
          num_tokens * top_k,
          hidden_size,
          num_experts,
          intermediate_size / num_experts,
          0,
          false,
          false};
}

// pruned_ffn on half of the blocks.
GroupedFfnProblem bagel_half(int64_t num_tokens, int64_t block_size, bool is_backward = false) {
  GroupedFfnProblem problem = bagel(num_tokens, 1, 1);
  problem.expert_width /= 2;
  problem.block_size = block_size;
  problem.is_backward = is_backward;
  problem.has_sm90a_code = true;
  return problem;
}

void test_every_choice_fits_the_device() {
  for (const DeviceInfo& device : kDevices) {
    for (const int64_t num_tokens : {0, 1, 37, 256, 512, 1024, 2048, 4096, 8192, 16384}) {
      for (const GroupedFfnProblem& problem :
           {bagel(num_tokens, 16, 8), bagel(num_tokens, 32, 16), bagel(num_tokens, 1, 1),
            bagel(num_tokens, 16, 8, 896, 4736), bagel_half(num_tokens, 64),
            GroupedFfnProblem{DType::kFloat16, 5, 8, 256, 8, 0, false, false}}) {
        const GroupedFfnConfig config = choose_grouped_ffn_config(problem, device);
        for (const GroupedFfnTileId id : config.tiles) {
          const GroupedFfnTile& tile = grouped_ffn_tile(id);
          const bool fits = tile.shared_bytes() <= device.shared_bytes_block;
          check_equal("tile fits", device.compute_capability, fits, true);
        }
      }
    }
  }
}

void test_bagel_shapes() {
  const std::string medium =
      "sm80 up=128x128x32x3 down=128x128x32x3 grad_hidden=128x128x32x3 grad_rows=128x128x32x3 "
      "grad_weights=128x128x32x3";
  // A sum over a short K takes the medium tile everywhere: over h = 592, or over few rows.
  const auto check = [&](const GroupedFfnProblem& problem) {
    const auto tile = [](int64_t k) { return k < 1024 ? "128x128x32x3" : "128x256x32x4"; };
    const int64_t width = problem.expert_width;
    const std::string expected = std::string("sm80 up=128x256x32x4 down=") + tile(width) +
                                 " grad_hidden=128x256x32x4 grad_rows=" + tile(2 * width) +
                                 " grad_weights=" + tile(problem.num_rows / problem.num_experts);
    check_text("H200", to_string(choose_grouped_ffn_config(problem, kH200)), expected);
    GroupedFfnProblem with_code = problem;
    with_code.has_sm90a_code = true;
    check_text("H200 with its code", to_string(choose_grouped_ffn_config(with_code, kH200)),
               "sm90a up=128x240x64x4 down=128x256x64x4 overlap=on fence=consumer multicast=off "
               "grad_multicast=off");
    check_text("RTX 4090 with the code", to_string(choose_grouped_ffn_config(with_code, kRtx4090)),
               medium);
    check_text("RTX 4090", to_string(choose_grouped_ffn_config(problem, kRtx4090)), medium);
  };
  for (const int64_t num_tokens : {1024, 2048, 4096, 8192, 16384}) {
    check(bagel(num_tokens, 16, 8));
    check(bagel(num_tokens, 32, 16));
  }
  for (const int64_t num_tokens : {4096, 8192, 16384}) check(bagel(num_tokens, 1, 1));
}

// Hopper's kernels take the blocks that are whole steps of the down-projection, forward; the others
// and the gradients run on the portable ones.
void test_lists_of_blocks() {
  const auto text = [](const GroupedFfnProblem& problem, const DeviceInfo& device = kH200) {
    return to_string(choose_grouped_ffn_config(problem, device));
  };
  for (const int64_t num_tokens : {256, 1024, 4096, 16384}) {
    for (const int64_t block_size : {64, 128}) {
      check_text("forward", text(bagel_half(num_tokens, block_size)),
                 "sm90a up=128x256x64x4 down=128x256x64x4 overlap=on fence=consumer multicast=off "
                 "grad_multicast=off");
      check_text("backward", text(bagel_half(num_tokens, block_size, true)).substr(0, 5), "sm80 ");
      check_text("another device", text(bagel_half(num_tokens, block_size), kRtx4090).substr(0, 5),
                 "sm80 ");
    }
    for (const int64_t block_size : {16, 32}) {
      check_text("small blocks", text(bagel_half(num_tokens, block_size)).substr(0, 5), "sm80 ");
    }
  }
  check_text("few rows", text(bagel_half(64, 64)).substr(0, 5), "sm80 ");
}

// 1024 rows of a dense FFN are 112 large tiles of y, not a round of blocks on 132 multiprocessors.
void test_few_tiles_are_smaller() {
  const auto config = choose_grouped_ffn_config(bagel(1024, 1, 1), kH200);
  check_equal("down", 1024, static_cast<int>(config.tile(GroupedFfnPhase::kDown)),
              static_cast<int>(GroupedFfnTileId::kMedium));
}

// A tile of 128 rows would be half empty for experts of up to 64 rows.
void test_few_rows_take_small_tiles() {
  for (const int64_t num_tokens : {1, 37, 128}) {
    const auto config = choose_grouped_ffn_config(bagel(num_tokens, 16, 8), kH200);
    check_equal("up", num_tokens, static_cast<int>(config.tile(GroupedFfnPhase::kUp)),
                static_cast<int>(GroupedFfnTileId::kSmall));
    check_equal("grad_weights", num_tokens,
                static_cast<int>(config.tile(GroupedFfnPhase::kGradWeights)),
                static_cast<int>(GroupedFfnTileId::kMedium));
  }
}

void test_what_hopper_kernels_do_not_take() {
  GroupedFfnProblem problem = bagel(4096, 16, 8);
  GroupedFfnSm90aOptions options;
  const auto refusal = [&](const DeviceInfo& device) {
    return grouped_ffn_sm90a_refusal(problem, device, options);
  };
  check_text("no code", refusal(kH200),
             "the library must be built for 9.0a for family=sm90a, got a build without it");
  problem.has_sm90a_code = true;
  check_text("BAGEL", refusal(kH200), "");
  check_text("another device", refusal(kRtx4090),
             "the device must have compute capability 90 for family=sm90a, got 89");
  problem = bagel_half(4096, 64);
  check_text("tile", refusal(kH200),
             "up must be 128x256x64x4 for family=sm90a and a list of blocks, got 128x240x64x4");
  options.up = GroupedFfnSm90aUpTile::k256x4;
  check_text("blocks", refusal(kH200), "");
  problem.block_size = 32;
  check_text("small blocks", refusal(kH200),
             "block_size must be a multiple of 64 for family=sm90a, got 32");
  problem.block_size = 192;
  problem.expert_width = 96;
  check_text("groups within steps", refusal(kH200),
             "expert_width must be a multiple of 64 for family=sm90a and a list of blocks, got 96");
  problem = bagel_half(4096, 64, true);
  check_text("backward", refusal(kH200),
             "family must be sm80 for the gradients of a list of blocks, got sm90a");
  problem = bagel(4096, 16, 8);
  problem.has_sm90a_code = true;
  options.multicasts_weights = true;
  check_text("multicast", refusal(kH200), "");
  options.fences_producer = true;
  check_text("multicast and the producer's fence", refusal(kH200),
             "fence must be consumer for multicast=on, got producer");
  options = {};
  problem.expert_width = 296;
  check_text("width", refusal(kH200),
             "expert_width must be a multiple of 16 for family=sm90a, got 296");
  check_text("width", to_string(choose_grouped_ffn_config(problem, kH200)).substr(0, 5), "sm80 ");
  // Experts with few rows.
  problem = bagel(64, 16, 8);
  problem.has_sm90a_code = true;
  check_text("rows", to_string(choose_grouped_ffn_config(problem, kH200)).substr(0, 5), "sm80 ");
}

void test_overrides() {
  const GroupedFfnProblem problem = bagel(4096, 16, 8);
  const auto choose = [&](const char* text) {
    check_text(text, grouped_ffn_override_error(text), "");
    return to_string(choose_grouped_ffn_config(problem, kH200, text));
  };
  check_text("none", choose(""), to_string(choose_grouped_ffn_config(problem, kH200)));
  check_text("products of torch", choose("family=grouped_mm"), choose(""));
  check_text("one phase", choose("grad_rows=64x128x32x4"),
             "sm80 up=128x256x32x4 down=128x256x32x4 grad_hidden=128x256x32x4 "
             "grad_rows=64x128x32x4 grad_weights=128x256x32x4");
  check_text("options", choose("family=sm90a,overlap=off,fence=producer"),
             "sm90a up=128x240x64x4 down=128x256x64x4 overlap=off fence=producer multicast=off "
             "grad_multicast=off");
  check_text("multicast", choose("family=sm90a,multicast=on"),
             "sm90a up=128x240x64x4 down=128x256x64x4 overlap=on fence=consumer multicast=on "
             "grad_multicast=off");
  check_text("tiles of both", choose("family=sm90a,up=128x240x64x3,down=128x128x64x6"),
             "sm90a up=128x240x64x3 down=128x128x64x6 overlap=on fence=consumer multicast=off "
             "grad_multicast=off");
  check_text("later entries win", choose("all=128x128x32x3,down=64x128x32x4"),
             "sm80 up=128x128x32x3 down=64x128x32x4 grad_hidden=128x128x32x3 "
             "grad_rows=128x128x32x3 grad_weights=128x128x32x3");
}

void test_wrong_overrides_are_named() {
  for (const char* text :
       {"up", "up=", "up=128x256x32", "left=128x256x32x4", "=128x256x32x4", "up=128x256x32x4,",
        ",up=128x256x32x4", "up=128x256x32x4 ", "all=128x240x64x4", "down=128x240x64x4",
        "grad_rows=128x256x64x4", "family=sm70", "overlap=yes", "fence=", "multicast=2"}) {
    if (grouped_ffn_override_error(text).empty()) fail(text, 0, 0, 1);
  }
  check_text(
      "message", grouped_ffn_override_error("down=64x128x32x4,up=7"),
      "SPARSE_UNIFIED_GROUPED_FFN must be NAME=VALUE with commas between: "
      "family=sm80|sm90a|grouped_mm, up=128x240x64x4|128x240x64x3|128x256x64x4, "
      "down=128x256x64x4|128x256x64x3|128x128x64x6, "
      "overlap=off|on, fence=consumer|producer, multicast=off|on, grad_multicast=off|on, "
      "up=128x256x32x4|128x128x32x3|64x128x32x4, down=128x256x32x4|128x128x32x3|64x128x32x4, "
      "grad_hidden=128x256x32x4|128x128x32x3|64x128x32x4, "
      "grad_rows=128x256x32x4|128x128x32x3|64x128x32x4, "
      "grad_weights=128x256x32x4|128x128x32x3|64x128x32x4, or all=TILE for every phase of sm80; "
      "got \"up=7\"");
  for (const std::string& variant : grouped_ffn_variants()) {
    check_text(variant.c_str(), grouped_ffn_override_error(variant), "");
  }
}

// What bindings cannot bring about is refused all the same.
void test_rules_stand_for_what_they_name() {
  set_grouped_ffn_rules(
      "90 0 0 0 0 0 0 0 family=sm80\n"
      "90 132 3584 16 1184 0 32768 1 up=128x128x32x3\n"
      "90 132 3584 16 1184 0 32768 1 nonsense\nnonsense\n");
  GroupedFfnProblem problem = bagel(4096, 16, 8);
  const std::string both = "family=sm80,up=128x128x32x3";
  check_text("its shape", grouped_ffn_rules_for(problem, kH200), both);
  check_text("another device", grouped_ffn_rules_for(problem, kRtx4090), "");
  check_text("half of its rows", grouped_ffn_rules_for(bagel(2048, 16, 8), kH200), both);
  check_text("fewer", grouped_ffn_rules_for(bagel(2047, 16, 8), kH200), "family=sm80");
  check_text("twice its rows", grouped_ffn_rules_for(bagel(8192, 16, 8), kH200), "family=sm80");
  check_text("other experts", grouped_ffn_rules_for(bagel(4096, 32, 8), kH200), "family=sm80");
  problem.is_backward = true;
  check_text("backward", grouped_ffn_rules_for(problem, kH200), "family=sm80");
  set_grouped_ffn_rules("");
  check_text("none", grouped_ffn_rules_for(problem, kH200), "");
}

void test_refusals_name_what_and_got() {
  alignas(16) static const char memory[16] = {};
  GroupedFfnCudaParams legal{};
  legal.dtype = DType::kBFloat16;
  legal.x = legal.gate_proj = legal.up_proj = legal.down_proj = {memory, 64, 64, 64};
  legal.num_rows = 64;
  legal.num_experts = 1;
  legal.expert_width = 64;
  const auto refuse = [&](const char* refusal, const auto& change) {
    GroupedFfnCudaParams params = legal;
    DeviceInfo device = kH200;
    change(params, device);
    check_text("refusal", plan_grouped_ffn_cuda(params, device, false).refusal, refusal);
  };
  refuse("", [](auto&, auto&) {});
  refuse("x must be bfloat16 or float16", [](auto& p, auto&) { p.dtype = DType::kFloat32; });
  refuse("the device must have compute capability 80 or more, got 75",
         [](auto&, auto& device) { device.compute_capability = 75; });
  refuse("hidden_size must be a multiple of 8, got 100", [](auto& p, auto&) { p.x.columns = 100; });
  refuse("expert_width must be a multiple of 8, got 148",
         [](auto& p, auto&) { p.expert_width = 148; });
  refuse("x must start at a multiple of 16 bytes", [](auto& p, auto&) { p.x.data = memory + 2; });
  refuse("down_proj must have rows a multiple of 8 elements apart, got 281",
         [](auto& p, auto&) { p.down_proj.stride = 281; });
  const int32_t kept[] = {0, 1};
  refuse("block_size must be a multiple of 16, got 24",
         [&](auto& p, auto&) { p.blocks = {kept, 2, 24, 2}; });
  refuse("expert_width must share the kept blocks out equally, got 64",
         [&](auto& p, auto&) { p.blocks = {kept, 2, 16, 4}; });
  refuse("the number of rows must be below 2^30, got 1073741824",
         [](auto& p, auto&) { p.num_rows = int64_t{1} << 30; });
  refuse("shared memory of a block must hold a tile of every kernel, got 4096",
         [](auto& p, auto& device) {
           p.num_rows = 1;
           device.shared_bytes_block = 4096;
         });
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified::test;
  return run_tests(argc, argv,
                   {{"every choice fits the device", test_every_choice_fits_the_device},
                    {"bagel shapes", test_bagel_shapes},
                    {"lists of blocks", test_lists_of_blocks},
                    {"few tiles are smaller", test_few_tiles_are_smaller},
                    {"few rows take small tiles", test_few_rows_take_small_tiles},
                    {"what hopper kernels do not take", test_what_hopper_kernels_do_not_take},
                    {"overrides", test_overrides},
                    {"wrong overrides are named", test_wrong_overrides_are_named},
                    {"rules", test_rules_stand_for_what_they_name},
                    {"refusals", test_refusals_name_what_and_got}});
}
