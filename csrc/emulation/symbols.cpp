// SPDX-License-Identifier: Apache-2.0
#include <dlfcn.h>
#include <link.h>
#include <stdio.h>

#include <memory>

#include "emulation/block.h"

namespace sparse_unified::emulation {

std::string describe_code(const void* address) {
  Dl_info info{};
  link_map* map = nullptr;
  if (!dladdr1(address, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) || !map) {
    return "unknown code";
  }
  char offset[32];
  std::snprintf(offset, sizeof(offset), "0x%zx",
                reinterpret_cast<size_t>(address) - static_cast<size_t>(map->l_addr));
  const std::string file = *map->l_name ? map->l_name : "/proc/self/exe";
  std::string where = file + "+" + offset;

  // binutils reads the symbols that no interface of the C library gives.
  char target[4096] = {};
  if (!realpath(file.c_str(), target)) return where;
  const std::string command =
      "addr2line -Cfpse '" + std::string(target) + "' " + offset + " 2>/dev/null";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  char line[1024] = {};
  if (!pipe || !fgets(line, sizeof(line), pipe.get()) || *line == '?') return where;
  where = line;
  where.resize(where.find_last_not_of('\n') + 1);
  return where;
}

}  // namespace sparse_unified::emulation
