# Tests of the faces: the HTTP API and the gRPC service, limits and keys, options.
foreach(name api_stream api_http api_info api_reply grpc)
  tm_test(${name}_test SOURCES ${name}_test.c api_harness.c fake_dispatch.c LIBS tm_router TIMEOUT 240)
endforeach()
foreach(name api_fields api_messages limit router_options)
  tm_test(${name}_test SOURCES ${name}_test.c LIBS tm_router)
endforeach()
