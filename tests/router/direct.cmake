# The baseline of bench/router.sh.
add_executable(tm-direct-client direct_client.c)
target_link_libraries(tm-direct-client PRIVATE tm_flags tm_rpc tm_proto tm_common)
