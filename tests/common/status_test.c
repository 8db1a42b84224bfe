/* Status table, error record, clock. */
#include "tests/common/test.h"

#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/status.h"

static void table_is_complete(void **state)
{
    (void)state;
    for (int st = 0; st < TM_STATUS_COUNT; st++) {
        tm_status s = (tm_status)st;
        assert_true(strlen(tm_status_name(s)) > 0);
        assert_true(tm_status_http(s) >= 200 && tm_status_http(s) < 600);
        assert_in_range(tm_status_grpc(s), 0, 16);
        for (int other = 0; other < st; other++)
            assert_string_not_equal(tm_status_name(s), tm_status_name((tm_status)other));
        if (st != TM_OK) {
            assert_true(tm_status_http(s) >= 400);
            assert_true(tm_status_grpc(s) != 0);
            assert_true(tm_status_exit(s) != 0);
        }
    }
    assert_int_equal(tm_status_exit(TM_OK), 0);
}

static void table_values(void **state)
{
    (void)state;
    static const struct {
        tm_status st;
        int http, grpc, exit;
    } rows[] = {
        {TM_STATUS_INVALID, 400, 3, 2},       {TM_STATUS_NOT_FOUND, 404, 5, 78},
        {TM_STATUS_TOO_LARGE, 413, 8, 1},     {TM_STATUS_BUSY, 429, 8, 1},
        {TM_STATUS_CANCELLED, 499, 1, 1},     {TM_STATUS_TIMEOUT, 408, 4, 1},
        {TM_STATUS_UNSUPPORTED, 400, 12, 78}, {TM_STATUS_DENIED, 401, 16, 1},
        {TM_STATUS_UNAVAILABLE, 503, 14, 69}, {TM_STATUS_CLOSED, 503, 14, 1},
        {TM_STATUS_STALE, 503, 9, 1},         {TM_STATUS_CONFIG, 500, 13, 78},
        {TM_STATUS_DATA, 500, 13, 78},        {TM_STATUS_INTERNAL, 500, 13, 1},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        assert_int_equal(tm_status_http(rows[i].st), rows[i].http);
        assert_int_equal(tm_status_grpc(rows[i].st), rows[i].grpc);
        assert_int_equal(tm_status_exit(rows[i].st), rows[i].exit);
    }
    /* A value outside the enum is a bug, and says so. */
    assert_string_equal(tm_status_name((tm_status)999), "internal");
    assert_int_equal(tm_status_http((tm_status)-1), 500);
}

static tm_status failing(tm_err *err)
{
    return TM_FAIL(err, TM_STATUS_DATA, "bad %s: %d", "thing", 7);
}

static void a_bad_file_is_not_the_askers_fault(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_err_of_file(&err, TM_FAIL(&err, TM_STATUS_INVALID, "x")), TM_STATUS_DATA);
    assert_int_equal(err.status, TM_STATUS_DATA);
    assert_int_equal(tm_err_of_file(&err, TM_FAIL(&err, TM_STATUS_IO, "x")), TM_STATUS_IO);
    assert_int_equal(err.status, TM_STATUS_IO);
    assert_int_equal(tm_err_of_file(NULL, TM_OK), TM_OK);
}

static void record_is_filled(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(failing(&err), TM_STATUS_DATA);
    assert_int_equal(err.status, TM_STATUS_DATA);
    assert_string_equal(err.msg, "bad thing: 7");
    assert_non_null(strstr(err.file, "status_test.c"));
    assert_true(err.line > 0);
    tm_err_prefix(&err, "%s", "a/file.json");
    assert_string_equal(err.msg, "a/file.json: bad thing: 7");
    assert_int_equal(failing(NULL), TM_STATUS_DATA);
    tm_err_prefix(NULL, "nothing");
}

static void long_texts_are_cut(void **state)
{
    (void)state;
    char big[2000];
    memset(big, 'x', sizeof big - 1);
    big[sizeof big - 1] = '\0';
    tm_err err = TM_ERR_INIT;
    TM_FAIL(&err, TM_STATUS_IO, "%s", big);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
    tm_err_prefix(&err, "p");
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
    assert_memory_equal(err.msg, "p: xxx", 6);
    tm_err_prefix(&err, "%s", big);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 1);
    /* The message may be made from itself. */
    TM_FAIL(&err, TM_STATUS_IO, "short");
    TM_FAIL(&err, TM_STATUS_IO, "very %s", err.msg);
    assert_string_equal(err.msg, "very short");
}

static void a_message_is_one_line(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    TM_FAIL(&err, TM_STATUS_DATA, "tensor %s: \xc3\xa4", "a\r\nb\x1b[1m\x7f");
    assert_string_equal(err.msg, "tensor a  b [1m : \xc3\xa4");
    tm_err_prefix(&err, "%s", "x\ty");
    assert_string_equal(err.msg, "x y: tensor a  b [1m : \xc3\xa4");
}

static tm_status passes(int *undone, tm_status what)
{
    tm_status st = TM_OK;
    TM_TRY_GOTO(what, undo);
    return TM_OK;
undo:
    *undone = 1;
    return st;
}

static tm_status tries(tm_status what)
{
    TM_TRY(what);
    return TM_STATUS_STALE;
}

static void macros_pass_on(void **state)
{
    (void)state;
    int undone = 0;
    assert_int_equal(passes(&undone, TM_OK), TM_OK);
    assert_int_equal(undone, 0);
    assert_int_equal(passes(&undone, TM_STATUS_BUSY), TM_STATUS_BUSY);
    assert_int_equal(undone, 1);
    assert_int_equal(tries(TM_OK), TM_STATUS_STALE);
    assert_int_equal(tries(TM_STATUS_IO), TM_STATUS_IO);
}

static void clocks_go_forward(void **state)
{
    (void)state;
    int64_t a = tm_clock_ns(), ms = tm_clock_ms();
    tm_sleep_ms(20);
    int64_t b = tm_clock_ns();
    assert_true(b - a >= 20000000);
    assert_true(tm_clock_ms() - ms >= 19);
    assert_true(tm_clock_wall_ms() > INT64_C(1600000000000));
    a = tm_clock_ns();
    tm_sleep_ms(0);
    tm_sleep_ms(-5);
    assert_true(tm_clock_ns() - a < 1000000000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table_is_complete),
        cmocka_unit_test(table_values),
        cmocka_unit_test(a_bad_file_is_not_the_askers_fault),
        cmocka_unit_test(record_is_filled),
        cmocka_unit_test(long_texts_are_cut),
        cmocka_unit_test(a_message_is_one_line),
        cmocka_unit_test(macros_pass_on),
        cmocka_unit_test(clocks_go_forward),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
