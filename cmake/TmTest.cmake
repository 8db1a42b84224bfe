# tm_test(name SOURCES a.c ... LIBS tm_common ... [TIMEOUT s] [LABELS unit]): one cmocka program, one ctest entry.
# It runs in the source root, prints its seed, and may read TM_SHARED (the full test data; may be absent).
set(TM_RANK_JOB ${CMAKE_SOURCE_DIR}/tests/harness/rank_job.c) # for programs that start themselves under mpirun
set(TM_SHARED_DIR ${CMAKE_SOURCE_DIR}/../shared CACHE PATH "full test data, optional")
function(tm_test name)
  if(NOT CMOCKA_FOUND)
    return()
  endif()
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;LIBS;LABELS" ${ARGN})
  add_executable(${name} ${T_SOURCES})
  target_link_libraries(${name} PRIVATE tm_flags ${T_LIBS} PkgConfig::CMOCKA)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  if(NOT T_LABELS)
    set(T_LABELS unit)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} LABELS "${T_LABELS}"
    ENVIRONMENT "TM_SHARED=${TM_SHARED_DIR};TM_BIN=${CMAKE_BINARY_DIR}/bin")
endfunction()

# Debian's own Python has the pytest and grpc packages that the tests use.
find_program(TM_PYTHON NAMES python3 PATHS /usr/bin NO_DEFAULT_PATH REQUIRED)

# tm_pytest(name file.py [TIMEOUT s] [LABELS e2e]): needs the programs, so it is skipped where they are not built.
function(tm_pytest name file)
  cmake_parse_arguments(T "" "TIMEOUT" "LABELS" ${ARGN})
  add_test(NAME ${name} COMMAND ${TM_PYTHON} -m pytest -q -x -p no:cacheprovider ${CMAKE_CURRENT_SOURCE_DIR}/${file}
    WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} LABELS "${T_LABELS}" RUN_SERIAL TRUE
    ENVIRONMENT "TM_SHARED=${TM_SHARED_DIR};TM_BIN=${CMAKE_BINARY_DIR}/bin;PYTHONDONTWRITEBYTECODE=1")
endfunction()

# tm_fuzz(name LIBS ...): the fuzz entry tests/fuzz/<name>_fuzz.c. With clang and TM_FUZZ under libFuzzer, otherwise a test: a
# short run of the kept corpora (tests/fuzz/README.md) and random changes of them.
option(TM_FUZZ "Build the fuzz entries for libFuzzer (clang)" OFF)
if(TM_FUZZ)
  target_compile_options(tm_flags INTERFACE $<$<COMPILE_LANGUAGE:C>:-fsanitize=fuzzer-no-link>)
endif()
function(tm_fuzz name)
  cmake_parse_arguments(T "" "" "LIBS" ${ARGN})
  set(dir ${CMAKE_SOURCE_DIR}/tests/fuzz)
  add_executable(${name}_fuzz ${dir}/${name}_fuzz.c)
  target_link_libraries(${name}_fuzz PRIVATE ${T_LIBS})
  set_target_properties(${name}_fuzz PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  set(packed ${dir}/corpus/${name}.tar.xz)
  set(unpacked ${CMAKE_BINARY_DIR}/tests/corpus/${name})
  add_custom_command(OUTPUT ${unpacked}.stamp DEPENDS ${packed}
    COMMAND ${CMAKE_COMMAND} -E rm -rf ${unpacked}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${unpacked}
    COMMAND ${CMAKE_COMMAND} -E chdir ${unpacked} ${CMAKE_COMMAND} -E tar xf ${packed}
    COMMAND ${CMAKE_COMMAND} -E touch ${unpacked}.stamp
    COMMENT "Unpacking the fuzz corpus of ${name}" VERBATIM)
  add_custom_target(${name}_fuzz_corpus DEPENDS ${unpacked}.stamp)
  add_dependencies(${name}_fuzz ${name}_fuzz_corpus)
  if(TM_FUZZ)
    target_link_options(${name}_fuzz PRIVATE -fsanitize=fuzzer)
    return()
  endif()
  target_sources(${name}_fuzz PRIVATE ${dir}/fuzz_main.c)
  add_test(NAME ${name}_fuzz COMMAND ${name}_fuzz ${dir}/corpus/${name} ${unpacked})
  set_tests_properties(${name}_fuzz PROPERTIES LABELS unit TIMEOUT 120)
endfunction()
