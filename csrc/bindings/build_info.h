// SPDX-License-Identifier: Apache-2.0
// What this library was built from, as the compiler saw it.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sparse_unified {

// Names and values, in the order in which they are told. "none" says that something is not there,
// "unknown" that the build could not tell.
std::vector<std::pair<const char*, std::string>> build_info();

}  // namespace sparse_unified
