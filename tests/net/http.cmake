tm_test(http_parse_test SOURCES http_parse_test.c LIBS tm_http)
tm_test(http_server_test SOURCES http_server_test.c http_fixture.c LIBS tm_http)
tm_test(http_load_test SOURCES http_load_test.c http_fixture.c LIBS tm_http TIMEOUT 180)
