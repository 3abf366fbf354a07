// SPDX-License-Identifier: Apache-2.0
// From an index along a GEMM dimension to a row or column of a matrix in memory. Where that takes a
// look-up, it is done in two steps, one k step apart, so that nobody waits for the load:
//   Pending look_up(int i)            issues the load, if there is one
//   int resolve(Pending pending, int i)
#pragma once

#include "device/platform.h"

namespace sparse_unified {

// i itself.
struct LinearIndex {
  struct Pending {};
  SPARSE_UNIFIED_DEVICE Pending look_up(int) const { return {}; }
  SPARSE_UNIFIED_DEVICE int resolve(Pending, int i) const { return i; }
};

// list[first + i], or first + i without a list.
struct GatheredIndex {
  const int32_t* list;
  int first;
  int limit;  // what list's entries are below
  using Pending = int;
  SPARSE_UNIFIED_DEVICE Pending look_up(int i) const {
    return list == nullptr ? first + i : list[first + i];
  }
  SPARSE_UNIFIED_DEVICE int resolve(Pending pending, int) const {
    device_check(0 <= pending && pending < limit);
    return pending;
  }
};

// Neuron i of a group, as row of gate_proj and up_proj or column of down_proj. The groups cut the
// sequence of all neurons, or of those in the kept blocks, into equal widths. Block sizes are
// multiples of 16, so that 8 neurons from a multiple of 8 on are neighbours in the weights too.
struct NeuronMap {
  const int32_t* kept_blocks;  // null: the weights' own order
  int block_size;              // 1 without a list
  int num_blocks;              // of the weights; 1 without a list
  int first;                   // place of the group's neuron 0 in the sequence

  struct Pending {
    int block;
    int within;
  };
  SPARSE_UNIFIED_DEVICE Pending look_up(int i) const {
    if (kept_blocks == nullptr) return {0, first + i};
    return {kept_blocks[(first + i) / block_size], (first + i) % block_size};
  }
  SPARSE_UNIFIED_DEVICE int resolve(Pending pending, int) const {
    device_check(0 <= pending.block && pending.block < num_blocks);
    return pending.block * block_size + pending.within;
  }
  SPARSE_UNIFIED_DEVICE int operator()(int i) const { return resolve(look_up(i), i); }
};

// The neurons of all groups, as a parameter of a kernel.
struct NeuronGroups {
  const int32_t* kept_blocks;  // as in NeuronMap
  int block_size;              //
  int num_blocks;              //
  int group_width;             // neurons of a group

  SPARSE_UNIFIED_HOST_DEVICE NeuronMap of(int group) const {
    return {kept_blocks, block_size, num_blocks, group * group_width};
  }
};

}  // namespace sparse_unified
