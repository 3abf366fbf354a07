// SPDX-License-Identifier: Apache-2.0
// TMA: boxes of a matrix, with zeros for what lies outside, in the 128- or 64-byte swizzle or
// without.
#include "device/tensor_copy.h"

#include <algorithm>

#include "device/vector.h"
#include "device/wgmma.h"
#include "emulation/async_proxy.h"
#include "emulation/race.h"

namespace sparse_unified {
namespace emulation {
namespace {

constexpr int kElementBytes = 2;
constexpr int kMaxBoxSize = 256;
constexpr int kVector = 16;
constexpr int kBoxAlignment = 128;

int row_bytes_of(const TensorMap& map) { return map.box_columns * kElementBytes; }

struct PendingStore {
  TensorMap map;
  int row;
  int column;
  uint32_t shared;
  int group;
  bool has_landed;
  const void* code;
};

std::vector<std::vector<PendingStore>> stores;  // by thread, in the order of issue
std::vector<int> store_groups;                  // that the next store belongs to

// Calls visit(row, first column, bytes, offset in shared memory) for the 16-byte pieces of a box.
template <typename Visit>
void for_each_piece(const TensorMap& map, const Visit& visit) {
  const int row_bytes = row_bytes_of(map);
  for (int row = 0; row < map.box_rows; ++row) {
    for (int at = 0; at < row_bytes; at += kVector) {
      int offset = row * row_bytes + at;
      // PTX manual, "Swizzling Modes": bits 4 to 6, or 5, are XORed with those from 7 on.
      if (map.is_swizzled) offset ^= (offset >> 7 & (row_bytes / kVector - 1)) << 4;
      visit(row, at / kElementBytes, offset);
    }
  }
}

int box_bytes(const TensorMap& map) { return map.box_rows * row_bytes_of(map); }

void check_box(const char* name, const TensorMap& map, uint32_t shared) {
  check_aligned(name, &map, 64);
  if (map.base == nullptr) fail("%s: the tensor map was not made", name);
  shared_pointer(name, shared, box_bytes(map),
                 map.is_swizzled ? 8 * row_bytes_of(map) : kBoxAlignment);
}

// Elements of the piece that lie in the matrix.
int count_inside(const TensorMap& map, int64_t row, int64_t column) {
  if (row < 0 || row >= map.num_rows || column < 0) return 0;
  return static_cast<int>(
      std::clamp<int64_t>(map.num_columns - column, 0, kVector / kElementBytes));
}

void access_target(const Transfer& transfer, int offset) {
  const uint32_t address = transfer.shared + static_cast<uint32_t>(offset);
  race::access(transfer.thread_idx,
               shared_pointer("load_box", transfer.rank, address, kVector, kVector), kVector,
               race::Kind::kWrite, transfer.code);
}

void land_store(int thread_idx, PendingStore& store) {
  if (store.has_landed) return;
  store.has_landed = true;
  const TensorMap& map = store.map;
  for_each_piece(map, [&](int row, int column, int offset) {
    const int64_t to_row = store.row + row;
    const int64_t to_column = store.column + column;
    const int bytes = count_inside(map, to_row, to_column) * kElementBytes;
    const uint32_t address = store.shared + static_cast<uint32_t>(offset);
    const void* piece = async_pointer("store_box", current->rank, address, kVector, 1);
    race::access(thread_idx, shared_pointer("store_box", address, kVector, 1), kVector,
                 race::Kind::kRead, store.code);
    if (bytes == 0) return;
    auto* target = const_cast<unsigned char*>(static_cast<const unsigned char*>(map.base)) +
                   (to_row * map.row_stride + to_column) * kElementBytes;
    check_global("store_box", target, bytes);
    race::access(thread_idx, target, bytes, race::Kind::kWrite, store.code);
    std::memcpy(target, piece, static_cast<size_t>(bytes));
  });
}

void start_load(int rank, uint32_t shared, const TensorMap& map, int row, int column,
                uint32_t barrier, const void* code) {
  Transfer transfer{};
  transfer.rank = rank;
  transfer.barrier = barrier;
  transfer.thread_idx = current->idx;
  transfer.map = map;
  transfer.shared = shared;
  transfer.row = row;
  transfer.column = column;
  transfer.code = code;
  // The box may come at once: from now on nobody else may touch the target.
  for_each_piece(map, [&](int, int, int offset) { access_target(transfer, offset); });
  start_transfer(std::move(transfer));
}

}  // namespace

int load_box_now(const Transfer& transfer) {
  check_has_not_exited("load_box", transfer.rank);
  const TensorMap& map = transfer.map;
  for_each_piece(map, [&](int row, int column, int offset) {
    unsigned char bytes[kVector] = {};
    const int64_t from_row = transfer.row + row;
    const int64_t from_column = transfer.column + column;
    const int num_bytes = count_inside(map, from_row, from_column) * kElementBytes;
    if (num_bytes > 0) {
      const auto* source = static_cast<const unsigned char*>(map.base) +
                           (from_row * map.row_stride + from_column) * kElementBytes;
      check_global("load_box", source, num_bytes);
      race::access(transfer.thread_idx, source, num_bytes, race::Kind::kRead, transfer.code);
      std::memcpy(bytes, source, static_cast<size_t>(num_bytes));
    }
    const uint32_t address = transfer.shared + static_cast<uint32_t>(offset);
    access_target(transfer, offset);
    write_both("load_box", transfer.rank, address, bytes, kVector);
  });
  return box_bytes(map);
}

void wait_for_stores(int num_pending) {
  const InEmulator in_emulator;
  const auto thread = static_cast<size_t>(current->idx);
  const int end_group = store_groups[thread] - num_pending;
  std::erase_if(stores[thread], [&](PendingStore& store) {
    if (store.group >= end_group) return false;
    land_store(current->idx, store);
    return true;
  });
  maybe_yield();
}

void begin_box_stores() {
  stores.assign(static_cast<size_t>(cluster.num_threads()), {});
  store_groups.assign(static_cast<size_t>(cluster.num_threads()), 0);
}

std::string find_unfinished_stores() {
  for (size_t thread = 0; thread < stores.size(); ++thread) {
    if (!stores[thread].empty()) {
      return "store_box: thread " + std::to_string(thread) + " did not wait for its stores";
    }
  }
  return "";
}

}  // namespace emulation

cudaError_t make_tensor_map(TensorMap* map, DType dtype, const void* base, int64_t num_rows,
                            int64_t num_columns, int64_t row_stride, int box_rows, int box_columns,
                            bool is_swizzled) {
  using namespace emulation;
  const int row_bytes = box_columns * kElementBytes;
  const bool is_legal =
      element_bytes(dtype) == kElementBytes && base != nullptr &&
      reinterpret_cast<uintptr_t>(base) % kVector == 0 && num_rows > 0 && num_columns > 0 &&
      num_rows < INT64_C(1) << 32 && num_columns < INT64_C(1) << 32 && row_stride >= num_columns &&
      row_stride * kElementBytes % kVector == 0 && box_rows > 0 && box_rows <= kMaxBoxSize &&
      box_columns > 0 && box_columns <= kMaxBoxSize && row_bytes % kVector == 0 &&
      (!is_swizzled || row_bytes == kSwizzleRowBytes || row_bytes == kNarrowRowBytes);
  if (!is_legal) return cudaErrorInvalidValue;
  *map = {};
  map->base = base;
  map->num_rows = num_rows;
  map->num_columns = num_columns;
  map->row_stride = row_stride;
  map->box_rows = box_rows;
  map->box_columns = box_columns;
  map->is_swizzled = is_swizzled;
  return cudaSuccess;
}

void prefetch_tensor_map(const TensorMap* map) {
  const emulation::InEmulator in_emulator;
  emulation::check_aligned("prefetch_tensor_map", map, 64);
}

void load_box(uint32_t shared, const TensorMap* map, int row, int column, uint32_t barrier) {
  using namespace emulation;
  const InEmulator in_emulator;
  check_box("load_box", *map, shared);
  start_load(current->rank, shared, *map, row, column, barrier, __builtin_return_address(0));
  maybe_yield();
}

// Each block gets the box at a time of its own.
void load_box_to_blocks(uint32_t shared, const TensorMap* map, int row, int column,
                        uint32_t barrier, uint16_t blocks) {
  using namespace emulation;
  const InEmulator in_emulator;
  const char* name = "load_box_to_blocks";
  check_box(name, *map, shared);
  if (blocks == 0 || blocks >> cluster.num_blocks != 0) {
    fail("%s: blocks 0x%x of a cluster of %d", name, blocks, cluster.num_blocks);
  }
  for (int rank = 0; rank < cluster.num_blocks; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    check_has_not_exited(name, rank);
    start_load(rank, shared, *map, row, column, barrier, __builtin_return_address(0));
  }
  maybe_yield();
}

void store_box(const TensorMap* map, int row, int column, uint32_t shared) {
  using namespace emulation;
  const InEmulator in_emulator;
  check_box("store_box", *map, shared);
  const auto thread = static_cast<size_t>(current->idx);
  stores[thread].push_back(
      {*map, row, column, shared, store_groups[thread], false, __builtin_return_address(0)});
  if (cluster.schedule.copies == Copies::kEager ||
      (cluster.schedule.copies == Copies::kRandom && one_in(2))) {
    land_store(current->idx, stores[thread].back());
  }
}

void store_commit() {
  const emulation::InEmulator in_emulator;
  ++emulation::store_groups[static_cast<size_t>(emulation::current->idx)];
}

}  // namespace sparse_unified
