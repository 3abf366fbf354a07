// SPDX-License-Identifier: Apache-2.0
// sort_by_expert on CUDA, run by the emulator, against a stable sort, bit for bit.
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernel_check.h"
#include "sparse_unified/cuda/sort_by_expert.h"

namespace sparse_unified::test {
namespace {

// How the rows are spread over the experts.
enum class Load { kUniform, kFirst, kLast, kEveryThird, kRuns };

int32_t draw_expert(Load load, int64_t i, int64_t num_experts, Random& random) {
  const auto draw = static_cast<int64_t>(random() % static_cast<uint64_t>(num_experts));
  switch (load) {
    case Load::kUniform:
      return static_cast<int32_t>(draw);
    case Load::kFirst:
      return 0;
    case Load::kLast:
      return static_cast<int32_t>(num_experts - 1);
    case Load::kEveryThird:  // two of three experts stay empty
      return static_cast<int32_t>(draw / 3 * 3);
    case Load::kRuns:  // of 40, longer than a warp
      return static_cast<int32_t>(i / 40 % num_experts);
  }
  return 0;
}

struct Maps {
  Maps(int64_t num_rows, int64_t num_experts)
      : expert_offsets(num_experts + 1), row_token(num_rows), token_rows(num_rows) {
    poison(expert_offsets);
    poison(row_token);
    poison(token_rows);
  }
  Array<int32_t> expert_offsets;
  Array<int32_t> row_token;
  Array<int32_t> token_rows;
};

Maps sort_on_cuda(Array<int32_t>& topk_idx, int64_t num_experts, int64_t top_k) {
  Maps maps(topk_idx.size(), num_experts);
  const SortByExpertParams params{topk_idx.get(),
                                  maps.expert_offsets.get(),
                                  maps.row_token.get(),
                                  maps.token_rows.get(),
                                  topk_idx.size(),
                                  num_experts,
                                  top_k};
  Array<unsigned char> workspace(sort_by_expert_cuda_workspace_bytes(params));
  check_equal("workspace", 0, static_cast<double>(workspace.size() % 256), 0);
  std::memset(workspace.get(), 0xff, static_cast<size_t>(workspace.size()));
  next_schedule();
  check_launch("sort_by_expert", sort_by_expert_cuda(params, workspace.get(), nullptr));
  return maps;
}

void test_sort(int64_t num_tokens, int64_t top_k, int64_t num_experts, Load load, Random& random) {
  const int64_t num_rows = num_tokens * top_k;
  Array<int32_t> topk_idx(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) topk_idx[i] = draw_expert(load, i, num_experts, random);

  std::vector<int64_t> order(static_cast<size_t>(num_rows));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return topk_idx[a] < topk_idx[b]; });

  Maps maps = sort_on_cuda(topk_idx, num_experts, top_k);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t i = order[static_cast<size_t>(row)];
    check_equal("row_token", row, maps.row_token[row], static_cast<double>(i / top_k));
    check_equal("token_rows", i, maps.token_rows[i], static_cast<double>(row));
  }
  for (int64_t e = 0; e <= num_experts; ++e) {
    const int64_t count = std::count_if(topk_idx.get(), topk_idx.get() + num_rows,
                                        [&](int32_t expert) { return expert < e; });
    check_equal("expert_offsets", e, maps.expert_offsets[e], static_cast<double>(count));
  }
}

void test_bad_expert(int64_t num_tokens, int64_t at, int32_t bad) {
  constexpr int64_t kTopK = 2;
  constexpr int64_t kExperts = 5;
  Array<int32_t> topk_idx(num_tokens * kTopK);
  topk_idx[at] = bad;
  check_stops("an expert out of range", [&] { sort_on_cuda(topk_idx, kExperts, kTopK); });
}

void run_all() {
  Random random(12);
  // Up to 1024 rows one block sorts; beyond, blocks of 512 rows.
  for (const int64_t num_experts : {1, 5, 16, 32, 33, 256}) {
    for (const int64_t num_tokens : {0, 1, 37, 300}) {
      for (const int64_t top_k : {int64_t{1}, int64_t{2}, int64_t{8}, num_experts}) {
        if (top_k > num_experts || num_tokens * top_k > 10000) continue;
        test_sort(num_tokens, top_k, num_experts, Load::kUniform, random);
      }
    }
    for (const Load load : {Load::kFirst, Load::kLast, Load::kEveryThird, Load::kRuns}) {
      test_sort(100, 2, num_experts, load, random);
      test_sort(261, 8, num_experts, load, random);
    }
  }
  // Both sides of every border between tiles, and of that between one block and several.
  for (const int64_t num_rows : {31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 1536, 1537}) {
    test_sort(num_rows, 1, 7, Load::kUniform, random);
  }
  // More tiles than blocks: two tiles a block, three a block.
  test_sort(8500, 8, 16, Load::kUniform, random);
  test_sort(131073, 1, 3, Load::kRuns, random);
  for (const int32_t bad : {-1, 5}) {
    test_bad_expert(20, 0, bad);
    test_bad_expert(20, 39, bad);
    test_bad_expert(800, 1599, bad);
  }
}

}  // namespace
}  // namespace sparse_unified::test

int main() {
  return sparse_unified::test::run_tests("cuda sort_by_expert", sparse_unified::test::run_all);
}
