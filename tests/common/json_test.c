/* Reading JSON: JSONTestSuite (when the full test data is there), own strictness rows, getters. */
#include "tests/common/test.h"

#include <dirent.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"

static bool parses(const char *text, size_t len)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_json_parse(text, len, &v, &err);
    if (st == TM_OK) {
        assert_non_null(v);
        json_decref(v);
        return true;
    }
    assert_int_equal(st, TM_STATUS_INVALID);
    assert_null(v);
    assert_true(strlen(err.msg) > 10);
    return false;
}

/* jansson keeps object keys as C strings: a NUL in a key cannot be held and is refused. */
static bool known_gap(const char *name)
{
    return strcmp(name, "y_object_escaped_null_in_key.json") == 0;
}

static void test_suite(void **state)
{
    (void)state;
    const char *shared = getenv("TM_SHARED");
    char dir[500], path[800];
    snprintf(dir, sizeof dir, "%s/testdata/jsontestsuite/test_parsing", shared ? shared : "");
    DIR *d = shared ? opendir(dir) : NULL;
    if (!d) {
        print_message("JSONTestSuite is not here: skipped\n");
        skip();
    }
    int yes = 0, no = 0, wrong = 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name + 1, "_", 1) != 0)
            continue;
        char *data;
        size_t len;
        assert_true(tm_path_join(path, sizeof path, dir, e->d_name));
        assert_int_equal(tm_file_read(path, 10000000, &data, &len, NULL), TM_OK);
        /* An exact copy: reading past the end is then seen by the sanitizer. */
        char *exact = malloc(len ? len : 1);
        memcpy(exact, data, len);
        bool ok = parses(exact, len);
        free(exact);
        free(data);
        yes += e->d_name[0] == 'y';
        no += e->d_name[0] == 'n';
        if ((e->d_name[0] == 'y' && !ok && !known_gap(e->d_name)) || (e->d_name[0] == 'n' && ok)) {
            print_message("%s: %s\n", e->d_name, ok ? "accepted" : "refused");
            wrong++;
        }
    }
    closedir(d);
    assert_int_equal(yes, 95);
    assert_int_equal(no, 188);
    assert_int_equal(wrong, 0);
}

static void strictness(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool ok;
    } rows[] = {
        {"null", true},
        {"\"a\"", true},
        {"-0", true},
        {"1e308", true},
        {"1e400", false},
        {"-1e999", false},
        {"NaN", false},
        {"Infinity", false},
        {"9223372036854775807", true},
        {"9223372036854775808", false},
        {"-9223372036854775808", true},
        {"01", false},
        {"1.", false},
        {".5", false},
        {"+1", false},
        {"{} x", false},
        {"{}{}", false},
        {"", false},
        {" ", false},
        {"[1,]", false},
        {"{\"a\":1,}", false},
        {"'a'", false},
        {"\xef\xbb\xbf{}", false},
        {"\"\xff\"", false},
        {"\"\xc0\x80\"", false},
        {"\"\\ud800\"", false},
        {"\"\\u0000\"", true},
        {"\"a\nb\"", false},
        {"// c\n1", false},
        {"\"\xed\xa0\x80\"", false},
        {"tru", false},
        {"nul", false},
        {"[", false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        bool ok = parses(rows[i].text, strlen(rows[i].text));
        if (ok != rows[i].ok)
            print_message("%s\n", rows[i].text);
        assert_int_equal(ok, rows[i].ok);
    }
    assert_false(parses("1\0", 2));
    assert_false(parses("\0", 1));
}

static void depth(void **state)
{
    (void)state;
    static const char *const shapes[][2] = {{"[", "]"}, {"{\"a\":", "}"}};
    for (int kind = 0; kind < 2; kind++) {
        for (int n = 63; n <= 66; n++) {
            tm_buf b;
            tm_buf_init(&b, 0);
            for (int i = 0; i < n; i++)
                tm_buf_puts(&b, shapes[kind][0]);
            tm_buf_puts(&b, "1");
            for (int i = 0; i < n; i++)
                tm_buf_puts(&b, shapes[kind][1]);
            assert_int_equal(parses(b.data, b.len), n <= 64);
            tm_buf_deinit(&b);
        }
    }
    /* Brackets in strings do not count; 100,000 real ones are refused at once. */
    char *big = malloc(100002);
    memset(big, '[', 100000);
    assert_false(parses(big, 100000));
    memmove(big + 1, big, 100000);
    big[0] = big[100001] = '"';
    assert_true(parses(big, 100002));
    free(big);
    assert_true(parses("[\"\\\"[[[[[\"]", 11));
}

static void last_of_duplicates_wins(void **state)
{
    (void)state;
    json_t *v;
    int64_t i = 0;
    assert_int_equal(tm_json_parse("{\"a\":1,\"a\":2}", 13, &v, NULL), TM_OK);
    assert_int_equal(tm_json_int(v, "a", 0, 9, &i, NULL), TM_OK);
    assert_int_equal(i, 2);
    json_decref(v);
}

/* Released tokenizer configs say 10^30 for "no limit". */
static void long_integers_of_files(void **state)
{
    (void)state;
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    const char *numbers = "{\"model_max_length\": 1000000000000000019884624838656, \"f\": "
                          "0.12345678901234567890123, \"s\": \"\\\"12345678901234567890\", "
                          "\"n\": [-12345678901234567890, 12, 1e3]}";
    char path[] = "/tmp/tm-json-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0 && write(fd, numbers, strlen(numbers)) == (ssize_t)strlen(numbers));
    close(fd);
    assert_int_equal(tm_json_load_file(path, 100000, &v, &err), TM_OK);
    assert_true(json_real_value(json_object_get(v, "model_max_length")) > 1e29);
    assert_true(json_real_value(json_object_get(v, "f")) < 0.124);
    assert_string_equal(json_string_value(json_object_get(v, "s")), "\"12345678901234567890");
    assert_int_equal(json_integer_value(json_array_get(json_object_get(v, "n"), 1)), 12);
    json_decref(v);
    unlink(path);
}

static void messages_do_not_quote(void **state)
{
    (void)state;
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    const char *text = "{\"prompt\": \"my secret\", secret}";
    assert_int_equal(tm_json_parse(text, strlen(text), &v, &err), TM_STATUS_INVALID);
    assert_null(strstr(err.msg, "secret"));
    assert_non_null(strstr(err.msg, "line 1"));
    assert_int_equal(tm_json_load_file("/nowhere.json", 10, &v, &err), TM_STATUS_NOT_FOUND);
    assert_int_equal(tm_json_load_file("CMakeLists.txt", 100000, &v, &err), TM_STATUS_DATA);
    assert_memory_equal(err.msg, "CMakeLists.txt: ", 16);
}

static json_t *parse(const char *text)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(text, strlen(text), &v, &err) != TM_OK)
        fail_msg("%s: %s", text, err.msg);
    return v;
}

static void integers(void **state)
{
    (void)state;
    json_t *o =
        parse("{\"i\":5,\"r\":6.0,\"f\":6.5,\"s\":\"5\",\"n\":null,\"b\":true,\"big\":1e300,"
              "\"two63\":9223372036854775808.0,\"min\":-9223372036854775808.0}");
    tm_err err = TM_ERR_INIT;
    int64_t v = 42;
    assert_int_equal(tm_json_int(o, "absent", 0, 10, &v, &err), TM_OK);
    assert_int_equal(tm_json_int(o, "n", 0, 10, &v, &err), TM_OK);
    assert_int_equal(v, 42);
    assert_int_equal(tm_json_int(o, "i", 5, 5, &v, &err), TM_OK);
    assert_int_equal(v, 5);
    assert_int_equal(tm_json_int(o, "r", 0, 10, &v, &err), TM_OK);
    assert_int_equal(v, 6);
    assert_int_equal(tm_json_int(o, "i", 6, 10, &v, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "i: expected an integer in [6, 10], got 5");
    assert_int_equal(tm_json_int(o, "i", INT64_MIN, 4, &v, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "i: expected an integer <= 4, got 5");
    assert_int_equal(tm_json_int(o, "s", 1, INT64_MAX, &v, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "s: expected an integer >= 1, got a string");
    static const char *const bad[] = {"f", "b", "big", "two63"};
    for (size_t i = 0; i < TM_ARRAY_LEN(bad); i++)
        assert_int_equal(tm_json_int(o, bad[i], INT64_MIN, INT64_MAX, &v, &err), TM_STATUS_INVALID);
    assert_int_equal(v, 6);
    assert_int_equal(tm_json_int(o, "min", INT64_MIN, INT64_MAX, &v, &err), TM_OK);
    assert_true(v == INT64_MIN);
    json_decref(o);
}

static void other_getters(void **state)
{
    (void)state;
    json_t *o = parse("{\"i\":5,\"f\":6.5,\"s\":\"x\",\"z\":\"a\\u0000b\",\"b\":false,\"n\":null}");
    tm_err err = TM_ERR_INIT;
    double d = 1;
    assert_int_equal(tm_json_num(o, "n", 0, 1, &d, &err), TM_OK);
    assert_int_equal(tm_json_num(o, "i", 0, 5, &d, &err), TM_OK);
    assert_true(d == 5);
    assert_int_equal(tm_json_num(o, "f", -INFINITY, INFINITY, &d, &err), TM_OK);
    assert_true(d == 6.5);
    assert_int_equal(tm_json_num(o, "f", 0, 2, &d, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "f: expected a number in [0, 2], got 6.5");
    assert_int_equal(tm_json_num(o, "f", 7, INFINITY, &d, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "f: expected a number >= 7, got 6.5");
    assert_int_equal(tm_json_num(o, "b", 0, 1, &d, &err), TM_STATUS_INVALID);
    assert_true(d == 6.5);

    bool b = true;
    assert_int_equal(tm_json_bool(o, "absent", &b, &err), TM_OK);
    assert_true(b);
    assert_int_equal(tm_json_bool(o, "b", &b, &err), TM_OK);
    assert_false(b);
    assert_int_equal(tm_json_bool(o, "i", &b, &err), TM_STATUS_INVALID);
    assert_string_equal(err.msg, "i: expected a boolean, got an integer");

    const char *s = "def";
    assert_int_equal(tm_json_str(o, "n", &s, &err), TM_OK);
    assert_string_equal(s, "def");
    assert_int_equal(tm_json_str(o, "s", &s, &err), TM_OK);
    assert_string_equal(s, "x");
    assert_int_equal(tm_json_str(o, "i", &s, &err), TM_STATUS_INVALID);
    assert_int_equal(tm_json_str(o, "z", &s, &err), TM_STATUS_INVALID);
    assert_string_equal(s, "x");

    assert_null(tm_json_get(o, "n"));
    assert_null(tm_json_get(o, "absent"));
    assert_null(tm_json_get(NULL, "x"));
    assert_non_null(tm_json_get(o, "b"));
    assert_string_equal(tm_json_type_name(NULL), "nothing");
    assert_string_equal(tm_json_type_name(o), "an object");
    json_decref(o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_suite),
        cmocka_unit_test(strictness),
        cmocka_unit_test(depth),
        cmocka_unit_test(last_of_duplicates_wins),
        cmocka_unit_test(integers),
        cmocka_unit_test(long_integers_of_files),
        cmocka_unit_test(messages_do_not_quote),
        cmocka_unit_test(other_getters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
