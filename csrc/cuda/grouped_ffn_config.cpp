// SPDX-License-Identifier: Apache-2.0
// The choice of tiles for the GEMMs of grouped_ffn: arithmetic on shapes, no CUDA.
#include "sparse_unified/cuda/grouped_ffn_config.h"

#include <algorithm>
#include <optional>
#include <string_view>

namespace sparse_unified {
namespace {

constexpr const char* kPhaseNames[kNumGroupedFfnPhases] = {"up", "down", "grad_hidden", "grad_rows",
                                                           "grad_weights"};

std::string tile_name(const GroupedFfnTile& tile) {
  return std::to_string(tile.m) + "x" + std::to_string(tile.n) + "x" + std::to_string(tile.k) +
         "x" + std::to_string(tile.num_stages);
}

std::string tile_name(const GroupedFfnSm90aTile& tile) {
  return std::to_string(kSm90aTileRows) + "x" + std::to_string(tile.n) + "x" +
         std::to_string(kSm90aTileK) + "x" + std::to_string(tile.num_stages);
}

std::string tile_name(GroupedFfnSm90aUpTile id) {
  return tile_name(kGroupedFfnSm90aUpTiles[static_cast<int>(id)]);
}
std::string tile_name(GroupedFfnSm90aDownTile id) {
  return tile_name(kGroupedFfnSm90aDownTiles[static_cast<int>(id)]);
}

// The tile of that name in a table whose indices are the values of Id.
template <typename Id, typename Tile, size_t kCount>
std::optional<Id> find_tile(const Tile (&tiles)[kCount], std::string_view name) {
  for (size_t idx = 0; idx < kCount; ++idx) {
    if (name == tile_name(tiles[idx])) return static_cast<Id>(idx);
  }
  return std::nullopt;
}

// "A, B, C"
template <typename Tile, size_t kCount>
std::string tile_names(const Tile (&tiles)[kCount]) {
  std::string names;
  for (const Tile& tile : tiles) names += (names.empty() ? "" : ", ") + tile_name(tile);
  return names;
}

// A choice of two values by name; false when the value is neither.
bool apply_switch(std::string_view value, std::string_view off, std::string_view on, bool& is_on) {
  if (value != off && value != on) return false;
  is_on = value == on;
  return true;
}

// Sets what one "NAME=VALUE" says; false when it says nothing.
bool apply_entry(std::string_view entry, GroupedFfnConfig& config) {
  const size_t equals = entry.find('=');
  if (equals == std::string_view::npos) return false;
  const std::string_view name = entry.substr(0, equals);
  const std::string_view value = entry.substr(equals + 1);
  if (name == "overlap") return apply_switch(value, "off", "on", config.sm90a.overlaps_kernels);
  if (name == "fence") {
    return apply_switch(value, "consumer", "producer", config.sm90a.fences_producer);
  }
  if (name == "multicast") {
    return apply_switch(value, "off", "on", config.sm90a.multicasts_weights);
  }
  if (name == "family") {
    bool is_sm90a = false;
    if (!apply_switch(value, "sm80", "sm90a", is_sm90a)) return false;
    config.family = is_sm90a ? GroupedFfnFamily::kSm90a : GroupedFfnFamily::kSm80;
    return true;
  }
  if (const auto up = find_tile<GroupedFfnSm90aUpTile>(kGroupedFfnSm90aUpTiles, value);
      up && name == "up") {
    config.sm90a.up = *up;
    return true;
  }
  if (const auto down = find_tile<GroupedFfnSm90aDownTile>(kGroupedFfnSm90aDownTiles, value);
      down && name == "down") {
    config.sm90a.down = *down;
    return true;
  }
  const auto tile = find_tile<GroupedFfnTileId>(kGroupedFfnTiles, value);
  if (!tile) return false;
  bool is_known = false;
  for (int i = 0; i < kNumGroupedFfnPhases; ++i) {
    if (name != "all" && name != kPhaseNames[i]) continue;
    config.tiles[i] = *tile;
    is_known = true;
  }
  return is_known;
}

// Applies an override; returns its first wrong entry.
std::optional<std::string> apply_override(std::string_view text, GroupedFfnConfig& config) {
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find(','));
    if (!apply_entry(entry, config)) return std::string(entry);
    text.remove_prefix(entry.size());
    if (text == ",") return std::string();  // an empty entry at the end
    if (!text.empty()) text.remove_prefix(1);
  }
  return std::nullopt;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct GemmExtent {
  int64_t num_m;  // of one group
  int64_t num_n;
};

GemmExtent extent(GroupedFfnPhase phase, const GroupedFfnProblem& problem) {
  const int64_t num_groups = std::max<int64_t>(problem.num_experts, 1);
  const int64_t rows = ceil_div(problem.num_rows, num_groups);
  switch (phase) {
    case GroupedFfnPhase::kUp:
      return {rows, 2 * problem.expert_width};
    case GroupedFfnPhase::kDown:
    case GroupedFfnPhase::kGradRows:
      return {rows, problem.hidden_size};
    case GroupedFfnPhase::kGradHidden:
      return {rows, problem.expert_width};
    case GroupedFfnPhase::kGradWeights:
      return {2 * problem.expert_width, problem.hidden_size};
  }
  return {0, 0};
}

GroupedFfnTileId choose_tile(GroupedFfnPhase phase, const GroupedFfnProblem& problem,
                             const DeviceInfo& device) {
  const GemmExtent gemm = extent(phase, problem);
  // Half of a higher tile would be empty; what counts then is how many weights are under way.
  const GroupedFfnTile& small = grouped_ffn_tile(GroupedFfnTileId::kSmall);
  if (gemm.num_m <= small.m) return GroupedFfnTileId::kSmall;

  // The large tile pays where shared memory limits the tensor cores (grouped_ffn_sm80.cuh): on the
  // parts with the wide ones, which are those with 164 KB and more of shared memory. One block
  // fills a multiprocessor, so that several rounds of blocks are needed to even out the last.
  constexpr int64_t kWideSharedBytes = 160 * 1024;
  constexpr int64_t kMinRounds = 2;
  const GroupedFfnTile& large = grouped_ffn_tile(GroupedFfnTileId::kLarge);
  const int64_t num_tiles =
      problem.num_experts * ceil_div(gemm.num_m, large.m) * ceil_div(gemm.num_n, large.n);
  if (device.shared_bytes_processor >= kWideSharedBytes &&
      device.shared_bytes_block >= large.shared_bytes() &&
      num_tiles >= kMinRounds * device.num_multiprocessors) {
    return GroupedFfnTileId::kLarge;
  }
  return GroupedFfnTileId::kMedium;
}

// Boxes of 120 neurons do not begin and end with blocks, those of 128 do.
GroupedFfnSm90aOptions choose_sm90a_options(const GroupedFfnProblem& problem) {
  GroupedFfnSm90aOptions options;
  if (problem.block_size > 0) options.up = GroupedFfnSm90aUpTile::k256x4;
  return options;
}

// A tile of Hopper's kernels has 128 rows, and loads of weights that the small tile of the others
// meets with three times as many blocks on a multiprocessor.
bool prefers_sm90a(const GroupedFfnProblem& problem, const DeviceInfo& device,
                   const GroupedFfnSm90aOptions& options) {
  const GemmExtent gemm = extent(GroupedFfnPhase::kUp, problem);
  return gemm.num_m > grouped_ffn_tile(GroupedFfnTileId::kSmall).m &&
         grouped_ffn_sm90a_refusal(problem, device, options).empty();
}

// What lists of blocks ask for in addition: a step of 64 k of the down-projection is one box, so
// it must lie within a block.
std::string sm90a_blocks_refusal(const GroupedFfnProblem& problem,
                                 const GroupedFfnSm90aOptions& options) {
  if (problem.is_backward) {
    return "family must be sm80 for the gradients of a list of blocks, got sm90a";
  }
  if (problem.block_size % kSm90aTileK != 0) {
    return "block_size must be a multiple of 64 for family=sm90a, got " +
           std::to_string(problem.block_size);
  }
  if (problem.expert_width % kSm90aTileK != 0) {
    return "expert_width must be a multiple of 64 for family=sm90a and a list of blocks, got " +
           std::to_string(problem.expert_width);
  }
  if (options.up != GroupedFfnSm90aUpTile::k256x4) {
    return "up must be " + tile_name(GroupedFfnSm90aUpTile::k256x4) +
           " for family=sm90a and a list of blocks, got " + tile_name(options.up);
  }
  return "";
}

}  // namespace

std::string grouped_ffn_sm90a_refusal(const GroupedFfnProblem& problem, const DeviceInfo& device,
                                      const GroupedFfnSm90aOptions& options) {
  constexpr int64_t kStepK = 16;  // of wgmma
  if (device.compute_capability != 90) {
    return "the device must have compute capability 90 for family=sm90a, got " +
           std::to_string(device.compute_capability);
  }
  if (!problem.has_sm90a_code) {
    return "the library must be built for 9.0a for family=sm90a, got a build without it";
  }
  if (options.multicasts_weights && options.fences_producer) {
    return "fence must be consumer for multicast=on, got producer";
  }
  if (problem.block_size > 0) return sm90a_blocks_refusal(problem, options);
  if (problem.expert_width % kStepK != 0) {
    return "expert_width must be a multiple of 16 for family=sm90a, got " +
           std::to_string(problem.expert_width);
  }
  return "";
}

std::string grouped_ffn_override_error(const std::string& text) {
  GroupedFfnConfig config{};
  const auto wrong = apply_override(text, config);
  if (!wrong) return "";
  std::string message = std::string(kGroupedFfnOverrideVariable) +
                        " must be NAME=VALUE with commas between: family=sm80 or sm90a, "
                        "overlap=on or off, fence=consumer or producer, multicast=on or off, or "
                        "PHASE=TILE, PHASE one of all";
  for (const char* name : kPhaseNames) message += std::string(", ") + name;
  return message + ", TILE one of " + tile_names(kGroupedFfnTiles) + "; of sm90a up one of " +
         tile_names(kGroupedFfnSm90aUpTiles) + ", down one of " +
         tile_names(kGroupedFfnSm90aDownTiles) + "; got \"" + *wrong + "\"";
}

GroupedFfnConfig choose_grouped_ffn_config(const GroupedFfnProblem& problem,
                                           const DeviceInfo& device,
                                           const std::string& override_text) {
  GroupedFfnConfig config{};
  config.sm90a = choose_sm90a_options(problem);
  config.family = prefers_sm90a(problem, device, config.sm90a) ? GroupedFfnFamily::kSm90a
                                                               : GroupedFfnFamily::kSm80;
  for (int i = 0; i < kNumGroupedFfnPhases; ++i) {
    config.tiles[i] = choose_tile(static_cast<GroupedFfnPhase>(i), problem, device);
  }
  apply_override(override_text, config);
  return config;
}

std::string to_string(const GroupedFfnConfig& config) {
  if (config.family == GroupedFfnFamily::kSm90a) {
    return "sm90a up=" + tile_name(config.sm90a.up) + " down=" + tile_name(config.sm90a.down) +
           " overlap=" + (config.sm90a.overlaps_kernels ? "on" : "off") +
           " fence=" + (config.sm90a.fences_producer ? "producer" : "consumer") +
           " multicast=" + (config.sm90a.multicasts_weights ? "on" : "off");
  }
  std::string text = "sm80";
  for (int i = 0; i < kNumGroupedFfnPhases; ++i) {
    text += std::string(" ") + kPhaseNames[i] + "=" + tile_name(grouped_ffn_tile(config.tiles[i]));
  }
  return text;
}

}  // namespace sparse_unified
