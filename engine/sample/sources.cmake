list(APPEND TM_ENGINE_SOURCES sample/row.c sample/row_base.c sample/sampler.c sample/seen.c)
# Nothing is fused, so that every width of registers and every device gives the same bits.
set_source_files_properties(sample/row_base.c sample/sampler.c PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  list(APPEND TM_ENGINE_SOURCES sample/row_avx2.c)
  set_source_files_properties(sample/row.c PROPERTIES COMPILE_DEFINITIONS TM_SAMPLE_AVX2)
  set_source_files_properties(sample/row_avx2.c PROPERTIES COMPILE_DEFINITIONS TM_SAMPLE_AVX2
    COMPILE_OPTIONS "-mavx2;-ffp-contract=off")
endif()
