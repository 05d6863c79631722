# A CMake toolchain file: zig's Clang, which has the headers and C libraries of every platform.
# Environment: NF4_ZIG, the program; NF4_ZIG_TARGET, like aarch64-linux-gnu.2.17.
string(REGEX MATCH "^([^-]+)-([^-.]+)" _ "$ENV{NF4_ZIG_TARGET}")
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
if(CMAKE_MATCH_2 STREQUAL "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
  set(CMAKE_INSTALL_NAME_TOOL true)  # Apple's, which CMake asks for and a plain library does not need
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/zig-c++")
# Equal bytes wherever the source lies: no paths, and no symbols for debuggers, which hold paths.
# No C++ library: of it only headers are used, and on macOS it would export its operator new.
set(CMAKE_CXX_FLAGS_INIT "-fno-exceptions -ffile-prefix-map=${CMAKE_SOURCE_DIR}=.")
set(CMAKE_EXE_LINKER_FLAGS_INIT -nostdlib++)
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-nostdlib++ -s")
