// SPDX-License-Identifier: Apache-2.0
// The emulator reports every planted bug, with the words that name it, and nothing about the same
// kernels without their bugs.
#include <sys/wait.h>
#include <unistd.h>

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
};
#undef BUG

// What a process of its own reports, sanitizers that end it included, under the schedules.
std::string report_of(planted::Run* run, bool is_planted) {
  int ends[2];
  if (pipe(ends) != 0) return "pipe failed";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    std::string wrong;
    const std::string error = emulation::first_error(emulation::schedules(), [&] {
      wrong = run(is_planted);
      if (!wrong.empty()) throw emulation::Error(wrong);
    });
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

void test_bug(const Bug& bug, bool is_verbose) {
  const auto complain = [&](const char* what, const std::string& report) {
    ++failures();
    std::fprintf(stderr, "%s: %s, got: %s\n", bug.name, what, report.c_str());
  };
  const std::string without = report_of(bug.run, false);
  if (!without.empty()) complain("without the bug there must be no report", without);
  if (!(bug.caught_by & kThis)) return;
  const std::string report = report_of(bug.run, true);
  const char* expected = kThis == kRace && bug.found_race ? bug.found_race : bug.report;
  const bool is_sanitizer = report.find("AddressSanitizer") != std::string::npos ||
                            report.find("runtime error") != std::string::npos ||
                            report.find("not all allocated") != std::string::npos;
  if (!(expected && report.find(expected) != std::string::npos) && !is_sanitizer) {
    complain(expected ? expected : "a report of a sanitizer", report);
  }
  if (is_verbose) std::puts(report.c_str());
}

// With an argument, the reports are printed.
int run(bool is_verbose) {
  for (const Bug& bug : kBugs) test_bug(bug, is_verbose);
  return finish("test_emulation_planted");
}

}  // namespace
}  // namespace sparse_unified::test

int main(int argc, char**) { return sparse_unified::test::run(argc > 1); }
