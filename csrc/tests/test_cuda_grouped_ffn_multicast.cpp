// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels of grouped_ffn whose blocks share the weights by pairs, run by the emulator.
// They add in the same order as those whose blocks are on their own, so their results are the same
// bits, and rows that those leave alone stay unwritten.
#include "cuda_grouped_ffn_sm90a_case.h"

namespace sparse_unified::test {
namespace {

// Multiprocessors for two pairs of blocks and one left over.
constexpr DeviceInfo kTwoPairs{90, 5, 227 * 1024, 228 * 1024};

// Even and odd numbers of tiles of rows, so that the second block of a pair has none; widths that
// end within a step as BAGEL's do (1184 = 18.5 * 64, 592 = 9.25 * 64).
std::vector<FfnCase> pair_cases() {
  std::vector<FfnCase> cases{
      {.name = "one, two and three tiles of rows, some experts empty",
       .num_tokens = 50,
       .hidden_size = 72,
       .expert_width = 144,
       .group_rows = {0, 300, 128, 0, 1, 129},
       .padding = 8},
      {.name = "few rows for many experts",
       .num_tokens = 9,
       .hidden_size = 136,
       .expert_width = 160,
       .group_rows = {0, 1, 0, 0, 2, 1, 0}},
  };
  if (!emulation::kIsSmall) {
    cases.push_back({.name = "more tiles of rows than one band of the raster",
                     .num_tokens = 30,
                     .hidden_size = 72,
                     .expert_width = 144,
                     .group_rows = {17 * 128 + 3}});
    cases.push_back({.name = "a long sum, wider than a tile",
                     .num_tokens = 30,
                     .hidden_size = 520,
                     .expert_width = 272,
                     .group_rows = {130}});
    cases.push_back({.name = "no rows",
                     .num_tokens = 4,
                     .hidden_size = 16,
                     .expert_width = 16,
                     .group_rows = {0, 0}});
  }
  return cases;
}

GroupedFfnSm90aOptions with_multicast(GroupedFfnSm90aOptions options) {
  options.multicasts_weights = true;
  return options;
}

template <typename T>
void check_same(const std::string& name, Outputs<T>& out, Outputs<T>& expected) {
  check_same_bits(name + ": hidden", out.hidden, expected.hidden);
  check_same_bits(name + ": gate_rows", out.gate_rows, expected.gate_rows);
  check_same_bits(name + ": up_rows", out.up_rows, expected.up_rows);
  check_same_bits(name + ": y", out.y, expected.y);
}

template <typename T>
void test_cases(const std::vector<FfnCase>& cases, const GroupedFfnSm90aOptions& options) {
  Random random(1);
  for (const FfnCase& shape : cases) {
    FfnData<T> data(shape, random);
    const std::string name = std::string(Traits<T>::kName) + ", " + shape.name;
    auto alone = run_forward(data, options);
    check_forward(name, alone, reference<false>(data), reference<true>(data));
    failures() +=
        emulation::for_each_schedule(name.c_str(), emulation::schedules(0), failures, [&] {
          // One pair of blocks, and more pairs than have work.
          const bool is_small = emulation::schedule().seed % 2 != 0;
          const DeviceInfo& device = is_small ? kSmallHopper : kHopper;
          auto out = run_forward(data, with_multicast(options), device);
          check_same(name, out, alone);
        });
  }
}

// Every tile, in one random schedule.
void test_tiles() {
  using T = BFloat16;
  Random random(2);
  emulation::set_schedule({3, emulation::Order::kRandom, emulation::Copies::kRandom});
  FfnData<T> data(pair_cases()[emulation::by_scale<size_t>(0, 1)], random);
  const auto check = [&](const GroupedFfnSm90aOptions& options) {
    auto alone = run_forward(data, options);
    auto out = run_forward(data, with_multicast(options), kTwoPairs);
    check_same("up " + std::to_string(static_cast<int>(options.up)) + ", down " +
                   std::to_string(static_cast<int>(options.down)),
               out, alone);
  };
  for (size_t up = 0; up < std::size(kGroupedFfnSm90aUpTiles); ++up) {
    GroupedFfnSm90aOptions options;
    options.up = static_cast<GroupedFfnSm90aUpTile>(up);
    check(options);
  }
  for (size_t down = 1; down < std::size(kGroupedFfnSm90aDownTiles); ++down) {
    GroupedFfnSm90aOptions options;
    options.down = static_cast<GroupedFfnSm90aDownTile>(down);
    check(options);
  }
}

void test_lists_of_blocks() {
  auto cases = list_cases();
  if (emulation::kIsSmall) cases = {cases[2]};
  GroupedFfnSm90aOptions options;
  options.up = GroupedFfnSm90aUpTile::k256x4;
  test_cases<BFloat16>(cases, options);
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  using namespace sparse_unified;
  using namespace sparse_unified::test;
  return run_tests("test_cuda_grouped_ffn_multicast", [] {
    test_cases<BFloat16>(pair_cases(), {});
    if (!emulation::kIsSmall) test_cases<Float16>({pair_cases()[0]}, {});
    test_tiles();
    test_lists_of_blocks();
  });
}
