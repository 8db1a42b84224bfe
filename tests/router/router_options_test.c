/* The router's options: every default is inside its own bounds, help is whole, and the rules about who may
 * listen where. */
#include "tests/router/api_harness.h"

#include <string.h>

#include "common/check.h"
#include "router/options.h"

static tm_status check(const char *const *args, int count, tm_err *err)
{
    char *argv[12] = {(char *)(uintptr_t) "turbomesh-router"};
    tm_router_opts o;
    bool help;
    for (int i = 0; i < count; i++)
        argv[i + 1] = (char *)(uintptr_t)args[i];
    TM_TRY(tm_opt_parse(&TM_ROUTER_OPTIONS, count + 1, argv, &o, NULL, NULL, &help, err));
    return tm_router_opts_check(&o, err);
}

#define CHECK(err, ...)                                                                            \
    check((const char *const[]){__VA_ARGS__},                                                      \
          (int)TM_ARRAY_LEN(((const char *const[]){__VA_ARGS__})), err)

static void defaults(void **state)
{
    (void)state;
    tm_router_opts o;
    tm_err err = TM_ERR_INIT;
    if (tm_opt_defaults(&TM_ROUTER_OPTIONS, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    assert_string_equal(o.host, "127.0.0.1");
    assert_int_equal(o.port, 8000);
    assert_int_equal(o.body_max, 8 << 20);
    assert_int_equal(o.header_bytes_max, 32 << 10);
    assert_int_equal(o.header_count_max, 100);
    assert_int_equal(o.stream_buffer_max, 256 << 10);
    assert_int_equal(o.dead_ms, 2000);
    assert_int_equal(o.suspect_ms, 500);
    assert_int_equal(o.moves_max, 3);
    assert_int_equal(o.ping_ms, 15000);
    assert_int_equal(o.stop_max, 4);
    assert_int_equal(o.log_level, 2);
    assert_false(o.insecure_open);
}

static void rows_do_not_overlap(void **state)
{
    (void)state;
    static const size_t sizes[] = {[TM_OPT_BOOL] = sizeof(bool),
                                   [TM_OPT_INT] = 8,
                                   [TM_OPT_SIZE] = 8,
                                   [TM_OPT_TIME] = 8,
                                   [TM_OPT_NUM] = 8,
                                   [TM_OPT_STR] = sizeof(char *),
                                   [TM_OPT_ENUM] = sizeof(int)};
    const tm_opt_row *r = TM_ROUTER_OPTIONS.rows;
    for (int i = 0; i < TM_ROUTER_OPTIONS.count; i++) {
        assert_true(r[i].offset + sizes[r[i].type] <= sizeof(tm_router_opts));
        for (int k = 0; k < i; k++) {
            assert_string_not_equal(r[i].name, r[k].name);
            assert_true(r[i].offset + sizes[r[i].type] <= r[k].offset ||
                        r[k].offset + sizes[r[k].type] <= r[i].offset);
        }
        size_t n = strlen(r[i].help);
        assert_true(n > 10 && r[i].help[n - 1] == '.');
    }
}

static void who_may_listen_where(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(CHECK(&err, "--workers", "a:1"), TM_OK);
    assert_int_equal(CHECK(&err, "--etcd", "http://a:1"), TM_OK);
    assert_int_equal(CHECK(&err, "--port", "0"), TM_STATUS_CONFIG);
    static const char *const local[] = {"127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"};
    static const char *const open[] = {"0.0.0.0",
                                       "::",
                                       "10.0.0.1",
                                       "127.0.0.1.example.com",
                                       "1270.0.1",
                                       "localhost.example.com",
                                       "",
                                       "*",
                                       "::ffff:10.0.0.1"};
    for (size_t i = 0; i < TM_ARRAY_LEN(local); i++)
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--host", local[i]), TM_OK);
    for (size_t i = 0; i < TM_ARRAY_LEN(open); i++) {
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--host", open[i]), TM_STATUS_CONFIG);
        assert_non_null(strstr(err.msg, "--insecure-open"));
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--host", open[i], "--insecure-open"),
                         TM_OK);
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--host", open[i], "--api-key-file", "f"),
                         TM_OK);
        assert_int_equal(
            CHECK(&err, "--workers", "a:1", "--grpc-port", "9", "--grpc-host", open[i]),
            TM_STATUS_CONFIG);
        assert_non_null(strstr(err.msg, "--grpc-host"));
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--grpc-host", open[i]), TM_OK);
        assert_int_equal(CHECK(&err, "--workers", "a:1", "--api-key-file", "f", "--grpc-port", "9",
                               "--grpc-host", open[i]),
                         TM_OK);
    }
    assert_int_equal(CHECK(&err, "--workers", "a:1", "--dead-time", "500ms"), TM_STATUS_CONFIG);
    assert_int_equal(CHECK(&err, "--workers", "a:1", "--tls-cert", "c"), TM_STATUS_CONFIG);
    assert_int_equal(CHECK(&err, "--workers", "a:1", "--tls-key", "k"), TM_STATUS_CONFIG);
    assert_int_equal(CHECK(&err, "--workers", "a:1", "--tls-key", "k", "--tls-cert", "c"), TM_OK);
    assert_int_equal(CHECK(&err, "--workers", "a:1", "--policy", "round_robin"), TM_OK);
    assert_int_equal(CHECK(&err, "--workers", "a:1", "extra"), TM_STATUS_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),
        cmocka_unit_test(rows_do_not_overlap),
        cmocka_unit_test(who_may_listen_where),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
