# The CUDA kernels, two ways: compiled by nvcc for GPUs, where there is a CUDA compiler, and by the C++ compiler for the
# emulator (csrc/emulator), where that runs. Whether a GPU is present is never asked.
#
# These are variables, or the environment's:
# QUICKSILVER_CUDA=0|1            leaves nvcc out, or insists on it. CUDACXX names the compiler.
# QUICKSILVER_CUDA_ARCHITECTURES  as CMAKE_CUDA_ARCHITECTURES; empty: all that there are kernels for.
# QUICKSILVER_EMULATOR=1          the emulator too: for development and tests, not for those who only use the kernels.
include(CheckLanguage)

set(QUICKSILVER_CUDA "$ENV{QUICKSILVER_CUDA}" CACHE STRING "1: build CUDA kernels; 0: don't; empty: where nvcc is found")
set(QUICKSILVER_CUDA_ARCHITECTURES "$ENV{QUICKSILVER_CUDA_ARCHITECTURES}" CACHE STRING "GPU architectures to build for")
set(QUICKSILVER_EMULATOR "$ENV{QUICKSILVER_EMULATOR}" CACHE STRING "1: build the emulator of the CUDA kernels")
file(GLOB QUICKSILVER_CUDA_SOURCES RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS csrc/cuda/*.cu)

# --- the emulator: fibers switched by x86-64 assembly, memory guarded by the System V way ---------------------------
if(QUICKSILVER_EMULATOR AND NOT (UNIX AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$"))
  message(STATUS "QuickSilver's emulator runs on x86-64 Linux only: it isn't built")
  set(QUICKSILVER_EMULATOR OFF)
endif()

# Objects of the emulator and of all kernels in it. A .cu file can't be both CUDA and C++ in one folder, so each goes
# through a C++ file that includes it.
# Where that is under the sanitizers, the emulator's own files aren't (but for the one that talks to them): they run for
# every access of every thread, and would be thirty times slower.
function(quicksilver_emulated_objects name)
  set(sources)
  foreach(source IN LISTS QUICKSILVER_CUDA_SOURCES)
    get_filename_component(stem "${source}" NAME_WE)
    set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/emulated/${stem}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${source}\"\n")
    list(APPEND sources "${wrapper}")
  endforeach()
  file(GLOB emulator CONFIGURE_DEPENDS csrc/emulator/*.cpp)
  set(plain ${emulator})
  list(FILTER plain EXCLUDE REGEX "sanitizer")
  set_source_files_properties(${plain} PROPERTIES COMPILE_OPTIONS "-O2;-fno-sanitize=all")
  add_library(${name} OBJECT ${sources} ${emulator})
  target_include_directories(${name} PRIVATE csrc/include csrc/cuda csrc/emulator)
  target_compile_definitions(${name} PRIVATE QS_EMULATED QS_CUDA=emulated)
  # Contraction would change bits that the kernels promise; they say themselves where they want a fused multiply-add.
  target_compile_options(${name} PRIVATE -O2 -ffp-contract=off ${ARGN})
  target_link_libraries(${name} PRIVATE quicksilver_warnings)
endfunction()

if(QUICKSILVER_EMULATOR)
  quicksilver_emulated_objects(quicksilver_emulated)  # built only for what wants it: the Python module, the profiler
  set_target_properties(quicksilver_emulated PROPERTIES EXCLUDE_FROM_ALL ON)
endif()

# --- nvcc -------------------------------------------------------------------------------------------------------------
set(QUICKSILVER_HAS_CUDA OFF)
if("${QUICKSILVER_CUDA}" STREQUAL "" OR QUICKSILVER_CUDA)
  check_language(CUDA)
  set(version)
  if(CMAKE_CUDA_COMPILER)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" version "${version}")
    set(version "${CMAKE_MATCH_1}")
  endif()
  if(version AND version VERSION_LESS 12.8)
    if(QUICKSILVER_CUDA)
      message(FATAL_ERROR "QUICKSILVER_CUDA=${QUICKSILVER_CUDA} asks for CUDA kernels, which need nvcc 12.8 or newer, and "
                          "${CMAKE_CUDA_COMPILER} is ${version}. Put a newer one on the PATH, or set CUDACXX to it")
    endif()
    message(STATUS "QuickSilver's CUDA kernels need nvcc 12.8 or newer; ${CMAKE_CUDA_COMPILER} is ${version}")
  elseif(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${QUICKSILVER_CUDA_ARCHITECTURES})
    if(NOT CMAKE_CUDA_ARCHITECTURES)
      # Machine code for each, and what later GPUs compile for themselves: from 90's PTX those that 120's isn't for.
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90 100-real 120)
    endif()
    enable_language(CUDA)
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)  # CMake 3.25.1 doesn't know that nvcc 12 and later have it
    endif()
    find_package(CUDAToolkit 12.8 REQUIRED)
    set(QUICKSILVER_HAS_CUDA ON)
  elseif(QUICKSILVER_CUDA)
    message(FATAL_ERROR "QUICKSILVER_CUDA=${QUICKSILVER_CUDA} asks for CUDA kernels, but no CUDA compiler was found. "
                        "Put nvcc on the PATH, set CUDACXX to it, or set QUICKSILVER_CUDA=0")
  endif()
endif()
message(STATUS "QuickSilver CUDA kernels: ${QUICKSILVER_HAS_CUDA}, emulator: ${QUICKSILVER_EMULATOR}")

if(QUICKSILVER_HAS_CUDA)
  add_library(quicksilver_cuda STATIC ${QUICKSILVER_CUDA_SOURCES})
  target_include_directories(quicksilver_cuda PUBLIC csrc/include PRIVATE csrc/cuda)
  set_target_properties(quicksilver_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(quicksilver_cuda PRIVATE -Wno-deprecated-gpu-targets)
  target_link_libraries(quicksilver_cuda PUBLIC CUDA::cudart_static)
endif()
