/* Parsers of tool calls and reasoning: every case of parse_cases.h whole, byte by byte, in all pairs of pieces
 * and in random pieces, against one expectation; then bounds, detection, forced beginnings and the JSON scanner.
 *
 * Events are written down as C(content) R(reasoning), "0:name" and the arguments for a call, "!" for its end,
 * "x0" for a dropped one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "tests/text/parse_cases.h"
#include "text/parse/jscan.h"
#include "text/parse/parse.h"

static json_t *functions;

typedef struct log {
    tm_buf text;
    int kind; /* of the open bracket, -1 = none */
    int next; /* the number the next call must have */
} log;

static void close_bracket(log *l)
{
    if (l->kind == TM_PARSE_CONTENT || l->kind == TM_PARSE_REASONING)
        tm_buf_putc(&l->text, ')');
    l->kind = -1;
}

static void on_event(void *user, const tm_parse_event *e)
{
    log *l = user;
    if (e->kind == TM_PARSE_CONTENT || e->kind == TM_PARSE_REASONING) {
        assert_true(e->len > 0);
        if (l->kind != (int)e->kind) {
            close_bracket(l);
            tm_buf_puts(&l->text, e->kind == TM_PARSE_CONTENT ? "C(" : "R(");
            l->kind = (int)e->kind;
        }
        tm_buf_append(&l->text, e->text, e->len);
        return;
    }
    close_bracket(l);
    switch (e->kind) {
    case TM_PARSE_CALL:
        assert_int_equal(e->call, l->next);
        tm_buf_printf(&l->text, "%d:", e->call);
        tm_buf_append(&l->text, e->text, e->len);
        break;
    case TM_PARSE_ARGUMENTS:
        assert_int_equal(e->call, l->next);
        tm_buf_append(&l->text, e->text, e->len);
        break;
    case TM_PARSE_CALL_END:
        assert_int_equal(e->call, l->next++);
        tm_buf_putc(&l->text, '!');
        break;
    default:
        assert_int_equal(e->kind, TM_PARSE_DROP);
        tm_buf_printf(&l->text, "x%d", e->call);
        assert_int_equal(e->call, l->next++);
    }
}

static tm_parse *open_case(const parse_case *c, log *l)
{
    tm_parse *p;
    const tm_parse_opts o = {.tools = c->tools ? tm_tool_parser_find(c->tools) : NULL,
                             .reason = c->reason ? tm_reason_parser_find(c->reason) : NULL,
                             .inside = c->inside,
                             .functions = functions,
                             .known_only = c->known_only,
                             .calls_max = c->calls_max};
    assert_true((c->tools == NULL) == (o.tools == NULL));
    assert_true((c->reason == NULL) == (o.reason == NULL));
    *l = (log){.kind = -1};
    tm_buf_init(&l->text, 0);
    assert_int_equal(tm_parse_create(&p, &o, on_event, l, NULL), TM_OK);
    return p;
}

static void check(const parse_case *c, tm_parse *p, log *l, const char *how)
{
    tm_parse_finish(p, c->cut);
    assert_false(tm_parse_failed(p));
    close_bracket(l);
    if (strcmp(l->text.data ? l->text.data : "", c->expect) != 0)
        fail_msg("%s, %s: %s\n  gives   %s\n  expects %s", c->tools ? c->tools : "-", how, c->text,
                 l->text.data ? l->text.data : "", c->expect);
    tm_parse_destroy(p);
    tm_buf_deinit(&l->text);
}

static void cases_in_every_cut(void **state)
{
    (void)state;
    log l;
    char how[64];
    for (size_t i = 0; i < TM_ARRAY_LEN(parse_cases); i++) {
        const parse_case *c = &parse_cases[i];
        size_t len = strlen(c->text);
        tm_parse *p = open_case(c, &l);
        tm_parse_push(p, c->text, len);
        check(c, p, &l, "whole");
        p = open_case(c, &l);
        for (size_t k = 0; k < len; k++)
            tm_parse_push(p, c->text + k, 1);
        check(c, p, &l, "bytes");
        for (size_t k = 1; k < len; k++) {
            snprintf(how, sizeof how, "cut at %zu", k);
            p = open_case(c, &l);
            tm_parse_push(p, c->text, k);
            tm_parse_push(p, c->text + k, len - k);
            check(c, p, &l, how);
        }
    }
}

static uint64_t g_seed;

static size_t below(size_t n)
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(g_seed >> 33) % n;
}

static void cases_in_random_cuts(void **state)
{
    (void)state;
    log l;
    const char *seed = getenv("TM_SEED");
    g_seed = seed ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL);
    printf("TM_SEED=%llu\n", (unsigned long long)g_seed);
    for (int n = 0; n < 4000; n++) {
        const parse_case *c = &parse_cases[below(TM_ARRAY_LEN(parse_cases))];
        size_t len = strlen(c->text);
        tm_parse *p = open_case(c, &l);
        for (size_t at = 0, k; at < len; at += k) {
            k = 1 + below(9);
            k = TM_MIN(k, len - at);
            tm_parse_push(p, c->text + at, k);
        }
        check(c, p, &l, "random");
    }
}

/* Arguments go out while they come, not at the end. */
static void arguments_stream(void **state)
{
    (void)state;
    static const struct {
        const char *tools, *text, *expect;
    } rows[] = {
        {"hermes", "<tool_call>{\"name\":\"weather\",\"arguments\":{\"city\":\"Pa",
         "0:weather{\"city\":\"Pa"},
        {"mistral", "[TOOL_CALLS][{\"name\":\"weather\",\"arguments\":{\"ci", "0:weather{\"ci"},
        {"deepseek-v31", DS_OPEN DS_CALL "now" DS_SEP "{\"a", "0:now{\"a"},
        {"glm4", "weather\n{\"city", "0:weather{\"city"},
        {"qwen3coder", "<function=weather><parameter=city>Oslo</parameter><par",
         "0:weather{\"city\": \"Oslo\""},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        const parse_case c = {.tools = rows[i].tools};
        log l;
        tm_parse *p = open_case(&c, &l);
        tm_parse_push(p, rows[i].text, strlen(rows[i].text));
        assert_string_equal(l.text.data, rows[i].expect);
        assert_true(tm_parse_in_call(p));
        assert_int_equal(tm_parse_complete(p), 0);
        tm_parse_destroy(p);
        tm_buf_deinit(&l.text);
    }
}

static void put(tm_parse *p, const char *s)
{
    tm_parse_push(p, s, strlen(s));
}

static void bounds(void **state)
{
    (void)state;
    const parse_case c = {.tools = "hermes"};
    log l;
    /* calls of one answer */
    tm_parse *p = open_case(&c, &l);
    for (int i = 0; i < TM_PARSE_CALLS_MAX + 2; i++)
        put(p, "<tool_call>{\"name\":\"now\"}</tool_call>");
    tm_parse_finish(p, false);
    assert_int_equal(tm_parse_complete(p), TM_PARSE_CALLS_MAX);
    tm_parse_destroy(p);
    tm_buf_deinit(&l.text);
    /* depth of arguments */
    p = open_case(&c, &l);
    put(p, "<tool_call>{\"name\":\"now\",\"arguments\":{\"a\":");
    for (int i = 0; i < TM_JSCAN_DEPTH_MAX - 2; i++)
        put(p, "[");
    assert_true(tm_parse_in_call(p));
    put(p, "[");
    assert_false(tm_parse_in_call(p));
    assert_non_null(strstr(l.text.data, "x0C(<tool_call>{\"name\""));
    tm_parse_destroy(p);
    tm_buf_deinit(&l.text);
    /* bytes of one call */
    p = open_case(&c, &l);
    put(p, "<tool_call>{\"x\":\"");
    for (size_t i = 0; i < TM_PARSE_CALL_MAX / 8 + 1; i++)
        put(p, "12345678");
    tm_parse_finish(p, false);
    assert_int_equal(l.text.len, 2 + 17 + TM_PARSE_CALL_MAX + 8);
    tm_parse_destroy(p);
    tm_buf_deinit(&l.text);
    /* length of a name */
    p = open_case(&c, &l);
    put(p, "<tool_call>{\"name\":\"");
    for (int i = 0; i < TM_PARSE_NAME_MAX + 1; i++)
        put(p, "n");
    put(p, "\"}");
    assert_int_equal(l.next, 0);
    tm_parse_destroy(p);
    tm_buf_deinit(&l.text);
}

/* A prompt that begins the call, and the model's part of it. */
static void forced_beginnings(void **state)
{
    (void)state;
    static const struct {
        const char *tools, *rest, *expect;
    } rows[] = {
        {"hermes", " " PARIS "}\n</tool_call>", "0:weather" PARIS "!"},
        {"llama3", " " PARIS "}", "0:weather" PARIS "!"},
        {"mistral", " " PARIS "}]", "0:weather" PARIS "!"},
        {"mistral-v11", PARIS, "0:weather" PARIS "!"},
        {"internlm", " " PARIS "}<|action_end|>", "0:weather" PARIS "!"},
        {"deepseek-v3", PARIS "\n```" DS_END DS_CLOSE, "0:weather" PARIS "!"},
        {"deepseek-v31", PARIS DS_END DS_CLOSE, "0:weather" PARIS "!"},
        {"deepseek-v32",
         "<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>\n"
         "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
         "0:weather" PARIS "!"},
        {"glm4", PARIS, "0:weather" PARIS "!"},
        {"glm47", "<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
         "0:weather" PARIS "!"},
        {"qwen3coder", "<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
         "0:weather" PARIS "!"},
        {"seed_oss", "<parameter=city>Paris</parameter></function></seed:tool_call>",
         "0:weather" PARIS "!"},
        {"granite", " " PARIS "}]", "0:weather" PARIS "!"},
        {"phi4", " " PARIS "}]", "0:weather" PARIS "!"},
        {"react", " " PARIS, "0:weather" PARIS "!"},
        {"chatglm3", "city='Paris')\n```", "0:weather" PARIS "!"},
        {"pythonic", "city='Paris')]", "0:weather" PARIS "!"},
    };
    tm_buf list;
    tm_buf_init(&list, 0);
    tm_tool_parser_list(&list);
    int commas = 0;
    for (size_t i = 0; i < list.len; i++)
        commas += list.data[i] == ',';
    assert_int_equal(commas + 1, TM_ARRAY_LEN(rows)); /* a row for every parser */
    tm_buf_deinit(&list);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        const parse_case c = {.tools = rows[i].tools,
                              .text = rows[i].rest,
                              .expect = rows[i].expect,
                              .known_only = true};
        const tm_tool_parser *row = tm_tool_parser_find(rows[i].tools);
        log l;
        tm_buf named, any;
        tm_buf_init(&named, 0);
        tm_buf_init(&any, 0);
        assert_true(tm_tool_parser_begin(row, "weather", &named));
        tm_parse *p = open_case(&c, &l);
        tm_parse_push(p, named.data, named.len);
        put(p, rows[i].rest);
        check(&c, p, &l, "forced");
        if (tm_tool_parser_begin(row, NULL, &any)) { /* the named form goes on from it */
            assert_true(any.len < named.len && memcmp(any.data, named.data, any.len) == 0);
            assert_memory_equal(named.data + any.len, "weather", 7);
        }
        tm_buf_deinit(&named);
        tm_buf_deinit(&any);
    }
}

static void inside_is_read_off_the_prompt(void **state)
{
    (void)state;
    static const struct {
        const char *parser, *prompt;
        bool inside;
    } rows[] = {
        {"think", "<|im_start|>assistant\n", false},
        {"think", "<|im_start|>assistant\n<think>\n", true},
        {"think", "<think> said the user<|im_start|>assistant\n", false},
        {"think", "<｜Assistant｜><think>", true},
        {"think", "<think>\n\n</think>\n\n", false},
        {"deepseek-r1", "<｜Assistant｜>", true},
        {"deepseek-r1", "<｜Assistant｜><think>\n</think>\n\n", false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        assert_int_equal(tm_reason_parser_inside(tm_reason_parser_find(rows[i].parser),
                                                 rows[i].prompt, strlen(rows[i].prompt)),
                         rows[i].inside);
}

/* The parser that a template's text asks for; "-" = none. */
static void assert_detected(const char *what, const char *source, const char *type,
                            const char *tools, const char *reason)
{
    tm_template *t;
    tm_err err = TM_ERR_INIT;
    if (tm_template_create(&t, NULL, 0, source, NULL, &err) != TM_OK)
        fail_msg("%s: %s", what, err.msg);
    const tm_tool_parser *p = tm_tool_parser_detect(t, type);
    const tm_reason_parser *r = tm_reason_parser_detect(t);
    const char *p_name = p ? tm_tool_parser_name(p) : "-";
    const char *r_name = r ? tm_reason_parser_name(r) : "-";
    if (strcmp(p_name, tools) != 0 || strcmp(r_name, reason) != 0)
        fail_msg("%s: %s and %s, expected %s and %s", what, p_name, r_name, tools, reason);
    tm_template_destroy(t);
}

static void detection(void **state)
{
    (void)state;
    static const struct {
        const char *source, *type, *tools, *reason;
    } rows[] = {
        {"{{ 'nothing' }}", NULL, "-", "-"},
        {"{{ '<tool_call>' }}", NULL, "hermes", "-"},
        {"{{ '<tool_call></think>' }}", "granite", "hermes", "think"},
        {"{{ '<tool_call><function=' }}", NULL, "qwen3coder", "-"},
        {"{{ '<tool_call><arg_key>' }}", NULL, "glm47", "-"},
        {"{{ '<|tool_call|><|start_of_role|>' }}", NULL, "granite", "-"},
        {"{{ '[TOOL_CALLS]' }}", NULL, "mistral", "-"},
        {"{{ '[TOOL_CALLS][ARGS][/THINK]' }}", NULL, "mistral-v11", "mistral"},
        {"{{ '" DS_OPEN "```json' }}", NULL, "deepseek-v3", "-"},
        {"{{ '" DS_OPEN "</think>' }}", NULL, "deepseek-v31", "think"},
        {"{{ 'x' }}", "internlm2", "internlm", "-"},
        {"{{ 'x' }}", "llama", "-", "-"},
        {"internlm2", NULL, "internlm", "-"},
        {"glm4", NULL, "glm4", "-"},
        {"chatglm3", NULL, "chatglm3", "-"},
        {"chatml", NULL, "-", "-"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        assert_detected(rows[i].source, rows[i].source, rows[i].type, rows[i].tools,
                        rows[i].reason);
}

static void detection_of_published_templates(void **state)
{
    (void)state;
    static const char *const rows[][3] = {
        {"Qwen-Qwen2.5-7B-Instruct", "hermes", "-"},
        {"Qwen-QwQ-32B", "hermes", "think"},
        {"Qwen3.5-4B", "qwen3coder", "think"},
        {"NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "hermes", "-"},
        {"MiniMax-M3", "-", "-"},
        {"ByteDance-Seed-OSS", "seed_oss", "seed_oss"},
        {"GLM-4.6", "glm47", "think"},
        {"deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-v3", "think"},
        {"deepseek-ai-DeepSeek-V3.1", "deepseek-v31", "think"},
        {"deepseek-ai-DeepSeek-V3.2", "deepseek-v32", "think"},
        {"ibm-granite-granite-3.3-2B-Instruct", "granite", "think"},
        {"meta-llama-Llama-3.1-8B-Instruct", "llama3", "-"},
        {"meta-llama-Llama-3.2-3B-Instruct", "llama3", "-"},
        {"mistralai-Mistral-Nemo-Instruct-2407", "mistral", "-"},
        {"mistralai-Ministral-3-14B-Reasoning-2512", "mistral-v11", "mistral"},
        {"google-gemma-2-2b-it", "-", "-"},
        {"vllm-tool-internlm2_tool", "internlm", "-"},
    };
    const char *shared = getenv("TM_SHARED");
    char dir[400];
    snprintf(dir, sizeof(dir), "%s/testdata/chat_templates", shared ? shared : "");
    if (!tm_dir_exists(dir)) {
        print_message("TM_SHARED has no testdata/chat_templates: skipped\n");
        skip();
    }
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s.jinja", dir, rows[i][0]);
        assert_detected(rows[i][0], path, NULL, rows[i][1], rows[i][2]);
    }
}

static void json_scanner(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int bad; /* index of the byte that is wrong, -1 = none */
    } rows[] = {
        {"{\"a\": [1, -0.5e+3, true, null, \"\\u00e9\\n\"], \"b\": {}}", -1},
        {"[]", -1},
        {"{}", -1},
        {"[1,]", 3},
        {"{\"a\"}", 4},
        {"{,}", 1},
        {"{\"a\":}", 5},
        {"[01]", 2},
        {"[1.]", 3},
        {"[+1]", 1},
        {"[\"\n\"]", 2},
        {"[tru]", 4},
        {"[\"\\x\"]", 3},
        {"{\"a\":1]", 6},
        {"[1}", 2},
        {"{a}", 1},
        {"[1 2]", 3},
        {"[\"\\u12g\"]", 6},
        {"[.5]", 1},
        {"[1e]", 3},
        {"[--1]", 2},
        {"[1]]", 3},
        {"[nul l]", 4},
        {"{\"a\" 1}", 5},
        {"{\"a\":1,}", 7},
        {"[-]", 2},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_jscan s;
        int bad = -1, end = -1;
        tm_jscan_init(&s);
        for (int k = 0; rows[i].text[k] && bad < 0; k++) {
            int what = tm_jscan_byte(&s, rows[i].text[k]);
            if (what & TM_JSCAN_BAD)
                bad = k;
            else if (what & TM_JSCAN_END && s.level == 0)
                end = k;
        }
        if (bad != rows[i].bad)
            fail_msg("%s: wrong at %d, expected %d", rows[i].text, bad, rows[i].bad);
        if (bad < 0)
            assert_int_equal(end, (int)strlen(rows[i].text) - 1);
    }
}

static int setup(void **state)
{
    (void)state;
    return tm_json_parse(PARSE_FUNCTIONS, strlen(PARSE_FUNCTIONS), &functions, NULL) != TM_OK;
}

static int teardown(void **state)
{
    (void)state;
    json_decref(functions);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_scanner),
        cmocka_unit_test(cases_in_every_cut),
        cmocka_unit_test(cases_in_random_cuts),
        cmocka_unit_test(arguments_stream),
        cmocka_unit_test(bounds),
        cmocka_unit_test(forced_beginnings),
        cmocka_unit_test(inside_is_read_off_the_prompt),
        cmocka_unit_test(detection),
        cmocka_unit_test(detection_of_published_templates),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
