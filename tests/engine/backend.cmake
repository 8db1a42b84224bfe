# Operators and devices of engine/backend.
tm_test(op_matrix_test SOURCES op_matrix_test.c op_test.c LIBS tm_backend m)
tm_test(op_attention_test SOURCES op_attention_test.c op_test.c LIBS tm_backend m)
tm_test(op_convert_test SOURCES op_convert_test.c LIBS tm_backend m)
tm_test(op_device_test SOURCES op_device_test.c op_test.c LIBS tm_backend m)

if(TM_HAVE_CUDA)
  foreach(part op_cuda_test op_cuda_linear_test op_cuda_attention_test)
    tm_test(${part} SOURCES ${part}.c op_cuda.c op_test.c LIBS tm_backend m)
  endforeach()
endif()

# The same on the CPU, by the emulator: with every build.
if(TARGET tm_cuda_emu)
  foreach(part op_cuda op_cuda_linear op_cuda_attention)
    tm_test(${part}_emu_test SOURCES ${part}_test.c op_cuda.c op_test.c LIBS tm_cuda_emu tm_backend m)
  endforeach()
endif()

# The vector math is in headers that need the flags of their instruction set; the test around it does not.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$" AND CMOCKA_FOUND)
  foreach(isa avx2 avx512)
    add_library(op_vmath_${isa}_kernels OBJECT op_vmath_kernels.c)
    target_link_libraries(op_vmath_${isa}_kernels PRIVATE tm_flags)
    tm_test(op_vmath_${isa}_test SOURCES op_vmath_test.c op_test.c LIBS op_vmath_${isa}_kernels tm_backend m)
  endforeach()
  target_compile_options(op_vmath_avx2_kernels PRIVATE -mavx2 -mfma -mf16c)
  target_compile_options(op_vmath_avx512_kernels PRIVATE -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq)
endif()
