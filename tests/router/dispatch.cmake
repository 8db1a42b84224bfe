# Tests of the pool, the policies and dispatch.
set(sim dispatch_sim.c)
if(NOT EXISTS ${CMAKE_SOURCE_DIR}/router/served.c)
  list(APPEND sim served_fake.c)
endif()
tm_test(dispatch_pool_test SOURCES dispatch_pool_test.c ${sim} LIBS tm_router)
