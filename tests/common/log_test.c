/* Log lines, read back through a pipe in place of stderr. */
#include "tests/common/test.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/json.h"
#include "common/log.h"

static int g_saved, g_read;
static char g_text[1 << 20];

static void capture_begin(void)
{
    char name[] = "/tmp/tm_log_test_XXXXXX";
    g_read = mkstemp(name);
    assert_true(g_read >= 0);
    unlink(name);
    fflush(stderr);
    g_saved = dup(STDERR_FILENO);
    dup2(g_read, STDERR_FILENO);
}

static size_t capture_end(void)
{
    dup2(g_saved, STDERR_FILENO);
    close(g_saved);
    lseek(g_read, 0, SEEK_SET);
    size_t len = 0;
    for (ssize_t n; (n = read(g_read, g_text + len, sizeof g_text - 1 - len)) > 0;)
        len += (size_t)n;
    close(g_read);
    g_text[len] = '\0';
    return len;
}

static json_t *parse_line(const char *line)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(line, strlen(line), &v, &err) != TM_OK)
        fail_msg("%s: %s", err.msg, line);
    return v;
}

static const char *str(const json_t *o, const char *key)
{
    return json_string_value(json_object_get(o, key));
}

static void json_lines(void **state)
{
    (void)state;
    tm_log_init("prog", TM_LOG_INFO, TM_LOG_JSON);
    const tm_log_field fields[] = {TM_LOG_F_STR("id", "a \"b\"\n\x1b[31m\xff"),
                                   TM_LOG_F_STR("none", NULL),
                                   TM_LOG_F_INT("n", -5),
                                   TM_LOG_F_NUM("ms", 1.25),
                                   {NULL, TM_LOG_STR, NULL, 0, 0},
                                   TM_LOG_F_INT("after", 1)};
    capture_begin();
    tm_log(TM_LOG_DEBUG, "hidden", "x");
    tm_log_fields(TM_LOG_WARN, "request", fields, TM_ARRAY_LEN(fields));
    capture_end();
    assert_int_equal(strcspn(g_text, "\n"), strlen(g_text) - 1); /* one line */
    json_t *o = parse_line(g_text);
    assert_string_equal(str(o, "program"), "prog");
    assert_string_equal(str(o, "level"), "warn");
    assert_string_equal(str(o, "event"), "request");
    assert_string_equal(str(o, "id"), "a \"b\"\n\x1b[31m\xef\xbf\xbd");
    assert_true(json_is_null(json_object_get(o, "none")));
    assert_int_equal(json_integer_value(json_object_get(o, "n")), -5);
    assert_true(json_real_value(json_object_get(o, "ms")) == 1.25);
    assert_null(json_object_get(o, "after"));
    assert_int_equal(strlen(str(o, "ts")), strlen("2026-01-01T00:00:00.000Z"));
    json_decref(o);
    assert_null(strchr(g_text, '\x1b'));
}

static void text_lines(void **state)
{
    (void)state;
    tm_log_init("prog", TM_LOG_DEBUG, TM_LOG_TEXT);
    const tm_log_field fields[] = {TM_LOG_F_STR("a", "plain"), TM_LOG_F_STR("b", "two words"),
                                   TM_LOG_F_STR("c", "")};
    capture_begin();
    tm_log(TM_LOG_DEBUG, "event", "hello %d\nworld", 7);
    tm_log_fields(TM_LOG_ERROR, "event2", fields, 3);
    capture_end();
    assert_non_null(strstr(g_text, "debug prog event: hello 7\\u000aworld\n"));
    assert_non_null(strstr(g_text, "error prog event2 a=plain b=\"two words\" c=\"\"\n"));
}

static void long_lines_are_cut_and_whole(void **state)
{
    (void)state;
    static char big[20000];
    tm_log_init("prog", TM_LOG_INFO, TM_LOG_JSON);
    for (size_t n = 7900; n < 8300; n++) {
        memset(big, n % 2 ? 'x' : '\n', n);
        big[n] = '\0';
        const tm_log_field fields[] = {TM_LOG_F_STR("big", big), TM_LOG_F_INT("n", 1234567890),
                                       TM_LOG_F_STR("tail", "quite a long text at the end")};
        capture_begin();
        tm_log_fields(TM_LOG_INFO, "e", fields, 3);
        size_t len = capture_end();
        assert_true(len <= 8192);
        assert_int_equal(g_text[len - 1], '\n');
        json_decref(parse_line(g_text));
    }
    capture_begin();
    tm_log(TM_LOG_INFO, "e", "%s", big);
    capture_end();
    json_decref(parse_line(g_text));
}

static void *many_lines(void *arg)
{
    for (int i = 0; i < 500; i++)
        tm_log(TM_LOG_INFO, "thread", "%d line %d", *(int *)arg, i);
    return NULL;
}

static void threads_do_not_mix(void **state)
{
    (void)state;
    tm_log_init("prog", TM_LOG_INFO, TM_LOG_JSON);
    pthread_t t[4];
    int id[4] = {0, 1, 2, 3};
    capture_begin();
    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, many_lines, &id[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    capture_end();
    int lines = 0;
    for (char *save, *l = strtok_r(g_text, "\n", &save); l; l = strtok_r(NULL, "\n", &save)) {
        json_decref(parse_line(l));
        lines++;
    }
    assert_int_equal(lines, 2000);
}

static void levels(void **state)
{
    (void)state;
    tm_log_level l = TM_LOG_TRACE;
    assert_true(tm_log_level_parse("WARN", &l));
    assert_int_equal(l, TM_LOG_WARN);
    assert_false(tm_log_level_parse("loud", &l));
    assert_int_equal(l, TM_LOG_WARN);
    tm_log_init("p", TM_LOG_WARN, TM_LOG_JSON);
    assert_false(tm_log_enabled(TM_LOG_INFO));
    assert_true(tm_log_enabled(TM_LOG_WARN));
    assert_true(tm_log_enabled(TM_LOG_ERROR));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_lines),
        cmocka_unit_test(text_lines),
        cmocka_unit_test(long_lines_are_cut_and_whole),
        cmocka_unit_test(threads_do_not_mix),
        cmocka_unit_test(levels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
