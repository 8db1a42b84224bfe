tm_test(rpc_test SOURCES rpc_test.c LIBS tm_rpc TIMEOUT 120)
