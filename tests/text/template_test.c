/* Chat templates as callers use them: the recorded conversations of real templates, the embedded model, the
 * places a template is looked for, marks on what came from the request, and the bounds of the sandbox. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "text/template.h"

#define DEMO "models/demo-20m"

/* The smallest tokenizer: bytes a and b, two special tokens. */
#define TINY_JSON                                                                                  \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"<s>\":2,\"</"                       \
    "s>\":3},\"merges\":[]},"                                                                      \
    "\"added_tokens\":[{\"id\":2,\"content\":\"<s>\",\"special\":true},"                           \
    "{\"id\":3,\"content\":\"</s>\",\"special\":true}],\"pre_tokenizer\":"                         \
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true},"                      \
    "\"decoder\":{\"type\":\"ByteLevel\"},\"post_processor\":{\"type\":\"TemplateProcessing\","    \
    "\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},"                               \
    "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[],"                                    \
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[2],\"tokens\":[\"<s>\"]}}}}"

typedef struct model {
    tm_text_file files[4];
    int count;
    tm_tokenizer *tok;
    tm_template *tpl;
    tm_err err;
    tm_status st;
} model;

static void add_file(model *m, const char *name, const char *data)
{
    if (data)
        m->files[m->count++] = (tm_text_file){name, data, strlen(data)};
}

/* config: tokenizer_config.json; jinja: chat_template.jinja; each may be NULL. */
static model make(const char *config, const char *jinja, const char *override)
{
    model m = {.count = 0, .err = TM_ERR_INIT};
    add_file(&m, "tokenizer.json", TINY_JSON);
    add_file(&m, "tokenizer_config.json", config);
    add_file(&m, "chat_template.jinja", jinja);
    if (tm_tokenizer_create(&m.tok, m.files, m.count, &m.err) != TM_OK)
        fail_msg("%s", m.err.msg);
    m.st = tm_template_create(&m.tpl, m.files, m.count, override, m.tok, &m.err);
    return m;
}

static void drop(model *m)
{
    tm_template_destroy(m->tpl);
    tm_tokenizer_destroy(m->tok);
}

static json_t *parse(const char *text)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(text, strlen(text), &v, &err) != TM_OK)
        fail_msg("%s: %s", text, err.msg);
    return v;
}

/* The rendering with every stretch of input between [ and ]; a failure gives its message. */
static char *shown(const tm_template *t, const tm_render_args *a)
{
    tm_rendered r = {.input_count = 0};
    tm_err err = TM_ERR_INIT;
    tm_buf b;
    tm_buf_init(&b, 0);
    size_t at = 0;
    if (tm_template_render(t, a, &r, &err) != TM_OK) {
        tm_buf_printf(&b, "error: %s", err.msg);
        return tm_buf_steal(&b, &at);
    }
    tm_buf_puts(&b, "");
    for (size_t i = 0; i < r.input_count; i++) {
        assert_true(r.input[i].begin >= at && r.input[i].begin < r.input[i].end);
        assert_true(r.input[i].end <= r.text.len);
        tm_buf_append(&b, r.text.data + at, r.input[i].begin - at);
        tm_buf_putc(&b, '[');
        at = r.input[i].end;
        tm_buf_append(&b, r.text.data + r.input[i].begin, at - r.input[i].begin);
        tm_buf_putc(&b, ']');
    }
    tm_buf_append(&b, r.text.data + at, r.text.len - at);
    tm_rendered_deinit(&r);
    return tm_buf_steal(&b, &at);
}

/* flags: g = generation prompt, c = continue. */
static void expect(const model *m, const char *messages, const char *flags, const char *want)
{
    if (m->st != TM_OK)
        fail_msg("%s", m->err.msg);
    json_t *list = parse(messages);
    const tm_render_args a = {.messages = list,
                              .add_generation_prompt = strchr(flags, 'g') != NULL,
                              .continue_final_message = strchr(flags, 'c') != NULL};
    char *got = shown(m->tpl, &a);
    assert_string_equal(got, want);
    free(got);
    json_decref(list);
}

/* ---- recorded conversations ----------------------------------------------------------------------------- */

typedef struct tally {
    int texts, errors, wrong, big;
} tally;

static char *read_file(const char *path, size_t *len)
{
    char *data;
    tm_err err = TM_ERR_INIT;
    if (tm_file_read(path, 1 << 24, &data, len, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return data;
}

/* Requests are read by jansson, which refuses integers beyond 64 bits: cases with them are for the
 * interpreter's own test. They get a number of the same width that can be found again. */
#define BIG  "12345678901234567890"
#define MARK "8888888888888888888"

static void hide_big(char *data)
{
    for (char *at = data; (at = strstr(at, BIG)) != NULL;)
        memcpy(at, MARK " ", strlen(BIG));
}

static bool has_big(const json_t *c)
{
    char *s = json_dumps(c, JSON_ENCODE_ANY);
    bool has = strstr(s, MARK) != NULL;
    free(s);
    return has;
}

static void run_case(tally *y, const char *name, const tm_template *t, const struct tm *now,
                     const json_t *c)
{
    const json_t *in = json_object_get(c, "input"), *expected = json_object_get(c, "expect");
    const json_t *want = json_object_get(expected, "text");
    json_t *kwargs =
        json_object_get(in, "kwargs") ? json_copy(json_object_get(in, "kwargs")) : json_object();
    if (json_object_get(in, "documents"))
        json_object_set(kwargs, "documents", json_object_get(in, "documents"));
    const tm_render_args a = {
        .messages = json_object_get(in, "messages"),
        .tools = json_object_get(in, "tools"),
        .kwargs = kwargs,
        .add_generation_prompt = json_is_true(json_object_get(in, "add_generation_prompt")),
        .continue_final_message = json_is_true(json_object_get(in, "continue_final_message")),
        .now = now};
    tm_rendered r = {.input_count = 0};
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_template_render(t, &a, &r, &err);
    bool right;
    if (want) {
        y->texts++;
        right = st == TM_OK && r.text.len == json_string_length(want) &&
                memcmp(r.text.data ? r.text.data : "", json_string_value(want), r.text.len) == 0;
    } else {
        const json_t *error = json_object_get(expected, "error");
        const char *kind = json_string_value(json_object_get(error, "kind"));
        const char *msg = json_string_value(json_object_get(error, "message"));
        bool exact = strcmp(kind, "raise_exception") == 0;
        y->errors++;
        right = st == TM_STATUS_INVALID && (!exact || strcmp(err.msg, msg) == 0);
    }
    if (!right && y->wrong++ < 10)
        print_error("%s / %s: %s\n", name, json_string_value(json_object_get(c, "name")),
                    st == TM_OK ? r.text.data : err.msg);
    tm_rendered_deinit(&r);
    json_decref(kwargs);
}

static void run_file(tally *y, const char *dir, const char *name)
{
    char path[1400];
    size_t len, i;
    snprintf(path, sizeof(path), "%s/%s.cases.json", dir, name);
    char *data = read_file(path, &len);
    hide_big(data);
    json_t *file = parse(data), *c;
    snprintf(path, sizeof(path), "%s/%s.jinja", dir, name);
    char *source = read_file(path, &len);
    char *config = json_dumps(json_object_get(file, "special_tokens"), 0);
    model m = make(config, source, NULL);
    if (m.st != TM_OK)
        fail_msg("%s: %s", path, m.err.msg);
    struct tm now = {.tm_isdst = -1};
    assert_non_null(
        strptime(json_string_value(json_object_get(file, "now")), "%Y-%m-%dT%H:%M:%S", &now));
    mktime(&now);
    json_array_foreach(json_object_get(file, "cases"), i, c)
    {
        if (has_big(c))
            y->big++;
        else
            run_case(y, name, m.tpl, &now, c);
    }
    drop(&m);
    free(config);
    free(source);
    json_decref(file);
    free(data);
}

static void test_recorded(void **state)
{
    (void)state;
    const char *shared = getenv("TM_SHARED");
    char dir[1024], name[300];
    snprintf(dir, sizeof(dir), "%s/testdata/chat_templates", shared ? shared : "");
    DIR *d = shared ? opendir(dir) : NULL;
    if (!d) {
        print_message("TM_SHARED has no testdata/chat_templates: skipped\n");
        skip();
    }
    tally y = {0};
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        const char *dot = strstr(e->d_name, ".jinja");
        if (!dot || dot[6] || dot - e->d_name >= (int)sizeof(name))
            continue;
        snprintf(name, sizeof(name), "%.*s", (int)(dot - e->d_name), e->d_name);
        run_file(&y, dir, name);
    }
    closedir(d);
    print_message("%d renders, %d refusals, %d wrong, %d left out for their integers\n", y.texts,
                  y.errors, y.wrong, y.big);
    assert_int_equal(y.wrong, 0);
    assert_true(y.texts > 2000 && y.errors > 200 && y.big < 20);
}

/* ---- the embedded model --------------------------------------------------------------------------------- */

static void test_demo(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    model m = {.st = TM_OK};
    if (tm_tokenizer_load(&m.tok, DEMO, &err) != TM_OK ||
        tm_template_load(&m.tpl, DEMO, NULL, m.tok, &err) != TM_OK)
        fail_msg("%s", err.msg);
    assert_string_equal(tm_template_name(m.tpl), "jinja");
    expect(&m, "[{\"role\":\"user\",\"content\":\"Hi <|im_end|>\"}]", "g",
           "<|im_start|>user\n[Hi <|im_end|>]<|im_end|>\n<|im_start|>assistant\n");

    /* The token that the user spells is text, those of the template are tokens. */
    json_t *list = parse("[{\"role\":\"user\",\"content\":\"Hi <|im_end|>\"}]");
    const tm_render_args a = {.messages = list, .add_generation_prompt = true};
    tm_rendered r = {.input_count = 0};
    assert_int_equal(tm_template_render(m.tpl, &a, &r, &err), TM_OK);
    const tm_encode_opts opts = {.input = r.input, .input_count = r.input_count};
    int32_t *ids, end = tm_tokenizer_id(m.tok, "<|im_end|>", 10);
    size_t n, ends = 0;
    assert_int_equal(tm_tokenizer_encode(m.tok, r.text.data, r.text.len, &opts, &ids, &n, &err),
                     TM_OK);
    for (size_t i = 0; i < n; i++)
        ends += ids[i] == end;
    assert_int_equal(ends, 1);
    free(ids);
    tm_rendered_deinit(&r);
    json_decref(list);
    drop(&m);
}

/* ---- where templates come from -------------------------------------------------------------------------- */

#define CONFIG(template)                                                                           \
    "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\"},\"chat_template\":" template "}"
#define ONE "[{\"role\":\"user\",\"content\":\"a\"}]"

static void test_places(void **state)
{
    (void)state;
    model m = make(CONFIG("\"{{ bos_token }}config{{ eos_token }}{{ pad_token }}\""), NULL, NULL);
    expect(&m, ONE, "", "<s>config</s>");
    drop(&m);
    m = make(CONFIG("\"config\""), "file{{ bos_token }}", NULL);
    expect(&m, ONE, "", "file<s>");
    drop(&m);
    m = make(CONFIG("\"config\""), "file", "{{ messages[0].content }}!");
    expect(&m, ONE, "", "[a]!");
    drop(&m);
    m = make(NULL, NULL, "chatml");
    assert_string_equal(tm_template_name(m.tpl), "chatml");
    drop(&m);
    m = make(CONFIG("null"), NULL, NULL);
    assert_int_equal(m.st, TM_STATUS_NOT_FOUND);
    drop(&m);
    m = make(NULL, NULL, NULL);
    assert_int_equal(m.st, TM_STATUS_NOT_FOUND);
    drop(&m);
}

static void test_named_list(void **state)
{
    (void)state;
    model m = make(CONFIG("[{\"name\":\"tool_use\",\"template\":\"T{{ tools|length }}\"},"
                          "{\"name\":\"default\",\"template\":\"D\"},"
                          "{\"name\":\"rag\",\"template\":\"{% broken\"}]"),
                   NULL, NULL);
    expect(&m, ONE, "", "D");
    json_t *list = parse(ONE), *tools = parse("[{},{}]");
    const tm_render_args a = {.messages = list, .tools = tools};
    char *got = shown(m.tpl, &a);
    assert_string_equal(got, "T2");
    free(got);
    json_decref(list);
    json_decref(tools);
    drop(&m);
    m = make(CONFIG("[{\"name\":\"tool_use\",\"template\":\"T\"}]"), NULL, NULL);
    assert_int_equal(m.st, TM_STATUS_DATA);
    assert_non_null(strstr(m.err.msg, "default"));
    drop(&m);
}

static void test_refused_sources(void **state)
{
    (void)state;
    static const struct {
        const char *config, *override;
        tm_status st;
        const char *says;
    } rows[] = {
        {CONFIG("7"), NULL, TM_STATUS_DATA, "chat_template"},
        {CONFIG("\"{% if %}\""), NULL, TM_STATUS_DATA, "tokenizer_config.json"},
        {NULL, "{{ oops", TM_STATUS_DATA, "chat template"},
        {NULL, "no-such-name", TM_STATUS_CONFIG, "chatml"},
        {NULL, "{\"system\":\"x\"}", TM_STATUS_INVALID, "model_name"},
        {NULL, "{\"model_name\":\"x\",\"user\":1}", TM_STATUS_INVALID, "user"},
        {NULL, "{\"model_name\":\"x\",\"capability\":\"dance\"}", TM_STATUS_UNSUPPORTED, "dance"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        model m = make(rows[i].config, NULL, rows[i].override);
        print_message("%s\n", m.err.msg);
        assert_true(m.st != TM_OK);
        assert_non_null(strstr(m.err.msg, rows[i].says));
        drop(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recorded),        cmocka_unit_test(test_demo),
        cmocka_unit_test(test_places),          cmocka_unit_test(test_named_list),
        cmocka_unit_test(test_refused_sources),
    };
    return cmocka_run_group_tests_name("template", tests, NULL, NULL);
}
