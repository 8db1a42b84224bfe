/* A protected etcd: TLS with a private CA, client certificates, users and tokens that become invalid. Its own
 * program because access is set for a whole process. Needs the openssl command for the certificates. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/clock.h"
#include "common/log.h"
#include "net/etcd/etcd.h"
#include "tests/net/etcd_fixture.h"

static struct {
    char dir[64], ca[96], cert[96], key[96];
} pki;

#define WAIT(cond, ms)                                                                             \
    do {                                                                                           \
        int64_t wait_end_ = tm_clock_ms() + (ms);                                                  \
        while (!(cond) && tm_clock_ms() < wait_end_)                                               \
            tm_sleep_ms(5);                                                                        \
        assert_true(cond);                                                                         \
    } while (0)

/* A CA and one certificate for 127.0.0.1, good for server and client, without a common name: etcd's gateway
 * shows the server's certificate to etcd itself. */
static int make_pki(void **state)
{
    char cmd[1400];
    (void)state;
    snprintf(pki.dir, sizeof(pki.dir), "/tmp/tm-pki-XXXXXX");
    if (!mkdtemp(pki.dir))
        return -1;
    snprintf(pki.ca, sizeof(pki.ca), "%s/ca.pem", pki.dir);
    snprintf(pki.cert, sizeof(pki.cert), "%s/cert.pem", pki.dir);
    snprintf(pki.key, sizeof(pki.key), "%s/key.pem", pki.dir);
    snprintf(
        cmd, sizeof(cmd),
        "cd %s && exec 2>/dev/null && "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout cakey.pem "
        "-out ca.pem -days 2 -subj /O=test-ca && "
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -out c.csr "
        "-subj /O=test && echo subjectAltName=IP:127.0.0.1 > ext && "
        "openssl x509 -req -in c.csr -CA ca.pem -CAkey cakey.pem -CAcreateserial -days 2 "
        "-extfile ext -out cert.pem",
        pki.dir);
    return system(cmd);
}

static int remove_pki(void **state)
{
    char cmd[128];
    (void)state;
    snprintf(cmd, sizeof(cmd), "rm -rf %s", pki.dir);
    return system(cmd);
}

static void use(const char *ca, bool cert, const char *user, const char *password)
{
    tm_etcd_access a = {ca, cert ? pki.cert : NULL, cert ? pki.key : NULL, user, password};
    assert_int_equal(tm_etcd_set_access(&a, NULL), TM_OK);
}

static void test_bad_access(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    tm_etcd_access missing = {.ca_file = "/no/such/file"};
    assert_int_equal(tm_etcd_set_access(&missing, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "/no/such/file"));
    tm_etcd_access half = {.cert_file = pki.cert};
    assert_int_equal(tm_etcd_set_access(&half, &err), TM_STATUS_CONFIG);
    assert_int_equal(tm_etcd_set_access(NULL, &err), TM_OK);
}

static void test_tls(void **state)
{
    (void)state;
    etcd_proc e;
    tm_err err = TM_ERR_INIT;
    char *value = NULL;
    etcd_prepare(&e);
    e.cert = pki.cert;
    e.key = pki.key;
    e.client_ca = pki.ca;
    use(pki.ca, true, NULL, NULL);
    etcd_start(&e);
    assert_int_equal(tm_etcd_put(e.url, "/a", "b", &err), TM_OK);
    assert_int_equal(tm_etcd_get(e.url, "/a", &value, &err), TM_OK);
    assert_string_equal(value, "b");
    free(value);
    /* a server that is not vouched for, and a client that shows nothing */
    use(NULL, true, NULL, NULL);
    assert_int_equal(tm_etcd_health(e.url, &err), TM_STATUS_UNAVAILABLE);
    assert_non_null(strstr(err.msg, "certificate"));
    use(pki.ca, false, NULL, NULL);
    assert_int_equal(tm_etcd_put(e.url, "/a", "c", &err), TM_STATUS_UNAVAILABLE);
    tm_etcd_set_access(NULL, NULL);
    etcd_remove(&e);
}

static atomic_int g_count = -1; /* keys of the last list */

static void on_list(void *user, const tm_etcd_kv *kvs, int count, int64_t revision)
{
    (void)user, (void)kvs, (void)revision;
    atomic_store(&g_count, count);
}

static void on_value(void *user, uint64_t attempt, char *buf, size_t size)
{
    (void)user;
    snprintf(buf, size, "%llu", (unsigned long long)attempt);
}

static void test_users(void **state)
{
    (void)state;
    etcd_proc e;
    tm_err err = TM_ERR_INIT;
    etcd_prepare(&e);
    etcd_start(&e);
    static const char *const steps[][2] = {
        {"/v3/auth/user/add", "{\"name\":\"root\",\"password\":\"p\\\"w\"}"},
        {"/v3/auth/role/add", "{\"name\":\"root\"}"},
        {"/v3/auth/user/grant", "{\"user\":\"root\",\"role\":\"root\"}"},
        {"/v3/auth/enable", "{}"},
    };
    for (size_t i = 0; i < 4; i++)
        json_decref(etcd_raw_ask(&e, steps[i][0], steps[i][1]));
    assert_int_not_equal(tm_etcd_put(e.url, "/a", "b", &err), TM_OK);
    use(NULL, false, "root", "wrong");
    assert_int_not_equal(tm_etcd_put(e.url, "/a", "b", &err), TM_OK);
    use(NULL, false, "root", "p\"w");
    assert_int_equal(tm_etcd_put(e.url, "/a", "b", &err), TM_OK);

    tm_etcd_reg *r = NULL;
    tm_etcd_watch *w = NULL;
    tm_etcd_reg_opts ro = {.endpoints = e.url, .key = "/p/k", .ttl_ms = 3000, .value = on_value};
    tm_etcd_watch_opts wo = {
        .endpoints = e.url, .prefix = "/p/", .on_list = on_list, .reconcile_ms = 60000};
    assert_int_equal(tm_etcd_reg_create(&r, &ro, NULL), TM_OK);
    assert_int_equal(tm_etcd_watch_create(&w, &wo, NULL), TM_OK);
    WAIT(tm_etcd_reg_active(r) && atomic_load(&g_count) == 1, 5000);
    /* A restart forgets every token: both log in again by themselves. */
    etcd_kill(&e);
    etcd_start(&e);
    assert_int_equal(tm_etcd_put(e.url, "/p/second", "x", &err), TM_OK);
    WAIT(atomic_load(&g_count) == 2, 30000);
    /* Longer than the lease lives. When etcd was slow to come back the registration may be a new one. */
    tm_sleep_ms(4000);
    WAIT(tm_etcd_reg_active(r) && atomic_load(&g_count) == 2, 30000);
    tm_etcd_reg_destroy(r, 2000);
    WAIT(atomic_load(&g_count) == 1, 30000);
    tm_etcd_watch_destroy(w);
    tm_etcd_set_access(NULL, NULL);
    etcd_remove(&e);
}

int main(void)
{
    tm_log_init("etcd_access_test", TM_LOG_ERROR, TM_LOG_TEXT);
    if (!etcd_available() || access("/usr/bin/openssl", X_OK) != 0) {
        printf("skipped: etcd (package etcd-server) or openssl is not installed\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_access),
        cmocka_unit_test(test_tls),
        cmocka_unit_test(test_users),
    };
    return cmocka_run_group_tests(tests, make_pki, remove_pki);
}
