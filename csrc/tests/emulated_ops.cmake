# SPDX-License-Identifier: Apache-2.0
# The ops over emulated kernels, registered in place of the CPU kernels: tests/ops/conftest.py loads one
# of them into torch, sparse_unified_emulated_ops (plain), ..._race or ..._sanitized. Needs the torch of
# the interpreter.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "from torch.utils.cpp_extension import include_paths, library_paths; \
print(';'.join(include_paths())); print(';'.join(library_paths()))"
  OUTPUT_VARIABLE torch_paths OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" "|" torch_paths "${torch_paths}")
string(REGEX REPLACE "\\|.*" "" torch_includes "${torch_paths}")
string(REGEX REPLACE ".*\\|" "" torch_libraries "${torch_paths}")

# Bindings serve the CPU and CUDA; compiled for the emulator they go to the emulated kernels.
file(STRINGS ${sources_file} binding_sources REGEX "^bindings/.*\\.cpp$")
list(FILTER binding_sources EXCLUDE REGEX "python_module")
list(TRANSFORM binding_sources PREPEND csrc/)

foreach(variant ${emulation_variants})
  string(REPLACE "_plain" "" emulated_ops sparse_unified_emulated_ops_${variant})
  add_library(${emulated_ops} MODULE csrc/tests/emulated_ops.cpp ${binding_sources})
  target_include_directories(${emulated_ops} SYSTEM PRIVATE ${torch_includes})
  target_compile_definitions(${emulated_ops} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
  target_compile_options(${emulated_ops} PRIVATE -Wno-missing-field-initializers)
  target_precompile_headers(${emulated_ops} PRIVATE csrc/bindings/common.h)
  target_link_directories(${emulated_ops} PRIVATE ${torch_libraries})
  target_link_libraries(${emulated_ops} PRIVATE sparse_unified_emulated_${variant}
                                                sparse_unified_kernels torch torch_cpu c10)
endforeach()
