/* The interpreter against recorded renders of real templates: every text, every refusal. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "text/jinja/jinja.h"

#define VARS_MAX 32

typedef struct tally {
    int texts, texts_right, errors, errors_right, shown, inexact;
} tally;

/* The case files hold integers beyond 64 bits: those values are cut out as text first, because the tree of the
 * test's own JSON reader cannot hold them. */
#define BIG       "12345678901234567890"
#define BIG_PLACE "\"@big@\""

static char *hide_big(const char *s, size_t *len)
{
    tm_buf b;
    bool in_string = false;
    tm_buf_init(&b, 0);
    while (*s) {
        if (!in_string && strncmp(s, BIG, strlen(BIG)) == 0) {
            tm_buf_puts(&b, BIG_PLACE);
            s += strlen(BIG);
            continue;
        }
        in_string ^= *s == '"';
        if (*s == '\\')
            tm_buf_putc(&b, *s++);
        tm_buf_putc(&b, *s++);
    }
    return tm_buf_steal(&b, len);
}

/* The value as JSON text with the integers put back. */
static char *show_big(const json_t *v, size_t *len)
{
    char *s = json_dumps(v, JSON_ENCODE_ANY | JSON_REAL_PRECISION(17)), *at = s;
    tm_buf b;
    tm_buf_init(&b, 0);
    for (char *hit; (hit = strstr(at, BIG_PLACE)); at = hit + strlen(BIG_PLACE)) {
        tm_buf_append(&b, at, (size_t)(hit - at));
        tm_buf_puts(&b, BIG);
    }
    tm_buf_puts(&b, at);
    free(s);
    return tm_buf_steal(&b, len);
}

static void add_vars(tm_jinja_var *vars, int *n, json_t *obj, bool trusted)
{
    const char *key;
    json_t *v;
    json_object_foreach(obj, key, v)
    {
        assert_true(*n < VARS_MAX);
        tm_jinja_var var = {.name = key, .trusted = trusted};
        size_t len;
        char *text = show_big(v, &len);
        var.json = text;
        var.json_len = len;
        vars[(*n)++] = var;
    }
}

static void parse_now(const char *s, struct tm *now)
{
    memset(now, 0, sizeof(*now));
    assert_non_null(strptime(s, "%Y-%m-%dT%H:%M:%S", now));
    now->tm_isdst = -1;
    mktime(now);
}

static tm_status render(const tm_jinja *t, json_t *file, json_t *input, tm_buf *text, tm_err *err)
{
    tm_jinja_var vars[VARS_MAX] = {{.name = "tools"},
                                   {.name = "documents"},
                                   {.name = "messages"},
                                   {.name = "add_generation_prompt"}};
    int n = 2, first;
    struct tm now;
    parse_now(json_string_value(json_object_get(file, "now")), &now);
    first = n;
    json_t *plain = json_copy(input);
    json_object_del(plain, "kwargs");
    json_object_del(plain, "continue_final_message");
    add_vars(vars, &n, plain, false);
    add_vars(vars, &n, json_object_get(file, "special_tokens"), true);
    add_vars(vars, &n, json_object_get(input, "kwargs"), false);
    tm_jinja_args args = {.vars = vars, .count = n, .now = &now, .input_bytes = 1 << 16};
    tm_text_span *marks = NULL;
    size_t mark_n = 0;
    tm_status st = tm_jinja_render(t, &args, text, &marks, &mark_n, err);
    for (size_t i = 0; i < mark_n; i++)
        assert_true(marks[i].begin < marks[i].end && marks[i].end <= text->len);
    free(marks);
    for (int i = first; i < n; i++)
        free((char *)(uintptr_t)vars[i].json);
    json_decref(plain);
    return st;
}

static void show(tally *y, const char *name, const json_t *c, const char *want, const char *got)
{
    if (y->shown++ >= 20)
        return;
    size_t i = 0;
    while (want[i] && want[i] == got[i])
        i++;
    i = i > 40 ? i - 40 : 0;
    print_error("%s / %s:\n  want ...%.160s\n  got  ...%.160s\n", name,
                json_string_value(json_object_get(c, "name")), want + i, got + i);
}

static void run_case(tally *y, const char *name, const tm_jinja *t, json_t *file, json_t *c)
{
    json_t *expect = json_object_get(c, "expect"), *input = json_object_get(c, "input");
    const json_t *error = json_object_get(expect, "error"), *want = json_object_get(expect, "text");
    const char *kind = json_string_value(json_object_get(error, "kind"));
    /* Continuing a message is the business of template.c. */
    if (json_is_true(json_object_get(input, "continue_final_message")))
        return;
    tm_buf text;
    tm_err err = TM_ERR_INIT;
    tm_buf_init(&text, 0);
    tm_status st = render(t, file, input, &text, &err);
    if (error) {
        const char *msg = json_string_value(json_object_get(error, "message"));
        bool right = st == TM_STATUS_INVALID &&
                     (strcmp(kind, "raise_exception") != 0 || strcmp(err.msg, msg) == 0);
        y->errors++;
        y->errors_right += right;
        y->inexact += right && !strstr(err.msg, msg);
        if (!right)
            show(y, name, c, msg, st == TM_OK ? text.data : err.msg);
    } else {
        const char *got = st == TM_OK ? (text.data ? text.data : "") : err.msg;
        bool right = st == TM_OK && json_string_length(want) == text.len &&
                     memcmp(json_string_value(want), got, text.len) == 0;
        y->texts++;
        y->texts_right += right;
        if (!right)
            show(y, name, c, json_string_value(want), got);
    }
    tm_buf_deinit(&text);
}

static void run_file(tally *y, const char *dir, const char *name)
{
    char path[1400], *source, *raw, *data;
    size_t source_len, raw_len, len;
    tm_err err = TM_ERR_INIT;
    snprintf(path, sizeof(path), "%s/%s.cases.json", dir, name);
    assert_int_equal(tm_file_read(path, 1 << 24, &raw, &raw_len, &err), TM_OK);
    data = hide_big(raw, &len);
    json_t *file = NULL, *c;
    if (tm_json_parse(data, len, &file, &err) != TM_OK)
        fail_msg("%s: %s", path, err.msg);
    snprintf(path, sizeof(path), "%s/%s.jinja", dir, name);
    assert_int_equal(tm_file_read(path, 1 << 20, &source, &source_len, &err), TM_OK);
    tm_jinja *t = NULL;
    if (tm_jinja_compile(&t, source, source_len, &err) != TM_OK)
        fail_msg("%s: %s", path, err.msg);
    size_t i;
    json_array_foreach(json_object_get(file, "cases"), i, c) run_case(y, name, t, file, c);
    tm_jinja_destroy(t);
    json_decref(file);
    free(raw);
    free(data);
    free(source);
}

static void test_recorded(void **state)
{
    (void)state;
    const char *shared = getenv("TM_SHARED"), *only = getenv("TM_TEMPLATE");
    char dir[1024];
    snprintf(dir, sizeof(dir), "%s/testdata/chat_templates", shared ? shared : "");
    DIR *d = shared ? opendir(dir) : NULL;
    if (!d) {
        print_message("TM_SHARED has no testdata/chat_templates: skipped\n");
        skip();
    }
    tally y = {0};
    struct dirent *e;
    int files = 0;
    while ((e = readdir(d))) {
        char name[300];
        size_t n = strlen(e->d_name);
        if (n < 7 || n >= sizeof(name) || strcmp(e->d_name + n - 6, ".jinja") != 0)
            continue;
        snprintf(name, sizeof(name), "%.*s", (int)n - 6, e->d_name);
        if (only && strcmp(only, name) != 0)
            continue;
        run_file(&y, dir, name);
        files++;
    }
    closedir(d);
    print_message("%d templates: %d of %d renders, %d of %d errors (%d with other words)\n", files,
                  y.texts_right, y.texts, y.errors_right, y.errors, y.inexact);
    assert_int_equal(y.texts_right, y.texts);
    assert_int_equal(y.errors_right, y.errors);
    assert_true(only || files > 70);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_recorded)};
    return cmocka_run_group_tests_name("jinja_cases", tests, NULL, NULL);
}
