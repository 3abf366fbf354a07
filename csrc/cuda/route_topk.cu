// SPDX-License-Identifier: Apache-2.0
// route_topk on CUDA: logits[t, e] = <x[t], gate[e]> in fp32, and the K largest of each token.
//
// Grid mapping: a CTA takes kBlockTokens tokens and all experts, kGroupExperts at a time. Its
// warps share D: in steps of kStepColumns, warp w takes the kWarpColumns columns from
// w * kWarpColumns. A lane loads 16 bytes of a row of x or gate straight into registers, which is a
// fragment of mma.sync for 16-bit types once the columns are renumbered alike in x and gate (a sum
// over D does not care), and needs no shared memory; the next step is loaded while this one is
// multiplied. The sums of the warps meet in shared memory and are added in the order of warps, so
// the bits of a token depend on x[t] and gate alone.
//
// Bytes and operations at T = 4096, D = 3584, E = 32, 16 bits, on an H200: x is 29.4 MB, read once
// from memory: 6.8 us at 4.3 TB/s. gate, 229 kB, is read by each of the 128 CTAs, which are one
// wave on 132 SMs: 29.4 MB from the L2 cache, meanwhile (half of it for E = 16). The
// 0.94 GFLOP are 1 us of the tensor cores, the 32 comparisons for each of T * E logits below 1 us.
// By this count, not by measurement, about 12 us with the launch. In fp32 the multiply-adds take
// 14 us and x 13.7 us. For more than 32 experts x is read once a group, from the L2 cache after the
// first. On fewer SMs the 128 CTAs are two waves, on an A100 of 108 and 20: 12 us of memory and 5
// of the few, 17 instead of 15 for even ones. CTAs of 16 tokens would read gate twice as often, 88
// MB from L2 instead of 59, which takes as long.
//
// Selection: the rank of a logit is the number of logits that precede it (larger first, NaN before
// everything, equal ones by lower index); a rank below K is its place. No sorting, no exchange.
#include "sparse_unified/route_topk.h"

#include <cmath>

#include "device/columns.h"
#include "device/launch.h"
#include "device/mma.h"

namespace sparse_unified {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlockTokens = 32;
constexpr int kTileExperts = 8;  // columns of an mma
constexpr int kWarpColumns = 32;
constexpr int kStepColumns = kWarps * kWarpColumns;

// Shared memory of a block. Lane l's i-th sum of warp w lies at [w][i][l], whatever token and
// expert it is of: no two lanes meet in a bank, and all addresses are one plus a constant.
template <int kTiles>
struct SharedSums {
  static constexpr int kLaneSums = kBlockTokens * kTiles * kTileExperts / kWarpSize;
  static constexpr int kPartials = kWarps * kLaneSums * kWarpSize;

  static int64_t bytes(int64_t num_experts) {
    return (kPartials + kBlockTokens * num_experts) * static_cast<int64_t>(sizeof(float));
  }

  SPARSE_UNIFIED_DEVICE float& partial(int warp, int sum, int lane) const {
    return partials[(warp * kLaneSums + sum) * kWarpSize + lane];
  }

  float* partials;  // [kWarps, kLaneSums, kWarpSize]
  float* logits;    // [kBlockTokens, E]
};

// Which sum a lane holds, within the tokens of a block and the experts of a group.
struct SumIndex {
  int token;
  int expert;
};

// The rows that a lane loads: rows beyond the last are the last again, whose sums nobody reads.
template <typename T>
SPARSE_UNIFIED_DEVICE const T* clamped_row(const Matrix& matrix, int64_t idx) {
  const int64_t last = matrix.rows - 1;
  return matrix.row<T>(idx < last ? idx : last);
}

// The warp's share of the sums of kBlockTokens tokens and kTiles * kTileExperts experts.
template <typename T, int kTiles, bool kIsAligned>
struct WarpSums;

// 16-bit types, by mma.sync: lane l loads the 8 columns from 8 * (l % 4) of rows l / 4, l / 4 + 8
// and so on. Words 0 and 1 of the 16 bytes are its fragment of a first product over 16 columns,
// words 2 and 3 that of a second.
template <typename T, int kTiles, bool kIsAligned>
struct WarpSums {
  static constexpr int kRows = kBlockTokens / 8;  // of x, of a lane
  static constexpr int kMmaTokens = 16;

  struct Step {
    int64_t column;
    Vector16 x[kRows];
  };

  const T* x[kRows];      // [D]
  const T* gate[kTiles];  // [D]
  float sums[kRows / 2][kTiles][4] = {};

  SPARSE_UNIFIED_DEVICE WarpSums(const RouteTopkParams& p, int64_t token, int64_t expert) {
    const int row = lane_idx() / 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = clamped_row<T>(p.x, token + 8 * i + row);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      gate[n] = clamped_row<T>(p.gate, expert + kTileExperts * n + row);
    }
  }

  SPARSE_UNIFIED_DEVICE Step load(int64_t column, int64_t hidden_size) const {
    Step step{column + lane_idx() % 4 * kVectorElements<T>, {}};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      step.x[i] = load_columns_once<T, kIsAligned>(x[i], step.column, hidden_size);
    }
    return step;
  }

  SPARSE_UNIFIED_DEVICE void add(const Step& step, int64_t hidden_size) {
    Vector16 experts[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      experts[n] = load_columns_once<T, kIsAligned>(gate[n], step.column, hidden_size);
    }
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
#pragma unroll
      for (int m = 0; m < kRows / 2; ++m) {
        const Vector16& low = step.x[2 * m];
        const Vector16& high = step.x[2 * m + 1];
        const uint32_t a[4] = {low.words[k], high.words[k], low.words[k + 1], high.words[k + 1]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const uint32_t b[2] = {experts[n].words[k], experts[n].words[k + 1]};
          multiply_add<T>(sums[m][n], a, b);
        }
      }
    }
  }

  SPARSE_UNIFIED_DEVICE float sum(int i) const {
    return sums[i / 4 / kTiles][i / 4 % kTiles][i % 4];
  }

  static SPARSE_UNIFIED_DEVICE SumIndex index(int i, int lane) {
    return {kMmaTokens * (i / 4 / kTiles) + 8 * (i % 4 / 2) + lane / 4,
            kTileExperts * (i / 4 % kTiles) + lane % 4 * 2 + i % 2};
  }
};

// fp32, by multiply-adds: lane l sums tokens l / 8 + 4 * i and experts l % 8 + 8 * n. Lanes of a
// token and lanes of an expert load the same address.
template <int kTiles, bool kIsAligned>
struct WarpSums<float, kTiles, kIsAligned> {
  static constexpr int kRows = kBlockTokens / 4;

  const float* x[kRows];      // [D]
  const float* gate[kTiles];  // [D]
  float sums[kRows][kTiles] = {};

  struct Step {
    int64_t column;
  };

  SPARSE_UNIFIED_DEVICE WarpSums(const RouteTopkParams& p, int64_t token, int64_t expert) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = clamped_row<float>(p.x, token + 4 * i + lane_idx() / 8);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      gate[n] = clamped_row<float>(p.gate, expert + kTileExperts * n + lane_idx() % 8);
    }
  }

  // NOTE: nothing is loaded ahead: the columns of a step take 384 bytes of registers at a time.
  SPARSE_UNIFIED_DEVICE Step load(int64_t column, int64_t) const { return {column}; }

  SPARSE_UNIFIED_DEVICE void add(const Step& step, int64_t hidden_size) {
#pragma unroll 1
    for (int d = 0; d < kWarpColumns; d += 4) {
      float values[kRows][4];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        widen<float>(load_columns<float, kIsAligned>(x[i], step.column + d, hidden_size),
                     values[i]);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float weights[4];
        widen<float>(load_columns<float, kIsAligned>(gate[n], step.column + d, hidden_size),
                     weights);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[i][n] = fmaf(values[i][c], weights[c], sums[i][n]);
        }
      }
    }
  }

  SPARSE_UNIFIED_DEVICE float sum(int i) const { return sums[i / kTiles][i % kTiles]; }

  static SPARSE_UNIFIED_DEVICE SumIndex index(int i, int lane) {
    return {4 * (i / kTiles) + lane / 8, kTileExperts * (i % kTiles) + lane % 8};
  }
};

// Number of logits that precede that of `expert`.
SPARSE_UNIFIED_DEVICE int rank_of(const float* logits, int expert, int num_experts) {
  const float logit = logits[expert];
  const bool is_nan = std::isnan(logit);
  int rank = 0;
  for (int other = 0; other < num_experts; ++other) {
    const float value = logits[other];
    // Those of a lower index win ties.
    const bool is_before = other < expert ? !(value < logit) : !(value <= logit);
    const bool is_before_nan = other < expert && std::isnan(value);
    rank += is_nan ? is_before_nan : is_before;
  }
  return rank;
}

template <typename T, int kTiles, bool kIsAligned>
__global__ void __launch_bounds__(kThreads, 1) route_topk_kernel(const RouteTopkParams p) {
  using Sums = WarpSums<T, kTiles, kIsAligned>;
  constexpr int kGroupExperts = kTiles * kTileExperts;
  constexpr int kLaneSums = SharedSums<kTiles>::kLaneSums;
  auto* memory = reinterpret_cast<float*>(dynamic_shared_memory());
  const SharedSums<kTiles> shared{memory, memory + SharedSums<kTiles>::kPartials};
  const int thread_idx = static_cast<int>(threadIdx.x);
  const int num_experts = static_cast<int>(p.gate.rows);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  const int64_t tokens_left = p.x.rows - first_token;
  const int num_tokens = static_cast<int>(tokens_left < kBlockTokens ? tokens_left : kBlockTokens);

  for (int first_expert = 0; first_expert < num_experts; first_expert += kGroupExperts) {
    Sums sums(p, first_token, first_expert);
    int64_t column = warp_idx() * kWarpColumns;
    auto step = sums.load(column, p.x.columns);
#pragma unroll 1
    for (; column < p.x.columns; column += kStepColumns) {
      const auto next_step = sums.load(column + kStepColumns, p.x.columns);
      sums.add(step, p.x.columns);
      step = next_step;
    }
#pragma unroll
    for (int i = 0; i < kLaneSums; ++i) {
      shared.partial(warp_idx(), i, lane_idx()) = sums.sum(i);
    }
    sync_threads();

    // Sum over the warps, in their order.
    for (int i = warp_idx(); i < kLaneSums; i += kWarps) {
      float logit = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) logit += shared.partial(w, i, lane_idx());
      const SumIndex index = Sums::index(i, lane_idx());
      const int expert = first_expert + index.expert;
      if (index.token < num_tokens && expert < num_experts) {
        shared.logits[index.token * num_experts + expert] = logit;
        p.logits[(first_token + index.token) * num_experts + expert] = logit;
      }
    }
    sync_threads();
  }

  for (int i = thread_idx; i < num_tokens * num_experts; i += kThreads) {
    const int token = i / num_experts;
    const int expert = i % num_experts;
    const float* logits = shared.logits + token * num_experts;
    const int rank = rank_of(logits, expert, num_experts);
    if (rank < p.top_k) {
      const int64_t slot = (first_token + token) * p.top_k + rank;
      p.topk_logits[slot] = logits[expert];
      p.topk_idx[slot] = expert;
    }
  }
}

template <typename T, int kTiles, bool kIsAligned>
cudaError_t launch_route_topk(const RouteTopkParams& params, cudaStream_t stream) {
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(params.x.rows, kBlockTokens)));
  config.num_threads = kThreads;
  config.shared_bytes = SharedSums<kTiles>::bytes(params.gate.rows);
  config.shared_limit = SharedSums<kTiles>::bytes(kMaxCudaExperts);
  config.stream = stream;
  return launch(route_topk_kernel<T, kTiles, kIsAligned>, config, params);
}

template <typename T>
cudaError_t launch_route_topk(const RouteTopkParams& params, cudaStream_t stream) {
  const bool is_aligned =
      has_aligned_columns<T>(params.x.data, params.x.stride, params.x.columns) &&
      has_aligned_columns<T>(params.gate.data, params.gate.stride, params.x.columns);
  if (!is_aligned) return launch_route_topk<T, 2, false>(params, stream);
  if (params.gate.rows <= 2 * kTileExperts) return launch_route_topk<T, 2, true>(params, stream);
  return launch_route_topk<T, 4, true>(params, stream);
}

}  // namespace

cudaError_t route_topk_cuda(const RouteTopkParams& params, cudaStream_t stream) {
  return dispatch_dtype(params.dtype,
                        [&]<typename T>(T) { return launch_route_topk<T>(params, stream); });
}

}  // namespace sparse_unified
