/* Limits of keys under a clock of the test's own, and the key file. */
#include "tests/router/api_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/hash.h"
#include "router/limit/keys.h"
#include "router/limit/limit.h"

static void rate(void **state)
{
    (void)state;
    const tm_limit_opts o = {.requests_per_minute = 6};
    tm_limit l = {0};
    int64_t retry = -1;
    for (int i = 0; i < 6; i++) {
        assert_int_equal(tm_limit_enter(&l, &o, 1000, &retry), TM_LIMIT_OK);
        tm_limit_leave(&l);
        assert_int_equal(tm_limit_remaining(&l), 5 - i);
    }
    assert_int_equal(tm_limit_enter(&l, &o, 1000, &retry), TM_LIMIT_RATE);
    assert_int_equal(retry, 10000);
    assert_int_equal(tm_limit_full_in_ms(&l, &o), 60000);
    assert_int_equal(tm_limit_enter(&l, &o, 10999, &retry), TM_LIMIT_RATE);
    assert_in_range(retry, 1, 2);
    assert_int_equal(tm_limit_enter(&l, &o, 11001, &retry), TM_LIMIT_OK);
    assert_int_equal(tm_limit_enter(&l, &o, 11001, &retry), TM_LIMIT_RATE);
    /* A long pause fills the bucket, not more. */
    for (int i = 0; i < 6; i++)
        assert_int_equal(tm_limit_enter(&l, &o, 10000000, &retry), TM_LIMIT_OK);
    assert_int_equal(tm_limit_enter(&l, &o, 10000000, &retry), TM_LIMIT_RATE);
    /* A clock that goes back gives nothing. */
    assert_int_equal(tm_limit_enter(&l, &o, 5000, &retry), TM_LIMIT_RATE);
}

static void concurrency(void **state)
{
    (void)state;
    const tm_limit_opts o = {.concurrent = 2};
    tm_limit l = {0};
    int64_t retry = 0;
    assert_int_equal(tm_limit_enter(&l, &o, 1, &retry), TM_LIMIT_OK);
    assert_int_equal(tm_limit_enter(&l, &o, 1, &retry), TM_LIMIT_OK);
    assert_int_equal(tm_limit_enter(&l, &o, 1, &retry), TM_LIMIT_CONCURRENT);
    assert_true(retry > 0);
    tm_limit_leave(&l);
    assert_int_equal(tm_limit_enter(&l, &o, 1, &retry), TM_LIMIT_OK);
    const tm_limit_opts off = {0};
    tm_limit m = {0};
    for (int i = 0; i < 10000; i++)
        assert_int_equal(tm_limit_enter(&m, &off, 1, &retry), TM_LIMIT_OK);
}

static char g_path[] = "/tmp/tm_keys_test_XXXXXX";

static void write_keys(const char *text)
{
    FILE *f = fopen(g_path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static const char *hashed(const char *key)
{
    static char hex[4][65];
    static int next;
    uint8_t h[32];
    char *out = hex[next++ % 4];
    tm_sha256(key, strlen(key), h);
    tm_hex(h, 32, out);
    return out;
}

static void file(void **state)
{
    (void)state;
    char text[1000];
    tm_keys *k = NULL;
    tm_err err = TM_ERR_INIT;
    int fd = mkstemp(g_path);
    assert_true(fd >= 0);
    close(fd);
    snprintf(text, sizeof text, "# a comment\n\nalice:%s\r\nroot:%s:admin\nbob:%s:user",
             hashed("ka"), hashed("kr"), hashed("kb"));
    write_keys(text);
    assert_int_equal(tm_keys_create(&k, g_path, &err), TM_OK);
    assert_true(tm_keys_required(k));
    assert_int_equal(tm_keys_count(k), 3);
    assert_string_equal(tm_keys_find(k, "ka", 2)->name, "alice");
    assert_false(tm_keys_find(k, "ka", 2)->admin);
    assert_true(tm_keys_find(k, "kr", 2)->admin);
    assert_false(tm_keys_find(k, "kb", 2)->admin);
    assert_null(tm_keys_find(k, "kc", 2));
    assert_null(tm_keys_find(k, "", 0));
    assert_null(tm_keys_find(k, "ka ", 3));
    assert_null(tm_keys_find(k, hashed("ka"), 64)); /* the hash is not the key */

    /* Reload: a removed key goes, a replaced one keeps its owner and limits, a bad file changes nothing. */
    tm_key_owner *alice = tm_key_owner_acquire(tm_keys_find(k, "ka", 2));
    tm_key_owner *bob = tm_key_owner_acquire(tm_keys_find(k, "kb", 2));
    snprintf(text, sizeof text, "alice:%s\nalice:%s\n", hashed("new"), hashed("ka"));
    write_keys(text);
    assert_int_equal(tm_keys_reload(k, &err), TM_OK);
    assert_ptr_equal(tm_keys_find(k, "new", 3), alice);
    assert_ptr_equal(tm_keys_find(k, "ka", 2), alice);
    assert_null(tm_keys_find(k, "kb", 2));
    assert_string_equal(bob->name, "bob");
    write_keys("alice\n");
    assert_int_equal(tm_keys_reload(k, &err), TM_STATUS_CONFIG);
    assert_ptr_equal(tm_keys_find(k, "new", 3), alice);
    unlink(g_path);
    assert_int_equal(tm_keys_reload(k, &err), TM_STATUS_NOT_FOUND);
    assert_ptr_equal(tm_keys_find(k, "new", 3), alice);
    tm_key_owner_release(alice);
    tm_key_owner_release(bob);
    tm_keys_destroy(k);
}

static void bad_files(void **state)
{
    (void)state;
    char good[100], text[400];
    tm_keys *k = NULL;
    tm_err err = TM_ERR_INIT;
    snprintf(good, sizeof good, "%s", hashed("x"));
    static const char *const forms[] = {"%s\n",         ":%s\n",      "a b:%s\n",
                                        "a:%.63s\n",    "a:%s0\n",    "a:%s:\n",
                                        "a:%s:root\n",  "a:z%.63s\n", "a:%s:admin:x\n",
                                        "# only\n%.0s", "\xff:%s\n",  "a:%1$s\na:%1$s:admin\n"};
    for (size_t i = 0; i < TM_ARRAY_LEN(forms); i++) {
        /* The forms are a table of formats with one argument. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(text, sizeof text, forms[i], good);
#pragma GCC diagnostic pop
        write_keys(text);
        if (tm_keys_create(&k, g_path, &err) != TM_STATUS_CONFIG)
            fail_msg("accepted: %s", text);
        assert_null(strstr(err.msg, good)); /* no key material in messages */
    }
    unlink(g_path);
    assert_int_equal(tm_keys_create(&k, g_path, &err), TM_STATUS_NOT_FOUND);
    assert_null(k);
    assert_int_equal(tm_keys_create(&k, NULL, &err), TM_OK);
    assert_false(tm_keys_required(k));
    assert_string_equal(tm_keys_anonymous(k)->name, "anonymous");
    assert_int_equal(tm_keys_reload(k, &err), TM_OK);
    tm_keys_destroy(k);
    tm_keys_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rate),
        cmocka_unit_test(concurrency),
        cmocka_unit_test(file),
        cmocka_unit_test(bad_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
