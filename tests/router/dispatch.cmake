# Tests of the pool, the policies and dispatch.
tm_test(policy_test SOURCES policy_test.c LIBS tm_router)
tm_test(dispatch_pool_test SOURCES dispatch_pool_test.c dispatch_sim.c LIBS tm_router)
tm_test(dispatch_link_test SOURCES dispatch_link_test.c dispatch_worker.c LIBS tm_router)
tm_test(dispatch_schedule_test SOURCES dispatch_schedule_test.c dispatch_sim.c LIBS tm_router)
tm_test(dispatch_hostile_test SOURCES dispatch_hostile_test.c dispatch_sim.c LIBS tm_router)
