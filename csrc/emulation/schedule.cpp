// SPDX-License-Identifier: Apache-2.0
#include "emulation/schedule.h"

#include <array>
#include <cstdlib>
#include <string_view>

namespace sparse_unified::emulation {
namespace {

constexpr const char* kSeed = "SPARSE_UNIFIED_EMULATION_SEED";
constexpr const char* kOrder = "SPARSE_UNIFIED_EMULATION_ORDER";
constexpr const char* kCopies = "SPARSE_UNIFIED_EMULATION_COPIES";
constexpr std::array<const char*, 4> kOrderNames = {"forward", "reverse", "random", "priorities"};
constexpr std::array<const char*, 3> kCopiesNames = {"lazy", "eager", "random"};

[[noreturn]] void refuse(const char* variable, const char* rule, const char* value) {
  throw std::invalid_argument(std::string(variable) + ": must be " + rule + ", got " + value);
}

template <typename Enum, size_t kNum>
void read_name(const char* variable, const std::array<const char*, kNum>& names, const char* rule,
               Enum& value) {
  const char* text = std::getenv(variable);
  if (!text) return;
  for (size_t i = 0; i < kNum; ++i) {
    if (std::string_view(text) == names[i]) {
      value = static_cast<Enum>(i);
      return;
    }
  }
  refuse(variable, rule, text);
}

Schedule read_environment() {
  Schedule schedule;
  if (const char* text = std::getenv(kSeed)) {
    char* end;
    schedule.seed = std::strtoull(text, &end, 10);
    if (end == text || *end != '\0') refuse(kSeed, "a number", text);
  }
  read_name(kOrder, kOrderNames, "forward, reverse, random or priorities", schedule.order);
  read_name(kCopies, kCopiesNames, "lazy, eager or random", schedule.copies);
  return schedule;
}

Schedule& state() {
  static Schedule schedule = read_environment();
  return schedule;
}

}  // namespace

Schedule schedule() { return state(); }

void set_schedule(const Schedule& schedule) { state() = schedule; }

bool is_schedule_from_environment() {
  return std::getenv(kSeed) || std::getenv(kOrder) || std::getenv(kCopies);
}

std::string describe(const Schedule& schedule) {
  return std::string(kSeed) + "=" + std::to_string(schedule.seed) + " " + kOrder + "=" +
         kOrderNames[static_cast<size_t>(schedule.order)] + " " + kCopies + "=" +
         kCopiesNames[static_cast<size_t>(schedule.copies)];
}

}  // namespace sparse_unified::emulation
