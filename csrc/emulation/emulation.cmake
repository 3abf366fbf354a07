# SPDX-License-Identifier: Apache-2.0
# The CUDA kernels of csrc/sources.txt as C++, run by csrc/emulation, in three variants:
#   plain      optimised: big shapes, many schedules
#   sanitized  address and undefined-behaviour sanitizers (with SPARSE_UNIFIED_SANITIZE)
#   race       every access of the kernels reaches a race detector (likewise)
# Each is a library sparse_unified_emulated_VARIANT of emulator and kernels. The emulator alone is
# also built as on processors for which it has no switch of its own (portable, likewise).
set(emulation_variants plain)
set(emulator_variants plain)
if(SPARSE_UNIFIED_SANITIZE)
  list(APPEND emulation_variants sanitized race)
  list(APPEND emulator_variants sanitized race portable)
endif()

set(emulation_sanitize -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined
                       -fno-sanitize-recover=all)
# Sources that hold kernels, and the emulator itself. Uninitialised variables start as 0xfefe...
# where the shapes are small anyway. The hooks of the thread sanitizer do not see the memcpy and
# memset that loops were turned into, nor do they have the atomics that guard static variables of the host.
set(emulation_kernel_flags_plain -O2 -g1)
set(emulation_kernel_flags_sanitized ${emulation_sanitize} -ftrivial-auto-var-init=pattern)
set(emulation_kernel_flags_race -O2 -g1 -ftrivial-auto-var-init=pattern -fsanitize=thread
                                -fno-tree-loop-distribute-patterns -fno-threadsafe-statics
                                --param=tsan-instrument-func-entry-exit=0)
set(emulation_flags_plain -O3 -g1)
set(emulation_kernel_flags_portable ${emulation_kernel_flags_plain})
set(emulation_flags_portable -O3 -g1 -DSPARSE_UNIFIED_EMULATION_UCONTEXT)
set(emulation_flags_sanitized ${emulation_sanitize})
set(emulation_flags_race -O2 -g1 -DSPARSE_UNIFIED_EMULATION_RACE)

file(GLOB emulation_sources CONFIGURE_DEPENDS csrc/emulation/*.cpp)
file(STRINGS ${sources_file} cuda_sources REGEX "^cuda/.*\\.(cu|cpp)$")
list(TRANSFORM cuda_sources PREPEND csrc/)

# emulated_sources(TARGET VARIANT SOURCES...): compiles sources that hold kernels into the target.
function(emulated_sources target variant)
  if(NOT ARGN)
    return()
  endif()
  add_library(${target}_kernels OBJECT ${ARGN})
  target_link_libraries(${target}_kernels PRIVATE sparse_unified_emulation_${variant})
  target_compile_options(${target}_kernels PRIVATE
    -Wno-unknown-pragmas -fno-strict-aliasing ${emulation_kernel_flags_${variant}})
  set(cuda ${ARGN})
  list(FILTER cuda INCLUDE REGEX "\\.cu$")
  set_source_files_properties(${cuda} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_kernels>)
endfunction()

# What no variant changes.
add_library(sparse_unified_emulation_products OBJECT csrc/emulation/products.cpp)
target_include_directories(sparse_unified_emulation_products PRIVATE csrc csrc/include)
target_compile_definitions(sparse_unified_emulation_products PRIVATE SPARSE_UNIFIED_EMULATION)
target_compile_options(sparse_unified_emulation_products PRIVATE -O3 -g1 -Wall -Wextra)
list(FILTER emulation_sources EXCLUDE REGEX "/products\\.cpp$")

foreach(variant ${emulator_variants})
  set(usage sparse_unified_emulation_${variant})
  add_library(${usage} INTERFACE)
  target_include_directories(${usage} INTERFACE csrc csrc/include csrc/tests)
  target_compile_definitions(${usage} INTERFACE SPARSE_UNIFIED_EMULATION)
  target_compile_options(${usage} INTERFACE -Wall -Wextra -Wno-psabi)
  target_link_libraries(${usage} INTERFACE ${CMAKE_DL_LIBS})
  if(NOT variant MATCHES "plain|portable")
    target_compile_definitions(${usage} INTERFACE SPARSE_UNIFIED_EMULATION_SMALL)
  endif()
  if(variant STREQUAL sanitized)
    target_link_options(${usage} INTERFACE -fsanitize=address,undefined)
  endif()

  set(emulated sparse_unified_emulated_${variant})
  set(sources ${emulation_sources})
  if(NOT variant STREQUAL race)
    list(FILTER sources EXCLUDE REGEX "/(race|tsan_hooks)\\.cpp$")
  endif()
  add_library(${emulated} STATIC
              ${sources} $<TARGET_OBJECTS:sparse_unified_emulation_products>)
  target_link_libraries(${emulated} PUBLIC ${usage})
  target_compile_options(${emulated} PRIVATE ${emulation_flags_${variant}})
  if(NOT variant STREQUAL portable)
    emulated_sources(${emulated} ${variant} ${cuda_sources})
  endif()
endforeach()

# add_emulated_test_variant(NAME VARIANT SOURCES...): the test NAME_VARIANT of csrc/tests/NAME.cpp
# and further sources with kernels. The kernels of the CPU are there to be compared with.
function(add_emulated_test_variant name variant)
  set(test ${name}_${variant})
  add_executable(${test})
  emulated_sources(${test} ${variant} csrc/tests/${name}.cpp ${ARGN})
  target_link_libraries(${test} PRIVATE sparse_unified_emulated_${variant}
                                        sparse_unified_kernels)
  add_test(NAME ${test} COMMAND ${test})
  set_tests_properties(${test} PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77)
endfunction()

# add_emulated_test(NAME SOURCES...): the same in each variant.
function(add_emulated_test name)
  foreach(variant ${emulation_variants})
    add_emulated_test_variant(${name} ${variant} ${ARGN})
  endforeach()
endfunction()

# Host code, and functions of csrc/device that host code may call.
add_emulated_test_variant(test_grouped_ffn_config plain)
add_emulated_test_variant(test_grouped_ffn_tiles plain)
add_emulated_test(test_emulation)
if(SPARSE_UNIFIED_SANITIZE)
  add_emulated_test_variant(test_emulation portable)
endif()
file(GLOB planted_sources CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR} csrc/tests/planted/*.cu)
add_emulated_test(test_emulation_planted ${planted_sources})

# The programs that try single instructions on a GPU, tried here where the instructions have twins.
foreach(program sm80 sm90a)
  if(program STREQUAL sm90a AND NOT EXISTS ${CMAKE_SOURCE_DIR}/csrc/emulation/wgmma.cpp)
    continue()
  endif()
  set(test test_instructions_${program})
  add_executable(${test})
  emulated_sources(${test} plain tests/gpu/instructions/${program}.cu)
  target_include_directories(${test}_kernels PRIVATE tests/gpu/instructions)
  target_link_libraries(${test} PRIVATE sparse_unified_emulated_plain)
  add_test(NAME ${test} COMMAND ${test})
  set_tests_properties(${test} PROPERTIES TIMEOUT 300)
endforeach()
