// SPDX-License-Identifier: Apache-2.0
// Shuffles and votes.
#include <algorithm>

#include "emulation/block.h"

namespace sparse_unified::emulation {

uint32_t exchange(const char* name, uint32_t value, int source_lane) {
  const InEmulator in_emulator;
  struct Lane {
    uint32_t value;
    int source_lane;
  } lane{value, source_lane};
  if (source_lane < 0 || source_lane >= kLanes) fail("%s from lane %d", name, source_lane);
  warp_collective<Lane>(name, lane, [](Lane* lanes) {
    uint32_t values[kLanes];
    for (int l = 0; l < kLanes; ++l) values[l] = lanes[l].value;
    for (int l = 0; l < kLanes; ++l) lanes[l].value = values[lanes[l].source_lane];
  });
  return lane.value;
}

uint32_t vote(bool predicate) {
  const InEmulator in_emulator;
  uint32_t word = predicate;
  warp_collective<uint32_t>("ballot", word, [](uint32_t* words) {
    uint32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits |= words[l] << l;
    std::fill_n(words, kLanes, bits);
  });
  return word;
}

}  // namespace sparse_unified::emulation
