tm_test(safetensors_test SOURCES safetensors_test.c LIBS tm_engine)
tm_test(config_test SOURCES config_test.c LIBS tm_engine m)
# model_test starts itself again under mpirun for the runs with several ranks.
tm_test(model_test SOURCES model_test.c model_run.c LIBS tm_engine m TIMEOUT 400)
if(MPI_C_FOUND AND TARGET model_test)
  target_compile_definitions(model_test PRIVATE TM_MPIRUN="${MPIEXEC_EXECUTABLE}")
endif()
