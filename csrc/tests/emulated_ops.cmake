# SPDX-License-Identifier: Apache-2.0
# The CUDA bindings over emulated kernels, registered in place of the CPU kernels:
# tests/ops/conftest.py loads it into torch. Needs the torch of the interpreter.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "from torch.utils.cpp_extension import include_paths, library_paths; \
print(';'.join(include_paths())); print(';'.join(library_paths()))"
  OUTPUT_VARIABLE torch_paths OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" "|" torch_paths "${torch_paths}")
string(REGEX REPLACE "\\|.*" "" torch_includes "${torch_paths}")
string(REGEX REPLACE ".*\\|" "" torch_libraries "${torch_paths}")

file(GLOB cuda_bindings CONFIGURE_DEPENDS csrc/bindings/cuda/*.cpp)
add_library(sparse_unified_emulated_ops MODULE
  csrc/tests/emulated_ops.cpp csrc/bindings/arguments.cpp csrc/bindings/common.cpp ${cuda_bindings})
target_include_directories(sparse_unified_emulated_ops SYSTEM PRIVATE ${torch_includes})
target_compile_definitions(sparse_unified_emulated_ops PRIVATE
  TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(sparse_unified_emulated_ops PRIVATE ${torch_libraries})
target_link_libraries(sparse_unified_emulated_ops PRIVATE
  sparse_unified_emulated_plain torch torch_cpu c10)
