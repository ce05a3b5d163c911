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

# Adds the objects of `sources` for every instruction set to `target`.
function(quicksilver_add_kernels target)
  set(level 0)
  foreach(isa IN LISTS QUICKSILVER_ISAS)
    set(objects ${target}_${isa})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE csrc/include csrc/cpu)
    target_compile_definitions(${objects} PRIVATE QS_ISA=${isa} QS_ISA_LEVEL=${level})
    # Contraction would make a result depend on whether the set has a fused multiply-add.
    target_compile_options(${objects} PRIVATE -O3 -ffp-contract=off -fno-math-errno ${QUICKSILVER_FLAGS_${isa}})
    target_link_libraries(${objects} PRIVATE quicksilver_warnings)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
    target_compile_definitions(${target} PRIVATE QS_HAS_${isa})
    math(EXPR level "${level} + 1")
  endforeach()
endfunction()
