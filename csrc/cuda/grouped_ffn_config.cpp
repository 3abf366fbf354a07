// SPDX-License-Identifier: Apache-2.0
// The choice of tiles for the GEMMs of grouped_ffn: arithmetic on shapes, no CUDA.
#include "sparse_unified/cuda/grouped_ffn_config.h"

#include <algorithm>
#include <functional>
#include <iterator>
#include <optional>
#include <sstream>
#include <string_view>
#include <type_traits>

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
// One thing an override can set: a name, the values it takes as people write them, and where the
// index of the value lies in a configuration.
struct Setting {
  const char* name;
  std::vector<std::string> values;
  GroupedFfnFamily family;  // whose kernels it is for
  bool is_tile;
  std::function<void(GroupedFfnConfig&, int)> set;
  std::function<int(const GroupedFfnConfig&)> get;
};

template <typename Field>
Setting make_setting(const char* name, std::vector<std::string> values, GroupedFfnFamily family,
                     bool is_tile, const Field& field) {
  return {name,
          std::move(values),
          family,
          is_tile,
          [=](GroupedFfnConfig& config, int idx) {
            auto& target = field(config);
            target = static_cast<std::remove_reference_t<decltype(target)>>(idx);
          },
          [=](const GroupedFfnConfig& config) { return static_cast<int>(field(config)); }};
}

template <typename Tile, size_t kCount>
std::vector<std::string> tile_names(const Tile (&tiles)[kCount]) {
  std::vector<std::string> names;
  for (const Tile& tile : tiles) names.push_back(tile_name(tile));
  return names;
}

// Those of a family in the order in which to_string lists them.
const std::vector<Setting>& settings() {
  static const std::vector<Setting> all = [] {
    constexpr auto kHopper = GroupedFfnFamily::kSm90a;
    std::vector<Setting> list{
        make_setting("up", tile_names(kGroupedFfnSm90aUpTiles), kHopper, true,
                     [](auto& config) -> auto& { return config.sm90a.up; }),
        make_setting("down", tile_names(kGroupedFfnSm90aDownTiles), kHopper, true,
                     [](auto& config) -> auto& { return config.sm90a.down; }),
        make_setting("overlap", {"off", "on"}, kHopper, false,
                     [](auto& config) -> auto& { return config.sm90a.overlaps_kernels; }),
        make_setting("fence", {"consumer", "producer"}, kHopper, false,
                     [](auto& config) -> auto& { return config.sm90a.fences_producer; }),
        make_setting("multicast", {"off", "on"}, kHopper, false,
                     [](auto& config) -> auto& { return config.sm90a.multicasts_weights; }),
        make_setting("grad_multicast", {"off", "on"}, kHopper, false,
                     [](auto& config) -> auto& { return config.sm90a.multicasts_backward; })};
    for (int i = 0; i < kNumGroupedFfnPhases; ++i) {
      list.push_back(make_setting(kPhaseNames[i], tile_names(kGroupedFfnTiles),
                                  GroupedFfnFamily::kSm80, true,
                                  [i](auto& config) -> auto& { return config.tiles[i]; }));
    }
    return list;
  }();
  return all;
}

const char* family_name(GroupedFfnFamily family) {
  return family == GroupedFfnFamily::kSm90a ? "sm90a" : "sm80";
}

// Sets what one "NAME=VALUE" says; false when it says nothing.
bool apply_entry(std::string_view entry, GroupedFfnConfig& config) {
  bool is_known = entry == "family=grouped_mm";
  for (const auto family : {GroupedFfnFamily::kSm80, GroupedFfnFamily::kSm90a}) {
    if (entry != std::string("family=") + family_name(family)) continue;
    config.family = family;
    is_known = true;
  }
  for (const Setting& setting : settings()) {
    const bool is_portable = setting.family == GroupedFfnFamily::kSm80;
    for (size_t idx = 0; idx < setting.values.size(); ++idx) {
      const std::string value = "=" + setting.values[idx];
      if (entry != setting.name + value && !(is_portable && entry == "all" + value)) continue;
      setting.set(config, static_cast<int>(idx));
      is_known = true;
    }
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

struct Rule {
  int64_t wanted[8];  // as set_grouped_ffn_rules lists them
  std::string override_text;
};

std::vector<Rule>& rules() {
  static std::vector<Rule> all;
  return all;
}

bool applies(const Rule& rule, const GroupedFfnProblem& problem, const DeviceInfo& device) {
  const int64_t rows = rule.wanted[6];
  const bool is_near = 2 * problem.num_rows >= rows && problem.num_rows < 2 * rows;
  const int64_t found[] = {device.compute_capability,
                           device.num_multiprocessors,
                           problem.hidden_size,
                           problem.num_experts,
                           problem.expert_width,
                           problem.block_size,
                           is_near ? rows : problem.num_rows,
                           problem.is_backward ? 2 : 1};
  return std::equal(std::begin(found), std::end(found), rule.wanted,
                    [](int64_t own, int64_t wanted) { return wanted == 0 || own == wanted; });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct GemmExtent {
  int64_t num_m;  // of one group
  int64_t num_n;
  int64_t num_k;
};

GemmExtent extent(GroupedFfnPhase phase, const GroupedFfnProblem& problem) {
  const int64_t num_groups = std::max<int64_t>(problem.num_experts, 1);
  const int64_t rows = ceil_div(problem.num_rows, num_groups);
  switch (phase) {
    case GroupedFfnPhase::kUp:
      return {rows, 2 * problem.expert_width, problem.hidden_size};
    case GroupedFfnPhase::kDown:
      return {rows, problem.hidden_size, problem.expert_width};
    case GroupedFfnPhase::kGradRows:
      return {rows, problem.hidden_size, 2 * problem.expert_width};
    case GroupedFfnPhase::kGradHidden:
      return {rows, problem.expert_width, problem.hidden_size};
    case GroupedFfnPhase::kGradWeights:
      return {2 * problem.expert_width, problem.hidden_size, rows};
  }
  return {0, 0, 0};
}

GroupedFfnTileId choose_tile(GroupedFfnPhase phase, const GroupedFfnProblem& problem,
                             const DeviceInfo& device) {
  const GemmExtent gemm = extent(phase, problem);
  // Half of a higher tile would be empty; what counts then is how many weights are under way.
  const GroupedFfnTile& small = grouped_ffn_tile(GroupedFfnTileId::kSmall);
  if (gemm.num_m <= small.m) return GroupedFfnTileId::kSmall;

  // The large tile pays where shared memory limits the tensor cores (grouped_ffn_sm80.h): on the
  // parts with the wide ones, which are those with 164 KB and more of shared memory. One block
  // fills a multiprocessor, so that several rounds of blocks are needed to even out the last, and
  // nothing hides its start and its epilogue, about 4000 clocks by count: 20 % of the 19 steps of
  // 1024 clocks that h = 592 takes on A100. Two medium blocks hide each other's.
  constexpr int64_t kWideSharedBytes = 160 * 1024;
  constexpr int64_t kMinRounds = 2;
  constexpr int64_t kMinK = 1024;
  const GroupedFfnTile& large = grouped_ffn_tile(GroupedFfnTileId::kLarge);
  const int64_t num_tiles =
      problem.num_experts * ceil_div(gemm.num_m, large.m) * ceil_div(gemm.num_n, large.n);
  if (gemm.num_k >= kMinK && device.shared_bytes_processor >= kWideSharedBytes &&
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
  // NOTE: boxes of 64 rows of down_proj must not reach into the next expert's.
  if (problem.down_rows != 0 && problem.hidden_size % 64 != 0) {
    return "hidden_size must be a multiple of 64 for family=sm90a and weights with a dimension of "
           "experts, got " +
           std::to_string(problem.hidden_size);
  }
  return "";
}

std::string grouped_ffn_override_error(const std::string& text) {
  GroupedFfnConfig config{};
  const auto wrong = apply_override(text, config);
  if (!wrong) return "";
  std::string message = std::string(kGroupedFfnOverrideVariable) +
                        " must be NAME=VALUE with commas between: family=sm80|sm90a|grouped_mm";
  for (const Setting& setting : settings()) {
    const char* separator = "=";
    message += std::string(", ") + setting.name;
    for (const std::string& value : setting.values) {
      message += separator + value;
      separator = "|";
    }
  }
  return message + ", or all=TILE for every phase of sm80; got \"" + *wrong + "\"";
}

void set_grouped_ffn_rules(const std::string& text) {
  rules().clear();
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    Rule rule{};
    for (int64_t& size : rule.wanted) fields >> size;
    if (fields >> rule.override_text && grouped_ffn_override_error(rule.override_text).empty()) {
      rules().push_back(rule);
    }
  }
}

std::string grouped_ffn_rules_for(const GroupedFfnProblem& problem, const DeviceInfo& device) {
  std::string text;
  for (const Rule& rule : rules()) {
    if (applies(rule, problem, device)) text += (text.empty() ? "" : ",") + rule.override_text;
  }
  return text;
}

std::vector<std::string> grouped_ffn_variants() {
  std::vector<std::string> variants;
  const GroupedFfnConfig chosen{};
  for (const auto family : {GroupedFfnFamily::kSm80, GroupedFfnFamily::kSm90a}) {
    const std::string kernels = std::string("family=") + family_name(family);
    variants.push_back(kernels);
    for (const Setting& setting : settings()) {
      if (setting.family != family) continue;
      for (size_t idx = 0; idx < setting.values.size(); ++idx) {
        if (!setting.is_tile && static_cast<int>(idx) == setting.get(chosen)) continue;
        variants.push_back(kernels + "," + setting.name + "=" + setting.values[idx]);
      }
    }
  }
  return variants;
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
  std::string text = family_name(config.family);
  for (const Setting& setting : settings()) {
    if (setting.family != config.family) continue;
    text += std::string(" ") + setting.name + "=" +
            setting.values[static_cast<size_t>(setting.get(config))];
  }
  return text;
}

}  // namespace sparse_unified
