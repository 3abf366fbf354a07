// SPDX-License-Identifier: Apache-2.0
// sort_by_expert on CUDA: stable counting sort of the flat (token, slot) index by expert. With
// i = t * K + k, e = topk_idx[i] and pos(i) = expert_offsets[e] + |{j < i : topk_idx[j] = e}|,
//   token_rows[i] = pos(i),  row_token[pos(i)] = i / K.
//
// Grid mapping: CTA b takes the rows [b * block_rows, (b + 1) * block_rows) of the flat index, in
// tiles of kThreads; at most kMaxBlocks CTAs, so that the scan over CTAs is one load of a warp.
// count_kernel leaves the rows of each CTA on each expert in block_counts. place_kernel adds them
// up, every CTA for itself (512 bytes an expert, from the L2 cache), which costs less than a
// third launch, and places the rows of the CTA. The rank within a warp comes from ballots over
// the bits of e, that across warps from a scan of the counts of warps in shared memory. Each
// counter has one writer at a time, so nothing depends on the order of threads.
//
// Bytes moved: 2 * 4 R read, 2 * 4 R written. That is 1 MB at R = 65536, so launches and latencies
// decide. Up to kOneBlockRows rows one CTA counts for itself, and there is one launch: a tile
// costs about as much as half a launch, and each is read twice.
//
// Precondition: R < 2^31, as rows are int32.
#include "sparse_unified/sort_by_expert.h"

#include "device/launch.h"
#include "device/warp.h"

namespace sparse_unified {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxBlocks = 128;
constexpr int kLaneBlocks = kMaxBlocks / kWarpSize;
constexpr int64_t kOneBlockRows = 2 * kThreads;
constexpr int64_t kWorkspaceAlignment = 256;
static_assert(kMaxBlocks % kWarpSize == 0);

struct SortKernelParams {
  SortByExpertParams sort;
  int32_t* block_counts;  // [E, kMaxBlocks], of which num_blocks columns are used
  int num_blocks;         //
  int64_t block_rows;     // a multiple of kThreads
  int num_expert_bits;    // of E - 1
};

// Shared memory of a block.
struct Counters {
  SPARSE_UNIFIED_DEVICE explicit Counters(int num_experts)
      : warps(reinterpret_cast<int32_t*>(dynamic_shared_memory())),
        totals(warps + kWarps * num_experts),
        next(totals + num_experts) {}
  static int64_t bytes(int64_t num_experts) {
    return (kWarps + 2) * num_experts * static_cast<int64_t>(sizeof(int32_t));
  }

  int32_t* warps;   // [kWarps, E], rows of each warp; then where its next row of an expert goes
  int32_t* totals;  // [E], rows of an expert
  int32_t* next;    // [E], where the block's next row of an expert goes
};

// One row of a lane, beside the others of its warp.
struct WarpRow {
  int expert;
  bool is_valid;   // the row exists
  uint32_t peers;  // lanes whose rows are of the same expert
};

// Reads the row `row_idx` of each lane. All lanes must take part.
SPARSE_UNIFIED_DEVICE WarpRow load_row(const SortKernelParams& p, int64_t row_idx) {
  WarpRow row{};
  row.is_valid = row_idx < p.sort.num_rows;
  if (row.is_valid) row.expert = p.sort.topk_idx[row_idx];
  device_check(row.expert >= 0 && row.expert < p.sort.num_experts);
  row.peers = ballot(row.is_valid);
  for (int bit = 0; bit < p.num_expert_bits; ++bit) {
    const bool is_set = (row.expert >> bit & 1) != 0;
    const uint32_t set = ballot(is_set);
    row.peers &= is_set ? set : ~set;
  }
  return row;
}

// Lanes before this one among the peers; the first of them writes for all.
SPARSE_UNIFIED_DEVICE int rank_in_warp(const WarpRow& row) {
  return count_bits(row.peers & ((1u << lane_idx()) - 1));
}

SPARSE_UNIFIED_DEVICE void clear(int32_t* warp_counts, int num_experts) {
  for (int e = lane_idx(); e < num_experts; e += kWarpSize) warp_counts[e] = 0;
  sync_warp();
}

// counters.warps[w][e] = rows of expert e among those that warp w reads of this block.
SPARSE_UNIFIED_DEVICE void count_rows(const SortKernelParams& p, const Counters& counters) {
  const int num_experts = static_cast<int>(p.sort.num_experts);
  int32_t* warp_counts = counters.warps + warp_idx() * num_experts;  // [E]
  clear(warp_counts, num_experts);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t end = begin + p.block_rows;
  for (int64_t first = begin + warp_idx() * kWarpSize; first < end; first += kThreads) {
    const WarpRow row = load_row(p, first + lane_idx());
    if (row.is_valid && rank_in_warp(row) == 0) {
      warp_counts[row.expert] += count_bits(row.peers);
    }
    sync_warp();  // another lane may be the first of the same expert in the next tile
  }
}

SPARSE_UNIFIED_DEVICE int32_t sum_warps(const Counters& counters, int num_experts, int e) {
  int32_t sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += counters.warps[w * num_experts + e];
  return sum;
}

__global__ void __launch_bounds__(kThreads) count_kernel(const SortKernelParams p) {
  const int num_experts = static_cast<int>(p.sort.num_experts);
  const Counters counters(num_experts);
  count_rows(p, counters);
  sync_threads();
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    p.block_counts[e * kMaxBlocks + blockIdx.x] = sum_warps(counters, num_experts, e);
  }
}

// totals[e] = rows of expert e in all blocks; next[e] = those in the blocks before this one.
SPARSE_UNIFIED_DEVICE void scan_blocks(const SortKernelParams& p, const Counters& counters) {
  const int block_idx = static_cast<int>(blockIdx.x);
  for (int e = warp_idx(); e < p.sort.num_experts; e += kWarps) {
    int32_t total = 0;
    int32_t before = 0;
#pragma unroll
    for (int i = 0; i < kLaneBlocks; ++i) {
      const int b = i * kWarpSize + lane_idx();
      const int32_t count = b < p.num_blocks ? p.block_counts[e * kMaxBlocks + b] : 0;
      total += count;
      before += b < block_idx ? count : 0;
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      total += shuffle_xor(total, mask);
      before += shuffle_xor(before, mask);
    }
    if (lane_idx() == 0) {
      counters.totals[e] = total;
      counters.next[e] = before;
    }
  }
}

template <bool kIsOneBlock>
__global__ void __launch_bounds__(kThreads) place_kernel(const SortKernelParams p) {
  const int num_experts = static_cast<int>(p.sort.num_experts);
  const Counters counters(num_experts);

  // Rows of each expert, and those before this block.
  if constexpr (kIsOneBlock) {
    count_rows(p, counters);
    sync_threads();
    for (int e = threadIdx.x; e < num_experts; e += kThreads) {
      counters.totals[e] = sum_warps(counters, num_experts, e);
      counters.next[e] = 0;
    }
  } else {
    scan_blocks(p, counters);
  }
  sync_threads();

  // Scan over experts. The thread that writes next[e] is the only one that reads it.
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int32_t offset = 0;
    for (int before = 0; before < e; ++before) offset += counters.totals[before];
    counters.next[e] += offset;
    if (blockIdx.x == 0) {
      p.sort.expert_offsets[e] = offset;
      if (e == num_experts - 1) p.sort.expert_offsets[e + 1] = offset + counters.totals[e];
    }
  }

  int32_t* warp_counts = counters.warps + warp_idx() * num_experts;  // [E]
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t end =
      begin + p.block_rows < p.sort.num_rows ? begin + p.block_rows : p.sort.num_rows;
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    clear(warp_counts, num_experts);
    const int64_t row_idx = tile + threadIdx.x;
    const WarpRow row = load_row(p, row_idx);
    const int rank = rank_in_warp(row);
    if (row.is_valid && rank == 0) warp_counts[row.expert] = count_bits(row.peers);
    sync_threads();

    // Counts of the warps become the places of their first rows.
    for (int e = threadIdx.x; e < num_experts; e += kThreads) {
      int32_t place = counters.next[e];
      for (int w = 0; w < kWarps; ++w) {
        int32_t& warp_count = counters.warps[w * num_experts + e];
        const int32_t count = warp_count;
        warp_count = place;
        place += count;
      }
      counters.next[e] = place;
    }
    sync_threads();

    if (row.is_valid) {
      const int32_t place = warp_counts[row.expert] + rank;
      p.sort.token_rows[row_idx] = place;
      p.sort.row_token[place] = static_cast<int32_t>(static_cast<uint32_t>(row_idx) /
                                                     static_cast<uint32_t>(p.sort.top_k));
    }
    sync_warp();  // all lanes have read warp_counts before it is cleared
  }
}

}  // namespace

int64_t sort_by_expert_cuda_workspace_bytes(const SortByExpertParams& params) {
  const int64_t bytes = params.num_experts * kMaxBlocks * static_cast<int64_t>(sizeof(int32_t));
  return ceil_div(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
}

cudaError_t sort_by_expert_cuda(const SortByExpertParams& params, void* workspace,
                                cudaStream_t stream) {
  SortKernelParams p{};
  p.sort = params;
  p.block_counts = static_cast<int32_t*>(workspace);
  while ((params.num_experts - 1) >> p.num_expert_bits > 0) ++p.num_expert_bits;
  LaunchConfig config{};
  config.grid = dim3(1);
  config.num_threads = kThreads;
  config.shared_bytes = Counters::bytes(params.num_experts);
  config.stream = stream;
  p.num_blocks = 1;
  if (params.num_rows <= kOneBlockRows) {
    p.block_rows = kOneBlockRows;
    return launch(place_kernel<true>, config, p);
  }
  const int64_t num_tiles = ceil_div<int64_t>(params.num_rows, kThreads);
  const int64_t block_tiles = ceil_div<int64_t>(num_tiles, kMaxBlocks);
  p.block_rows = block_tiles * kThreads;
  p.num_blocks = static_cast<int>(ceil_div(num_tiles, block_tiles));
  config.grid = dim3(static_cast<unsigned>(p.num_blocks));
  const cudaError_t error = launch(count_kernel, config, p);
  if (error != cudaSuccess) return error;
  return launch(place_kernel<false>, config, p);
}

}  // namespace sparse_unified
