# Cache, scheduler, sampler and the engine around a fake model.
tm_test(cache_test SOURCES cache_test.c LIBS tm_engine)
tm_test(sched_test SOURCES sched_test.c sched_check.c LIBS tm_engine)
tm_test(sample_test SOURCES sample_test.c LIBS tm_engine m)
tm_test(engine_demo_test SOURCES engine_demo_test.c drive.c LIBS tm_engine m TIMEOUT 600)
# The fakes' definitions of tm_model_* and tm_comm_* stand before the libraries', whose files are then not linked.
tm_test(engine_test SOURCES engine_test.c drive.c fake_model.c fake_comm.c LIBS tm_engine m)
