# Torch's headers and library, for the stable ABI alone: one build serves every torch from 2.10 on, so nothing else of
# torch's own CMake package (which would ask for a CUDA toolkit where that torch was built with one) is wanted.
#
# QUICKSILVER_TORCH_ROOT: the folder of the Python package `torch`; by default the one that this Python would import.
find_package(Python 3.10 COMPONENTS Interpreter Development.Module REQUIRED)

if(NOT QUICKSILVER_TORCH_ROOT)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE QUICKSILVER_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${QUICKSILVER_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "torch 2.10 or newer is needed to build the Python module, and ${Python_EXECUTABLE} has none "
                      "(looked in '${QUICKSILVER_TORCH_ROOT}'). Install it: pip install 'torch>=2.10'")
endif()
file(STRINGS "${QUICKSILVER_TORCH_ROOT}/include/torch/headeronly/version.h" torch_version REGEX "TORCH_VERSION_M[A-Z]+ [0-9]+")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.10)
  message(FATAL_ERROR "torch 2.10 or newer is needed to build the Python module; ${QUICKSILVER_TORCH_ROOT} holds ${torch_version}. "
                      "Upgrade it: pip install 'torch>=2.10'")
endif()
message(STATUS "QuickSilver builds against torch ${torch_version} in ${QUICKSILVER_TORCH_ROOT}")

find_library(QUICKSILVER_TORCH_CPU torch_cpu PATHS "${QUICKSILVER_TORCH_ROOT}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
add_library(quicksilver_torch INTERFACE)
target_include_directories(quicksilver_torch SYSTEM INTERFACE "${QUICKSILVER_TORCH_ROOT}/include")
target_compile_definitions(quicksilver_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# By path and without an rpath: torch is imported first, and its own library, already loaded, is what serves us.
target_link_libraries(quicksilver_torch INTERFACE "${QUICKSILVER_TORCH_CPU}")
