tm_test(etcd_message_test SOURCES etcd_message_test.c LIBS tm_etcd)
tm_test(etcd_test SOURCES etcd_test.c etcd_fixture.c LIBS tm_etcd TIMEOUT 300 LABELS unit slow)
tm_test(etcd_access_test SOURCES etcd_access_test.c etcd_fixture.c LIBS tm_etcd LABELS unit slow)
