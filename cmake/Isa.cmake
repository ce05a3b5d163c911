# Compiles kernel sources once per instruction set. No wide flag ever reaches a shared source: code that the compiler
# emits for a wide set must not be what another machine's linker picks for a function that all of them share.
include(CheckCXXCompilerFlag)

set(_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(_avx512 ${_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(QUICKSILVER_FLAGS_baseline "")
set(QUICKSILVER_FLAGS_avx2 ${_avx2})
set(QUICKSILVER_FLAGS_avx512 ${_avx512})
set(QUICKSILVER_FLAGS_avx512vnni ${_avx512} -mavx512vnni)

set(QUICKSILVER_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  foreach(isa IN ITEMS avx2 avx512 avx512vnni)
    string(REPLACE ";" " " flags "${QUICKSILVER_FLAGS_${isa}}")
    check_cxx_compiler_flag("${flags}" QUICKSILVER_COMPILER_HAS_${isa})
    if(QUICKSILVER_COMPILER_HAS_${isa})
      list(APPEND QUICKSILVER_ISAS ${isa})
    endif()
  endforeach()
endif()
message(STATUS "QuickSilver instruction sets: ${QUICKSILVER_ISAS}")

# Objects of `sources` for one instruction set. Contraction would make a result depend on whether the set has a fused
# multiply-add.
function(quicksilver_kernel_objects name isa flags)
  list(FIND QUICKSILVER_ISAS ${isa} level)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc/include csrc/cpu)
  target_compile_definitions(${name} PRIVATE QS_ISA=${isa} QS_ISA_LEVEL=${level})
  target_compile_options(${name} PRIVATE -O3 -ffp-contract=off -fno-math-errno ${flags})
  target_link_libraries(${name} PRIVATE quicksilver_warnings)
endfunction()

# Adds the objects of `sources` for every instruction set to `target`.
function(quicksilver_add_kernels target)
  foreach(isa IN LISTS QUICKSILVER_ISAS)
    quicksilver_kernel_objects(${target}_${isa} ${isa} "${QUICKSILVER_FLAGS_${isa}}" ${ARGN})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
    target_compile_definitions(${target} PRIVATE QS_HAS_${isa})
  endforeach()
endfunction()

# The same, with AVX-512's intrinsics made of AVX2's (csrc/tests/avx512_by_avx2.h): for tests on narrower machines.
function(quicksilver_add_emulated_kernels target)
  foreach(isa IN LISTS QUICKSILVER_ISAS)
    target_compile_definitions(${target} PRIVATE QS_HAS_${isa})
    if(isa MATCHES "^avx512")
      quicksilver_kernel_objects(${target}_${isa} ${isa} "${QUICKSILVER_FLAGS_avx2};-Wno-psabi" ${ARGN})
      target_compile_definitions(${target}_${isa} PRIVATE QS_EMULATE_AVX512)
      target_include_directories(${target}_${isa} PRIVATE csrc/tests)
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_${isa}>)
    else()
      target_sources(${target} PRIVATE $<TARGET_OBJECTS:quicksilver_${isa}>)
    endif()
  endforeach()
endfunction()
