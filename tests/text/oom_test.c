/* Memory that runs out: each operation is run again and again with the k-th allocation failing, for every k until
 * none fails. It must say so or succeed, never crash, and leak nothing (the sanitizer build looks). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "tests/text/parse_cases.h"
#include "text/detok.h"
#include "text/parse/parse.h"
#include "text/template.h"

#define CORPUS "tests/fuzz/corpus/tokenizer/"
#define DEMO   "models/demo-20m"

static long g_left = -1; /* allocations until one fails; -1 = none fails */
static bool g_failed;

static bool fails(void)
{
    if (g_left < 0 || g_left-- > 0)
        return false;
    g_left = -1;
    g_failed = true;
    return true;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
char *__real_strdup(const char *s);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
char *__wrap_strdup(const char *s);

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}

void *__wrap_realloc(void *p, size_t n)
{
    return fails() ? NULL : __real_realloc(p, n);
}

char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}

/* jansson allocates in its own library. */
static void *json_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}

/* run returns TM_OK or what went wrong. */
static void exhaust(const char *name, tm_status (*run)(void *ctx), void *ctx)
{
    long k = 0;
    for (;; k++) {
        g_failed = false;
        g_left = k;
        tm_status st = run(ctx);
        g_left = -1;
        if (!g_failed) {
            assert_int_equal(st, TM_OK);
            break;
        }
        /* A failure inside jansson may look like wrong data; a success must be a whole one. */
        if (st != TM_OK && st != TM_STATUS_NO_MEMORY && st != TM_STATUS_DATA &&
            st != TM_STATUS_INVALID && st != TM_STATUS_TOO_LARGE)
            fail_msg("%s, allocation %ld: %s", name, k, tm_status_name(st));
        assert_true(k < 200000);
    }
    print_message("%s: %ld allocations\n", name, k);
}

typedef struct job {
    tm_text_file files[2];
    int count;
    tm_tokenizer *t;
    tm_template *tpl;
    json_t *messages;
    const parse_case *row;
} job;

static tm_status load_tokenizer(void *ctx)
{
    job *j = ctx;
    tm_tokenizer *t = NULL;
    tm_status st = tm_tokenizer_create(&t, j->files, j->count, NULL);
    assert_true((st == TM_OK) == (t != NULL));
    tm_tokenizer_destroy(t);
    return st;
}

static tm_status encode_decode(void *ctx)
{
    job *j = ctx;
    static char text[3000] = "The quick  brown fox, 12345!\n\xC3\xA9\xE4\xB8\xAD<|im_end|> ";
    if (!text[2998]) { /* one long word */
        size_t n = strlen(text);
        memset(text + n, 'a', sizeof(text) - 1 - n);
    }
    int32_t *ids = NULL;
    size_t n, len;
    char *back = NULL;
    TM_TRY(tm_tokenizer_encode(j->t, text, strlen(text), NULL, &ids, &n, NULL));
    tm_status st = tm_tokenizer_decode(j->t, ids, n, false, &back, &len, NULL);
    if (st == TM_OK && len == strlen(text))
        assert_memory_equal(back, text, len);
    free(back);
    tm_detok *d = NULL;
    const char *stops[] = {"xyz", "END"};
    const tm_detok_opts opts = {.stops = stops, .stop_count = 2};
    if (st == TM_OK && (st = tm_detok_create(&d, j->t, &opts, NULL)) == TM_OK) {
        tm_buf b;
        tm_buf_init(&b, 0);
        for (size_t i = 0; i < n; i++)
            tm_detok_push(d, ids[i], &b);
        tm_detok_finish(d, &b);
        tm_buf_deinit(&b);
        tm_detok_destroy(d);
    }
    free(ids);
    return st;
}

static tm_status make_template(void *ctx)
{
    job *j = ctx;
    tm_template *t = NULL;
    tm_status st = tm_template_create(&t, j->files, j->count, NULL, j->t, NULL);
    assert_true((st == TM_OK) == (t != NULL));
    tm_template_destroy(t);
    return st;
}

static tm_status render(void *ctx)
{
    job *j = ctx;
    for (int i = 0; i < 2; i++) {
        const tm_render_args a = {.messages = j->messages,
                                  .add_generation_prompt = i == 0,
                                  .continue_final_message = i == 1};
        tm_rendered r = {.input_count = 0};
        TM_TRY(tm_template_render(j->tpl, &a, &r, NULL));
        tm_rendered_deinit(&r);
    }
    return TM_OK;
}

static void no_event(void *user, const tm_parse_event *e)
{
    (void)user;
    (void)e;
}

static tm_status parse(void *ctx)
{
    const job *j = ctx;
    tm_parse *p;
    const tm_parse_opts o = {.tools = tm_tool_parser_find(j->row->tools), .functions = j->messages};
    TM_TRY(tm_parse_create(&p, &o, no_event, NULL, NULL));
    tm_parse_push(p, j->row->text, strlen(j->row->text));
    tm_parse_finish(p, false);
    tm_status st = tm_parse_failed(p) ? TM_STATUS_NO_MEMORY : TM_OK;
    tm_parse_destroy(p);
    return st;
}

static void test_parsing(void **state)
{
    (void)state;
    job j = {.count = 0};
    assert_int_equal(tm_json_parse(PARSE_FUNCTIONS, strlen(PARSE_FUNCTIONS), &j.messages, NULL),
                     TM_OK);
    for (size_t i = 0; i < TM_ARRAY_LEN(parse_cases); i++) {
        j.row = &parse_cases[i];
        if (j.row->tools)
            exhaust(j.row->tools, parse, &j);
    }
    json_decref(j.messages);
}

static void test_loading(void **state)
{
    (void)state;
    static const struct {
        const char *seed, *file;
    } rows[] = {{"bpe", "tokenizer.json"},     {"fallback", "tokenizer.json"},
                {"split", "tokenizer.json"},   {"unigram", "tokenizer.json"},
                {"sp_bpe", "tokenizer.model"}, {"sp_unigram", "tokenizer.model"},
                {"tekken", "tekken.json"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        char path[200], *data;
        size_t len;
        snprintf(path, sizeof(path), CORPUS "%s", rows[i].seed);
        assert_int_equal(tm_file_read(path, 1 << 20, &data, &len, NULL), TM_OK);
        const char *part = memmem(data, len, "~~~~", 4);
        job j = {.count = 1};
        j.files[0] =
            (tm_text_file){rows[i].file, data + 1, part ? (size_t)(part - data) - 1 : len - 1};
        exhaust(rows[i].seed, load_tokenizer, &j);
        free(data);
    }
}

static void test_using(void **state)
{
    (void)state;
    static const char jinja[] =
        "{% for m in messages %}{{ m.role ~ ':' ~ m.content | trim | upper }}{{ m | tojson }}"
        "{% set x = namespace(n=[1, 2]) %}{{ x.n | join(',') }}{% endfor %}{{ '%s' % 1 }}";
    job j = {.files = {{"chat_template.jinja", jinja, strlen(jinja)}}, .count = 1};
    assert_int_equal(tm_tokenizer_load(&j.t, DEMO, NULL), TM_OK);
    j.messages = json_pack("[{s:s, s:s}, {s:s, s:s}]", "role", "user", "content", "hello", "role",
                           "assistant", "content", "ho ");
    exhaust("encode and decode", encode_decode, &j);
    exhaust("template", make_template, &j);
    static const char plain[] = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}";
    j.files[0] = (tm_text_file){"chat_template.jinja", plain, strlen(plain)};
    assert_int_equal(tm_template_create(&j.tpl, j.files, 1, NULL, j.t, NULL), TM_OK);
    exhaust("render", render, &j);
    tm_template_destroy(j.tpl);
    assert_int_equal(tm_template_create(&j.tpl, NULL, 0, "qwen", j.t, NULL), TM_OK);
    exhaust("format", render, &j);
    tm_template_destroy(j.tpl);
    json_decref(j.messages);
    tm_tokenizer_destroy(j.t);
}

int main(void)
{
    json_set_alloc_funcs(json_malloc, free);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loading),
        cmocka_unit_test(test_using),
        cmocka_unit_test(test_parsing),
    };
    return cmocka_run_group_tests_name("oom", tests, NULL, NULL);
}
