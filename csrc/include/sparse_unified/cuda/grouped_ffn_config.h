// SPDX-License-Identifier: Apache-2.0
// Which kernels grouped_ffn runs on CUDA: a pure function from problem and device to a
// configuration that people can read and tuning can override.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparse_unified/cuda/device_info.h"
#include "sparse_unified/dtype.h"

namespace sparse_unified {

struct GroupedFfnProblem {
  DType dtype;           //
  int64_t num_rows;      // R
  int64_t hidden_size;   // D
  int64_t num_experts;   // E, groups
  int64_t expert_width;  // h
  int64_t block_size;    // neurons of a kept block; 0 without a list of blocks
  bool is_backward;      //
  bool has_sm90a_code;   // the library holds kernels for Hopper
  int64_t down_rows{};   // of ExpertSpacing
};

// The GEMMs of forward and backward.
enum class GroupedFfnPhase {
  kUp,           // hidden [R, h] = swiglu(x gate_proj^T, x up_proj^T)
  kDown,         // y [R, D] = hidden down_proj^T
  kGradHidden,   // grad_gate, grad_up [R, h] from grad_y down_proj
  kGradRows,     // grad_rows [R, D] = grad_gate gate_proj + grad_up up_proj
  kGradWeights,  // grad_gate_proj, grad_up_proj, grad_down_proj, sums over rows
};
constexpr int kNumGroupedFfnPhases = 5;

// Kernels by the oldest architecture that runs them; those for Hopper run there alone.
enum class GroupedFfnFamily { kSm80, kSm90a };

// Tiles 128 x n x 64 of the kernels for Hopper; n of the up-projection counts gate and up.
struct GroupedFfnSm90aTile {
  int n;
  int num_stages;
};
constexpr int kSm90aTileRows = 128;
constexpr int kSm90aTileK = 64;
// The first wastes least of 2h = 2368 and 1184; the last takes lists of blocks.
enum class GroupedFfnSm90aUpTile { k240x4, k240x3, k256x4 };
constexpr GroupedFfnSm90aTile kGroupedFfnSm90aUpTiles[] = {{240, 4}, {240, 3}, {256, 4}};
enum class GroupedFfnSm90aDownTile { k256x4, k256x3, k128x6 };
constexpr GroupedFfnSm90aTile kGroupedFfnSm90aDownTiles[] = {{256, 4}, {256, 3}, {128, 6}};

// What only a measurement can choose between in the kernels for Hopper.
struct GroupedFfnSm90aOptions {
  GroupedFfnSm90aUpTile up = GroupedFfnSm90aUpTile::k240x4;
  GroupedFfnSm90aDownTile down = GroupedFfnSm90aDownTile::k256x4;
  // Programmatic dependent launch of the down-projection.
  bool overlaps_kernels = true;
  // Gathered rows reach wgmma by a fence of the producer that waits for its copies, instead of one
  // of the consumers after the barrier.
  bool fences_producer = false;
  // Forward, two blocks with neighbouring tiles of rows bring each box of weights once for both.
  bool multicasts_weights = false;
  // The same in the backward pass, for the gradients of hidden and of rows.
  bool multicasts_backward = false;
};

// Block tiles m x n x k that the sm80 kernels are compiled for; kernels and this table are held
// together by a static_assert.
struct GroupedFfnTile {
  int m;
  int n;
  int k;
  int num_stages;
  int num_warps;
  int num_blocks;  // that registers allow on a multiprocessor
  constexpr int64_t shared_bytes() const { return int64_t{2} * num_stages * (m + n) * k; }
};
enum class GroupedFfnTileId { kLarge, kMedium, kSmall };
constexpr GroupedFfnTile kGroupedFfnTiles[] = {
    {128, 256, 32, 4, 8, 1},
    {128, 128, 32, 3, 4, 2},
    {64, 128, 32, 4, 4, 3},
};
constexpr const GroupedFfnTile& grouped_ffn_tile(GroupedFfnTileId id) {
  return kGroupedFfnTiles[static_cast<int>(id)];
}

struct GroupedFfnConfig {
  GroupedFfnFamily family;
  GroupedFfnTileId tiles[kNumGroupedFfnPhases];  // by phase, of the sm80 kernels
  GroupedFfnSm90aOptions sm90a;
  GroupedFfnTileId tile(GroupedFfnPhase phase) const { return tiles[static_cast<int>(phase)]; }
};

// Environment variable with the override of a process.
constexpr const char* kGroupedFfnOverrideVariable = "SPARSE_UNIFIED_GROUPED_FFN";

// Why `text` is no override; empty when it is one. An override names the tiles of some phases,
// "up=128x256x32x4,grad_rows=128x128x32x3" ("all=..." stands for every phase of the sm80 kernels),
// the kernels, "family=sm80" or "family=sm90a", and what those for Hopper choose between:
// "up=128x240x64x3", "down=128x128x64x6", "overlap=off", "fence=producer", "multicast=on" and
// "grad_multicast=on". "family=grouped_mm" changes nothing here: sparse_unified/ops/backend.py
// reads it, and runs experts on torch's products.
std::string grouped_ffn_override_error(const std::string& text);

// Rules, found by testing and timing on a device, that stand in for the choice of a process; they
// replace the rules before. One a line: compute capability, number of multiprocessors, hidden_size,
// num_experts, expert_width, block_size, num_rows, direction (1 forward, 2 backward) and an
// override, with blanks between. 0 stands for any; num_rows for half of it to less than twice.
// Lines that are none are ignored. Not safe while an op runs.
void set_grouped_ffn_rules(const std::string& text);

// The overrides of all rules for a problem on a device in their order, as one.
std::string grouped_ffn_rules_for(const GroupedFfnProblem& problem, const DeviceInfo& device);

// Overrides worth timing side by side: each family as it is, then with one tile or switch other
// than its own choice. Those that name a gradient are for the backward pass, the others for the
// forward pass, and a family alone for both.
std::vector<std::string> grouped_ffn_variants();

// The choice for a problem, with what a valid override says in place of it.
GroupedFfnConfig choose_grouped_ffn_config(const GroupedFfnProblem& problem,
                                           const DeviceInfo& device,
                                           const std::string& override_text = "");

// Why the kernels for Hopper do not take a problem on a device; empty when they do.
std::string grouped_ffn_sm90a_refusal(const GroupedFfnProblem& problem, const DeviceInfo& device,
                                      const GroupedFfnSm90aOptions& options);

// "sm80 up=128x256x32x4 down=... grad_hidden=... grad_rows=... grad_weights=...", or
// "sm90a up=128x240x64x4 down=128x256x64x4 overlap=on fence=consumer multicast=off
// grad_multicast=off".
std::string to_string(const GroupedFfnConfig& config);

}  // namespace sparse_unified
