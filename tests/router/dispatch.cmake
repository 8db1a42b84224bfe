# Tests of the pool, the policies and dispatch.
set(fake)
if(NOT EXISTS ${CMAKE_SOURCE_DIR}/text/template.c)
  list(APPEND fake served_fake.c)
endif()
tm_test(dispatch_pool_test SOURCES dispatch_pool_test.c dispatch_sim.c ${fake} LIBS tm_router)
tm_test(dispatch_link_test SOURCES dispatch_link_test.c dispatch_worker.c ${fake} LIBS tm_router)
tm_test(dispatch_schedule_test SOURCES dispatch_schedule_test.c dispatch_sim.c ${fake} LIBS tm_router)
tm_test(policy_test SOURCES policy_test.c ${fake} LIBS tm_router)
