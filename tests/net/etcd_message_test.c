/* The JSON side of etcd without etcd: ranges, numbers, values, refusals, the member list against a model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "net/etcd/link.h"
#include "net/etcd/members.h"

static json_t *parse(const char *text)
{
    json_t *v = NULL;
    assert_int_equal(tm_json_parse(text, strlen(text), &v, NULL), TM_OK);
    return v;
}

static void test_bodies(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_etcd_range_prefix(&b, "/a/", NULL, 10, 0);
    assert_string_equal(
        b.data, "{\"key\":\"L2Ev\",\"range_end\":\"L2Ew\",\"limit\":\"10\",\"revision\":\"0\"}");
    tm_buf_clear(&b);
    tm_etcd_range_prefix(&b, "a\xff",
                         "a\xff"
                         "b",
                         1, 7);
    assert_string_equal(
        b.data, "{\"key\":\"Yf9i\",\"range_end\":\"Yg==\",\"limit\":\"1\",\"revision\":\"7\"}");
    tm_buf_clear(&b);
    tm_etcd_watch_prefix(&b, "\xff", 9007199254740993);
    assert_string_equal(b.data, "{\"create_request\":{\"key\":\"/w==\",\"range_end\":\"AA==\","
                                "\"start_revision\":\"9007199254740993\"}}");
    tm_buf_deinit(&b);
}

static void test_values(void **state)
{
    (void)state;
    json_t *v = parse(
        "{\"s\":\"9007199254740993\",\"n\":12,\"text\":\"aGk=\",\"bad\":\"a\",\"nul\":\"AA==\"}");
    assert_true(tm_etcd_int(v, "s") == 9007199254740993);
    assert_true(tm_etcd_int(v, "n") == 12);
    assert_true(tm_etcd_int(v, "absent") == 0);
    char *text = tm_etcd_text(v, "text", 2);
    assert_string_equal(text, "hi");
    free(text);
    text = tm_etcd_text(v, "absent", 2);
    assert_string_equal(text, "");
    free(text);
    assert_null(tm_etcd_text(v, "text", 1));
    assert_null(tm_etcd_text(v, "bad", 10));
    assert_null(tm_etcd_text(v, "nul", 10));
    assert_null(tm_etcd_text(v, "n", 10));
    json_decref(v);
}

/* Bodies as etcd 3.4 sends them. */
static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        long http;
        const char *body, *text;
        tm_status st;
    } rows[] = {
        {404,
         "{\"error\":\"etcdserver: requested lease not found\",\"message\":\"etcdserver: requested "
         "lease not "
         "found\",\"code\":5}",
         "lease not found", TM_STATUS_NOT_FOUND},
        {400, "{\"error\":\"compacted\",\"message\":\"compacted\",\"code\":11}", "compacted",
         TM_STATUS_STALE},
        {503, "{\"error\":\"etcdserver: no leader\",\"code\":14}", "no leader",
         TM_STATUS_UNAVAILABLE},
        {0,
         "{\"error\":{\"grpc_code\":14,\"http_code\":503,\"message\":\"etcdserver: no leader\"}}",
         "no leader", TM_STATUS_UNAVAILABLE},
        {401, "{\"error\":\"invalid auth token\",\"code\":16}", "auth", TM_STATUS_DENIED},
        {502, "<html>", "HTTP 502", TM_STATUS_UNAVAILABLE},
        {400, "", "HTTP 400", TM_STATUS_INVALID},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_err err = TM_ERR_INIT;
        assert_int_equal(tm_etcd_refusal(rows[i].http, rows[i].body, strlen(rows[i].body), &err),
                         rows[i].st);
        assert_non_null(strstr(err.msg, rows[i].text));
    }
}

static void test_endpoints(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int count; /* 0 = refused */
    } rows[] = {
        {"http://a:1", 1}, {"a:1", 1},     {"http://a:1/, https://b:2 ,", 2}, {"", 0}, {",", 0},
        {NULL, 0},         {"ftp://a", 0},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_etcd_link *l = NULL;
        tm_status st = tm_etcd_link_create(&l, rows[i].text, NULL);
        assert_int_equal(st, rows[i].count ? TM_OK : TM_STATUS_CONFIG);
        if (l)
            assert_int_equal(tm_etcd_link_endpoints(l), rows[i].count);
        tm_etcd_link_destroy(l);
    }
}

static void test_events(void **state)
{
    (void)state;
    tm_etcd_members m = {0};
    static const char *const events[] = {
        "{\"kv\":{\"key\":\"L2I=\",\"value\":\"MQ==\",\"create_revision\":\"2\",\"mod_revision\":"
        "\"2\"}}",
        "{\"type\":\"PUT\",\"kv\":{\"key\":\"L2E=\",\"create_revision\":\"3\",\"mod_revision\":"
        "\"3\"}}",
        "{\"kv\":{\"key\":\"L2I=\",\"value\":\"Mg==\",\"create_revision\":\"2\",\"mod_revision\":"
        "\"4\"}}",
        "{\"type\":\"DELETE\",\"kv\":{\"key\":\"L3g=\",\"mod_revision\":\"5\"}}",
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(events); i++) {
        json_t *v = parse(events[i]);
        assert_true(tm_etcd_members_apply(&m, v));
        json_decref(v);
    }
    assert_int_equal(m.count, 2);
    assert_string_equal(m.kvs[0].key, "/a");
    assert_string_equal(m.kvs[0].value, "");
    assert_string_equal(m.kvs[1].value, "2");
    assert_true(m.kvs[1].create_revision == 2 && m.kvs[1].mod_revision == 4);
    json_t *v = parse("{\"type\":\"DELETE\",\"kv\":{\"key\":\"L2E=\"}}");
    assert_true(tm_etcd_members_apply(&m, v));
    json_decref(v);
    /* A value that cannot be used takes the key out instead of leaving the old value in force. */
    v = parse("{\"kv\":{\"key\":\"L2I=\",\"value\":\"AA==\"}}");
    assert_true(tm_etcd_members_apply(&m, v));
    json_decref(v);
    assert_int_equal(m.count, 0);
    tm_etcd_members_clear(&m);
}

static void test_members_against_model(void **state)
{
    (void)state;
    unsigned seed = (unsigned)tm_clock_ns();
    const char *given = getenv("TM_SEED");
    if (given)
        seed = (unsigned)strtoul(given, NULL, 10);
    print_message("seed %u\n", seed);
    enum { KEYS = 200 };
    int64_t model[KEYS] = {0};
    tm_etcd_members m = {0};
    for (int64_t step = 1; step < 20000; step++) {
        int k = rand_r(&seed) % KEYS;
        char key[16], value[32];
        snprintf(key, sizeof(key), "k%03d", k);
        snprintf(value, sizeof(value), "%lld", (long long)step);
        if (rand_r(&seed) % 2) {
            model[k] = step;
            assert_true(tm_etcd_members_put(&m, strdup(key), strdup(value), 1, step));
        } else {
            model[k] = 0;
            tm_etcd_members_remove(&m, key);
        }
    }
    int at = 0;
    for (int k = 0; k < KEYS; k++) {
        char key[16];
        snprintf(key, sizeof(key), "k%03d", k);
        if (!model[k])
            continue;
        assert_true(at < m.count);
        assert_string_equal(m.kvs[at].key, key);
        assert_true(m.kvs[at].mod_revision == model[k]);
        at++;
    }
    assert_int_equal(at, m.count);
    tm_etcd_members_clear(&m);
}

static void test_members_bound(void **state)
{
    (void)state;
    tm_etcd_members m = {0};
    for (int i = 0; i <= TM_ETCD_MEMBERS_MAX; i++) {
        char key[16];
        snprintf(key, sizeof(key), "%06d", i);
        assert_int_equal(tm_etcd_members_put(&m, strdup(key), strdup(""), 1, 1),
                         i < TM_ETCD_MEMBERS_MAX);
    }
    assert_true(tm_etcd_members_put(&m, strdup("000000"), strdup("new"), 1, 2));
    tm_etcd_members_clear(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bodies),        cmocka_unit_test(test_values),
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_endpoints),
        cmocka_unit_test(test_events),        cmocka_unit_test(test_members_against_model),
        cmocka_unit_test(test_members_bound),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
