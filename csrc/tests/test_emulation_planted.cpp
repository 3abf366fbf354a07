// SPDX-License-Identifier: Apache-2.0
// The emulator reports every planted bug, with the words that name it, and nothing about the same
// kernels without their bugs.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "check.h"
#include "planted/planted.h"

namespace sparse_unified::test {
namespace {

// Builds that must catch a bug.
enum Variants : unsigned { kPlain = 1, kSanitized = 2, kRace = 4, kEvery = 7 };
#if defined(__SANITIZE_ADDRESS__)
constexpr Variants kThis = kSanitized;
#else
constexpr Variants kThis = emulation::kDetectsRaces ? kRace : kPlain;
#endif

struct Bug {
  const char* name;
  planted::Run* run;
  unsigned caught_by;
  const char* report;      // in the builds that only see its effect
  const char* found_race;  // in builds with race detection, where that is something else
};

#define BUG(name, ...) {#name, planted::name, __VA_ARGS__}
constexpr const char* kWrong = "out at";
constexpr Bug kBugs[] = {
    BUG(missing_barrier, kEvery, kWrong, "race on"),
    BUG(missing_warp_sync, kRace, nullptr, "race on"),
    BUG(stage_still_read, kEvery, kWrong, "race on"),
    BUG(missing_arrival, kEvery, "63 of 64 threads have come", nullptr),
    BUG(different_collectives, kEvery, "divergent collective", nullptr),
    BUG(exited_lanes, kEvery, "lanes 20-31: has exited", nullptr),
    BUG(read_before_wait, kEvery, kWrong, nullptr),
    BUG(wait_off_by_one, kEvery, kWrong, "race on"),
    BUG(read_without_barrier, kEvery, kWrong, "race on"),
    BUG(shared_past_end, kEvery, "byte 512 of 512 of shared memory", nullptr),
    BUG(shared_far_outside, kEvery, "of 512 of shared memory", nullptr),
    BUG(global_write_past_end, kEvery, "out: a write to byte 124 of 124", nullptr),
    BUG(global_read_past_end, kEvery, kWrong, nullptr),
    BUG(copy_past_end, kSanitized, nullptr, nullptr),
    BUG(unwritten_output, kEvery, "unwritten at 32", nullptr),
    BUG(null_pointer, kEvery, "invalid or misaligned access", nullptr),
    BUG(misaligned_copy, kEvery, "copy_async_16: byte 8 of shared memory is not", nullptr),
    BUG(misaligned_vector, kEvery, "load_vector: misaligned address", nullptr),
    BUG(misaligned_matrix_row, kEvery, "load_matrix_x4: byte 52 of shared memory is not", nullptr),
    BUG(failed_check, kEvery, "device_check failed", nullptr),
    BUG(uninitialised_register, kSanitized | kRace, kWrong, nullptr),
    BUG(first_warp_first, kEvery, kWrong, "race on"),
    BUG(lanes_in_order, kEvery, kWrong, "race on"),
    BUG(blocks_in_order, kEvery, kWrong, "of another block"),
    BUG(constant_written, kRace, nullptr, "a constant read"),
    BUG(phase_never_flips, kEvery, "more than 1 arrivals in a phase", "race on"),
    BUG(phase_flips_early, kEvery, "more than 1 arrivals in a phase", "race on"),
    BUG(too_many_bytes, kEvery, "0 arrivals and 2064 bytes missing", nullptr),
    BUG(too_few_bytes, kEvery, "transfers to shared memory under way", nullptr),
    BUG(more_bytes_at_end, kEvery, "16 bytes missing at the end", nullptr),
    BUG(full_not_waited_for, kEvery, "more than 1 arrivals in a phase", "race on"),
    BUG(empty_not_waited_for, kEvery, "more than 1 arrivals in a phase", nullptr),
    BUG(released_before_read, kEvery, kWrong, "race on"),
    BUG(box_read_unswizzled, kEvery, kWrong, nullptr),
    BUG(lanes_fall_behind, kEvery, "deadlock", "could fall two phases behind"),
    BUG(barrier_not_initialised, kEvery, "no barrier was initialised there", nullptr),
    BUG(barrier_used_at_once, kEvery, "no barrier was initialised there", "race on"),
    BUG(barrier_not_fenced, kEvery, "no fence after barrier_init", nullptr),
    BUG(barrier_written_over, kEvery, "the barrier was written over", nullptr),
    BUG(barrier_twice, kEvery, "there is a barrier already", nullptr),
    BUG(one_arrival_too_many, kEvery, "1 arrivals and 0 bytes missing", nullptr),
    BUG(store_without_fence, kEvery, kWrong, nullptr),
    BUG(store_without_sync, kEvery, kWrong, "race on"),
    BUG(store_not_waited_for, kEvery, "thread 0 did not wait for its stores", nullptr),
    BUG(store_not_committed, kEvery, "thread 0 did not wait for its stores", nullptr),
    BUG(staging_overwritten, kEvery, kWrong, nullptr),
    BUG(named_barrier_too_wide, kEvery, "64 of 128 threads have come", nullptr),
    BUG(named_barrier_too_narrow, kEvery, kWrong, "race on"),
    BUG(named_barrier_disagreement, kEvery, "96 threads expected, and 64 by a thread", nullptr),
    BUG(rows_unswizzled, kEvery, kWrong, nullptr),
    BUG(box_unswizzled, kEvery, kWrong, nullptr),
    BUG(descriptor_of_other_major, kEvery, kWrong, nullptr),
    BUG(descriptor_of_other_swizzle, kEvery, kWrong, nullptr),
    BUG(descriptor_unswizzled, kEvery, "the swizzle of a descriptor must be 1", nullptr),
    BUG(products_without_proxy_fence, kEvery, kWrong, nullptr),
    BUG(proxy_fence_before_wait, kEvery, kWrong, nullptr),
    BUG(arrival_before_copies, kEvery, kWrong, "race on"),
    BUG(accumulators_read_early, kEvery, kWrong, nullptr),
    BUG(wait_leaves_a_group, kEvery, "products that nobody waited for", nullptr),
    BUG(products_not_committed, kEvery, "products that nobody waited for", nullptr),
    BUG(missing_wgmma_fence, kEvery, "wgmma_fence must come before it", nullptr),
    BUG(stage_released_early, kEvery, kWrong, "race on"),
    BUG(stage_refilled_early, kEvery, kWrong, "race on"),
    BUG(warps_differ, kEvery, "warps of a warpgroup issue different products", nullptr),
    BUG(warp_left_out, kEvery, "not all warps of a warpgroup issued",
        "could fall two phases behind"),
    BUG(narrow_product, kEvery, kWrong, nullptr),
    BUG(released_by_own_block, kEvery, kWrong, "race on"),
    BUG(released_to_wrong_block, kEvery, kWrong, "race on"),
    BUG(box_to_one_block, kEvery, "0 arrivals and 1024 bytes missing", nullptr),
    BUG(bytes_of_other_block, kEvery, "transfers to shared memory under way", "race on"),
    BUG(block_leaves_early, kEvery, "of the cluster has ended", nullptr),
    BUG(cluster_used_at_once, kEvery, "no barrier was initialised there", "race on"),
    BUG(cluster_not_fenced, kEvery, "no fence after barrier_init", nullptr),
    BUG(block_sits_out, kEvery, "0 arrivals and 2048 bytes missing", nullptr),
    BUG(accumulators_stored_late, kEvery, kWrong, nullptr),
    BUG(place_of_next_tile, kEvery, kWrong, nullptr),
    BUG(last_tile_left, kEvery, kWrong, nullptr),
    BUG(product_too_narrow, kEvery, kWrong, nullptr),
    BUG(exchange_of_some, kEvery, "divergent collective", nullptr),
    BUG(wait_at_other_block, kEvery, "takes no address of another block", nullptr),
};
#undef BUG

enum class Case { kWithout, kPlanted, kWithoutAfterPlanted };

// What the emulator reports, or what is wrong with the output, under the first schedule that shows
// it.
std::string first_report(planted::Run* run, bool is_planted) {
  return emulation::first_error(emulation::schedules(), [&] {
    const std::string wrong = run(is_planted);
    if (!wrong.empty()) throw emulation::Error(wrong);
  });
}

// What a process of its own reports, sanitizers that end it included, under the schedules.
std::string report_of(planted::Run* run, Case which) {
  int ends[2];
  if (pipe(ends) != 0) return "pipe failed";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    std::string error;
    if (which != Case::kWithout) error = first_report(run, true);
    if (which != Case::kPlanted) error = first_report(run, false);
    std::fputs(error.c_str(), stderr);
    std::fflush(stderr);
    _exit(0);
  }
  close(ends[1]);
  std::string report;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) {
    report.append(buffer, static_cast<size_t>(n));
  }
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  return report;
}

void test_bug(const Bug& bug) {
  const auto complain = [&](const char* what, const std::string& report) {
    ++failures();
    std::fprintf(stderr, "%s: %s, got: %s\n", bug.name, what, report.c_str());
  };
  const std::string without = report_of(bug.run, Case::kWithout);
  if (!without.empty()) complain("without the bug there must be no report", without);
  if (!(bug.caught_by & kThis)) return;
  const std::string report = report_of(bug.run, Case::kPlanted);
  const char* expected = kThis == kRace && bug.found_race ? bug.found_race : bug.report;
  const bool is_sanitizer = report.find("AddressSanitizer") != std::string::npos ||
                            report.find("runtime error") != std::string::npos ||
                            report.find("not all allocated") != std::string::npos;
  if (!(expected && report.find(expected) != std::string::npos) && !is_sanitizer) {
    complain(expected ? expected : "a report of a sanitizer", report);
  }
  if (kThis != kSanitized) {  // which warns of the stack that a fault leaves behind
    const std::string after = report_of(bug.run, Case::kWithoutAfterPlanted);
    if (!after.empty()) complain("a failure must leave nothing to the launches after it", after);
  }
  if (std::getenv("SPARSE_UNIFIED_TEST_VERBOSE") != nullptr) std::puts(report.c_str());
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char** argv) {
  using namespace sparse_unified::test;
  std::vector<Test> tests;
  for (const Bug& bug : kBugs) tests.push_back({bug.name, [&] { test_bug(bug); }});
  return run_tests(argc, argv, tests);
}
