/* The field table, row by row: missing, null, every wrong type, and the values around both bounds. What a row
 * says is what must happen; rows with parsers of their own have cases below. */
#include "tests/router/api_harness.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/fmt.h"

static tm_api_params g_params;
static tm_api_error g_error;
static int g_unknown;

static void on_unknown(void *user, const char *key)
{
    (void)user;
    (void)key;
    g_unknown++;
}

static json_t *base_body(int route)
{
    return route == TM_API_CHAT ? json_pack("{s:s, s:[{s:s, s:s}]}", "model", "demo", "messages",
                                            "role", "user", "content", "hi")
                                : json_pack("{s:s, s:s}", "model", "demo", "prompt", "hi");
}

static bool parse(json_t *body, int route)
{
    tm_api_limits limits = tm_api_limits_default();
    g_error = (tm_api_error){0};
    g_unknown = 0;
    return tm_api_params_parse(&g_params, body, route, &limits, on_unknown, NULL, &g_error);
}

/* Parses the minimal body with one field added (the value's reference is taken). */
static bool with(int route, const char *name, json_t *value)
{
    json_t *body = base_body(route);
    json_object_set_new(body, name, value);
    bool ok = parse(body, route);
    json_decref(body);
    return ok;
}

static bool with_text(int route, const char *name, const char *json)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(json, strlen(json), &v, &err) != TM_OK)
        fail_msg("%s: %s", json, err.msg);
    return with(route, name, v);
}

static void assert_refused(const char *name, tm_api_code code)
{
    if (g_error.code != code || strncmp(g_error.param, name, strlen(name)) != 0 ||
        !g_error.message[0])
        fail_msg("%s: code %d, param '%s': %s", name, g_error.code, g_error.param, g_error.message);
}

static void every_row(void (*check)(const tm_api_field *f, int route))
{
    int count;
    const tm_api_field *rows = tm_api_fields(&count);
    assert_true(count > 60);
    for (int i = 0; i < count; i++)
        for (int route = TM_API_CHAT; route <= TM_API_COMPLETION; route++)
            if (rows[i].routes & route)
                check(&rows[i], route);
}

static bool required(const tm_api_field *f)
{
    return strcmp(f->name, "model") == 0 || strcmp(f->name, "messages") == 0 ||
           strcmp(f->name, "prompt") == 0;
}

static void check_null(const tm_api_field *f, int route)
{
    bool ok = with(route, f->name, json_null());
    if (ok == required(f))
        fail_msg("%s: null is %s", f->name, ok ? "accepted" : "refused");
    if (!ok)
        assert_refused(f->name, TM_API_MISSING);
    assert_int_equal(g_unknown, 0);
}

static void null_is_absent(void **state)
{
    (void)state;
    every_row(check_null);
    for (int route = TM_API_CHAT; route <= TM_API_COMPLETION; route++) {
        json_t *body = base_body(route);
        assert_true(parse(body, route));
        static const char *const names[] = {"model", "messages", "prompt"};
        for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
            json_t *one = json_copy(body);
            if (json_object_del(one, names[i]) == 0) {
                assert_false(parse(one, route));
                assert_refused(names[i], TM_API_MISSING);
            }
            json_decref(one);
        }
        json_decref(body);
    }
}

/* Six types; which of them a row takes. */
enum { T_STRING = 1, T_INT = 2, T_REAL = 4, T_BOOL = 8, T_ARRAY = 16, T_OBJECT = 32 };

static const struct {
    int bit;
    const char *json;
} g_types[] = {{T_STRING, "\"1\""}, {T_INT, "1"},       {T_REAL, "1.5"},
               {T_BOOL, "true"},    {T_ARRAY, "[1.5]"}, {T_OBJECT, "{\"a\":1.5}"}};

static int types_of_kind(const tm_api_field *f)
{
    switch (f->kind) {
    case TM_API_BOOL:
        return T_BOOL;
    case TM_API_INT:
        return T_INT;
    case TM_API_NUM:
        return T_INT | T_REAL;
    case TM_API_STR:
        return T_STRING;
    case TM_API_ANY:
        return 63;
    case TM_API_REFUSE:
        return 0;
    case TM_API_CUSTOM:
        break;
    }
    /* 1.5 in arrays and objects is wrong for all of these, or a wrong value. */
    static const struct {
        const char *name;
        int types;
    } custom[] = {
        {"messages", T_STRING | T_ARRAY},
        {"input_ids", T_ARRAY},
        {"prompt", T_STRING | T_ARRAY},
        {"seed", T_INT},
        {"logit_bias", 0},
        {"stop", T_STRING},
        {"stop_token_ids", 0},
        {"session_id", T_STRING | T_INT},
        {"add_generation_prompt", T_BOOL},
        {"chat_template_kwargs", T_OBJECT},
        {"enable_thinking", T_BOOL},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(custom); i++)
        if (strcmp(custom[i].name, f->name) == 0)
            return custom[i].types;
    return 0;
}

static void check_types(const tm_api_field *f, int route)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_types); i++) {
        bool want = types_of_kind(f) & g_types[i].bit;
        bool ok = with_text(route, f->name, g_types[i].json);
        /* Rules between fields may refuse what the row itself takes. */
        bool together = !ok && (g_error.code == TM_API_INVALID_VALUE) &&
                        (strcmp(f->name, "top_logprobs") == 0 || f->kind == TM_API_NUM ||
                         strcmp(f->name, "continue_final_message") == 0);
        if (ok != want && !(want && together))
            fail_msg("%s = %s: %s", f->name, g_types[i].json, ok ? "accepted" : g_error.message);
        if (!ok && !want)
            assert_true(strncmp(g_error.param, f->name, strlen(f->name)) == 0);
        if (!ok && !want && f->kind < TM_API_CUSTOM)
            assert_refused(f->name, TM_API_INVALID_TYPE);
        if (!ok && f->kind == TM_API_REFUSE)
            assert_refused(f->name, TM_API_UNSUPPORTED);
    }
}

static void wrong_types(void **state)
{
    (void)state;
    every_row(check_types);
}

/* The neighbours that a bound must tell apart. */
static json_t *number(const tm_api_field *f, double v)
{
    return f->kind == TM_API_INT ? json_integer((json_int_t)v) : json_real(v);
}

static void check_value(const tm_api_field *f, int route, double v, bool want)
{
    json_t *body = base_body(route);
    json_object_set_new(body, f->name, number(f, v));
    /* What else has to be there for the value to make sense. */
    if (strcmp(f->name, "top_logprobs") == 0)
        json_object_set_new(body, "logprobs", json_true());
    if (strcmp(f->name, "max_tokens") == 0 && route == TM_API_COMPLETION)
        json_object_set_new(body, "echo", json_true());
    if (strcmp(f->name, "best_of") == 0 && v > 0)
        json_object_set_new(body, "n", json_integer((json_int_t)v));
    bool ok = parse(body, route);
    json_decref(body);
    if (ok != want)
        fail_msg("%s = %g on route %d: %s", f->name, v, route, ok ? "accepted" : g_error.message);
    if (ok && f->offset != TM_API_NOWHERE) {
        const char *at_field = (const char *)&g_params + f->offset;
        double got = f->kind == TM_API_INT ? (double)*(const int64_t *)(const void *)at_field
                                           : *(const double *)(const void *)at_field;
        assert_true(got == v);
    }
    if (!ok) {
        char text[TM_NUM_MAX];
        tm_num_format(text, v, false);
        assert_refused(f->name, TM_API_INVALID_VALUE);
        if (strstr(g_error.message, text) == NULL)
            fail_msg("%s does not show the value %s", g_error.message, text);
    }
}

static void check_bounds(const tm_api_field *f, int route)
{
    if (f->kind != TM_API_INT && f->kind != TM_API_NUM)
        return;
    double step = f->kind == TM_API_INT ? 1 : 0.0009765625;
    check_value(f, route, f->min, !f->open_min);
    check_value(f, route, f->min - step, false);
    check_value(f, route, f->min + step, true);
    check_value(f, route, f->max, true);
    check_value(f, route, f->max - step, true);
    check_value(f, route, f->max + step, false);
    check_value(f, route, -1e300 * (f->kind == TM_API_NUM) - 9e15 * (f->kind == TM_API_INT), false);
    check_value(f, route, 1e300 * (f->kind == TM_API_NUM) + 9e15 * (f->kind == TM_API_INT), false);
}

static void bounds(void **state)
{
    (void)state;
    every_row(check_bounds);
}

static void check_length(const tm_api_field *f, int route)
{
    static char text[400];
    if (f->kind != TM_API_STR)
        return;
    memset(text, 'x', sizeof text);
    for (int extra = -1; extra <= 1; extra++) {
        bool ok = with(route, f->name, json_stringn(text, (size_t)f->max + (size_t)extra));
        assert_int_equal(ok, extra <= 0);
        if (!ok)
            assert_refused(f->name, TM_API_INVALID_VALUE);
    }
    assert_false(with(route, f->name, json_stringn("a\0b", 3)));
    assert_refused(f->name, TM_API_INVALID_VALUE);
    assert_true(with(route, f->name, json_string("\xe4\xbd\xa0")));
}

static void lengths(void **state)
{
    (void)state;
    every_row(check_length);
}

static void check_empty(const tm_api_field *f, int route)
{
    static const char *const empty[] = {"\"\"", "[]", "{}", "false"};
    static const char *const full[] = {"\"x\"", "[1]", "{\"a\":1}", "true", "0"};
    if (f->kind != TM_API_REFUSE)
        return;
    for (size_t i = 0; i < TM_ARRAY_LEN(empty); i++)
        assert_true(with_text(route, f->name, empty[i]));
    for (size_t i = 0; i < TM_ARRAY_LEN(full); i++) {
        assert_false(with_text(route, f->name, full[i]));
        assert_refused(f->name, TM_API_UNSUPPORTED);
    }
}

static void unsupported_fields(void **state)
{
    (void)state;
    every_row(check_empty);
}

/* {route bits, field, value, code or -1 = accepted} */
static const struct {
    int routes;
    const char *name, *value;
    int code;
    const char *param;
} g_cases[] = {
    {3, "stop", "\"\"", TM_API_INVALID_VALUE, "stop"},
    {3, "stop", "[]", -1, NULL},
    {3, "stop", "[\"a\",\"b\",\"c\",\"d\"]", -1, NULL},
    {3, "stop", "[\"a\",\"b\",\"c\",\"d\",\"e\"]", TM_API_INVALID_VALUE, "stop"},
    {3, "stop", "[\"a\",\"\"]", TM_API_INVALID_VALUE, "stop[1]"},
    {3, "stop", "[\"a\",null]", TM_API_INVALID_TYPE, "stop[1]"},
    {3, "stop", "\"a\\u0000\"", TM_API_INVALID_VALUE, "stop"},
    {3, "seed", "9223372036854775807", -1, NULL},
    {3, "seed", "-9223372036854775808", -1, NULL},
    {3, "seed", "1.0", -1, NULL},
    {3, "seed", "1e300", TM_API_INVALID_TYPE, "seed"},
    {3, "n", "1.0", -1, NULL},
    {3, "n", "0", TM_API_INVALID_VALUE, "n"},
    {3, "n", "1.5", TM_API_INVALID_TYPE, "n"},
    {3, "logit_bias", "{}", -1, NULL},
    {3, "logit_bias", "{\"5\":100,\"6\":-100,\"7\":0.5}", -1, NULL},
    {3, "logit_bias", "{\"5\":100.5}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "logit_bias", "{\"5\":-101}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "logit_bias", "{\"5\":\"1\"}", TM_API_INVALID_TYPE, "logit_bias"},
    {3, "logit_bias", "{\"abc\":1}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "logit_bias", "{\"-1\":1}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "logit_bias", "{\"\":1}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "logit_bias", "{\"99999999999999999999\":1}", TM_API_INVALID_VALUE, "logit_bias"},
    {3, "stop_token_ids", "[]", -1, NULL},
    {3, "stop_token_ids", "[0,5,2147483647]", -1, NULL},
    {3, "stop_token_ids", "[-1]", TM_API_INVALID_VALUE, "stop_token_ids[0]"},
    {3, "stop_token_ids", "[1,2147483648]", TM_API_INVALID_VALUE, "stop_token_ids[1]"},
    {3, "stop_token_ids", "[1,\"2\"]", TM_API_INVALID_TYPE, "stop_token_ids[1]"},
    {3, "stream_options", "{}", TM_API_INVALID_VALUE, "stream_options"},
    {3, "stream_options", "{\"include_usage\":1}", TM_API_INVALID_TYPE,
     "stream_options.include_usage"},
    {3, "session_id", "-1", -1, NULL},
    {3, "session_id", "-2", TM_API_INVALID_VALUE, "session_id"},
    {3, "session_id", "\"abc\"", -1, NULL},
    {3, "metadata", "{\"a\":\"b\"}", -1, NULL},
    {3, "metadata", "{\"a\":1}", TM_API_INVALID_TYPE, "metadata"},
    {3, "response_format", "{\"type\":\"text\"}", -1, NULL},
    {3, "response_format", "{\"type\":\"json_object\"}", TM_API_UNSUPPORTED, "response_format"},
    {3, "response_format", "{\"type\":\"xml\"}", TM_API_INVALID_VALUE, "response_format.type"},
    {3, "response_format", "{}", TM_API_MISSING, "response_format.type"},
    {1, "modalities", "[\"text\"]", -1, NULL},
    {1, "modalities", "[\"text\",\"audio\"]", TM_API_UNSUPPORTED, "modalities"},
    {1, "tool_choice", "\"none\"", -1, NULL},
    {1, "tool_choice", "\"auto\"", -1, NULL},
    {1, "tool_choice", "\"required\"", TM_API_INVALID_VALUE, "tool_choice"},
    {1, "tool_choice", "{}", TM_API_INVALID_VALUE, "tool_choice.type"},
    {1, "tool_choice", "{\"type\":\"function\"}", TM_API_MISSING, "tool_choice.function.name"},
    {1, "tool_choice", "{\"type\":\"function\",\"function\":{\"name\":\"f\"}}",
     TM_API_INVALID_VALUE, "tool_choice"},
    {1, "tool_choice", "{\"type\":\"allowed_tools\"}", TM_API_MISSING,
     "tool_choice.allowed_tools.tools"},
    {1, "function_call", "\"auto\"", -1, NULL},
    {1, "function_call", "\"required\"", TM_API_INVALID_VALUE, "function_call"},
    {1, "function_call", "{}", TM_API_MISSING, "function_call.name"},
    {1, "tools", "[]", -1, NULL},
    {1, "tools", "{}", TM_API_INVALID_TYPE, "tools"},
    {1, "tools", "[5]", TM_API_INVALID_TYPE, "tools[0]"},
    {1, "tools", "[{}]", TM_API_MISSING, "tools[0].type"},
    {1, "tools", "[{\"type\":5}]", TM_API_INVALID_TYPE, "tools[0].type"},
    {1, "tools", "[{\"type\":\"web_search\"}]", TM_API_INVALID_VALUE, "tools[0].type"},
    {1, "tools", "[{\"type\":\"function\"}]", TM_API_MISSING, "tools[0].function"},
    {1, "tools", "[{\"type\":\"function\",\"function\":5}]", TM_API_INVALID_TYPE,
     "tools[0].function"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{}}]", TM_API_MISSING,
     "tools[0].function.name"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"a b\"}}]", TM_API_INVALID_VALUE,
     "tools[0].function.name"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"\"}}]", TM_API_INVALID_VALUE,
     "tools[0].function.name"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":[]}}]",
     TM_API_INVALID_TYPE, "tools[0].function.parameters"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"description\":1}}]",
     TM_API_INVALID_TYPE, "tools[0].function.description"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"strict\":1}}]",
     TM_API_INVALID_TYPE, "tools[0].function.strict"},
    {1, "tools", "[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]", -1, NULL},
    {1, "functions", "[{\"name\":\"f\"}]", -1, NULL},
    {1, "functions", "[{\"name\":5}]", TM_API_INVALID_TYPE, "functions[0].name"},
    {1, "tool_choice", "\"other\"", TM_API_INVALID_VALUE, "tool_choice"},
    {1, "reasoning_effort", "\"high\"", -1, NULL},
    {1, "reasoning_effort", "\"much\"", TM_API_INVALID_VALUE, "reasoning_effort"},
    {1, "top_logprobs", "3", TM_API_INVALID_VALUE, "top_logprobs"},
    {2, "best_of", "1", -1, NULL},
    {2, "best_of", "2", TM_API_UNSUPPORTED, "best_of"},
    {2, "max_tokens", "0", TM_API_INVALID_VALUE, "max_tokens"},
    {3, "min_tokens", "5", -1, NULL},
};

static void special_cases(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_cases); i++) {
        for (int route = 1; route <= 2; route++) {
            if (!(g_cases[i].routes & route))
                continue;
            bool ok = with_text(route, g_cases[i].name, g_cases[i].value);
            if (ok != (g_cases[i].code < 0))
                fail_msg("%s = %s: %s", g_cases[i].name, g_cases[i].value,
                         ok ? "accepted" : g_error.message);
            if (ok)
                continue;
            assert_int_equal(g_error.code, g_cases[i].code);
            assert_string_equal(g_error.param, g_cases[i].param);
        }
    }
}

static void many_entries(void **state)
{
    (void)state;
    char key[16];
    for (int n = TM_API_BIAS_MAX - 1; n <= TM_API_BIAS_MAX + 1; n++) {
        json_t *bias = json_object();
        for (int i = 0; i < n; i++) {
            snprintf(key, sizeof key, "%d", i);
            json_object_set_new(bias, key, json_integer(1));
        }
        assert_int_equal(with(TM_API_CHAT, "logit_bias", bias), n <= TM_API_BIAS_MAX);
    }
    for (int n = TM_API_STOP_IDS_MAX - 1; n <= TM_API_STOP_IDS_MAX + 1; n++) {
        json_t *ids = json_array();
        for (int i = 0; i < n; i++)
            json_array_append_new(ids, json_integer(i));
        assert_int_equal(with(TM_API_CHAT, "stop_token_ids", ids), n <= TM_API_STOP_IDS_MAX);
        assert_true(n > TM_API_STOP_IDS_MAX || g_params.stop_id_count == n);
    }
    for (size_t n = TM_API_STOP_BYTES_MAX - 1; n <= TM_API_STOP_BYTES_MAX + 1; n++) {
        char text[300];
        memset(text, 's', sizeof text);
        assert_int_equal(with(TM_API_CHAT, "stop", json_stringn(text, n)),
                         n <= TM_API_STOP_BYTES_MAX);
    }
    for (int n = 4095; n <= 4097; n++) {
        json_t *messages = json_array();
        for (int i = 0; i < n; i++)
            json_array_append_new(messages, json_object());
        assert_int_equal(with(TM_API_CHAT, "messages", messages), n <= 4096);
    }
    for (int n = 15; n <= 17; n++) {
        json_t *o = json_object();
        for (int i = 0; i < n; i++) {
            snprintf(key, sizeof key, "%d", i);
            json_object_set_new(o, key, json_string("v"));
        }
        assert_int_equal(with(TM_API_CHAT, "metadata", o), n <= 16);
    }
}

static void wording(void **state)
{
    (void)state;
    static const char *const rows[][3] = {
        {"temperature", "2.01", "The temperature `2.01` must be in [0, 2]."},
        {"top_p", "1.01", "The top_p `1.01` must be in (0, 1]."},
        {"n", "0", "The n `0` must be a positive int."},
        {"n", "129", "The n `129` must be in [1, 128]."},
        {"temperature", "\"1\"",
         "Invalid type for 'temperature': expected a number, got a string."},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        assert_false(with_text(TM_API_CHAT, rows[i][0], rows[i][1]));
        assert_string_equal(g_error.message, rows[i][2]);
    }
}

static void unknown_fields_are_named(void **state)
{
    (void)state;
    assert_true(with_text(TM_API_CHAT, "something_new", "{\"a\":[1,2]}"));
    assert_int_equal(g_unknown, 1);
    /* A field of the other route is unknown here. */
    assert_true(with_text(TM_API_CHAT, "echo", "5"));
    assert_int_equal(g_unknown, 1);
}

static void roots(void **state)
{
    (void)state;
    static const char *const roots[] = {"[]", "\"x\"", "null", "1", "true"};
    for (size_t i = 0; i < TM_ARRAY_LEN(roots); i++) {
        json_t *v;
        assert_int_equal(tm_json_parse(roots[i], strlen(roots[i]), &v, NULL), TM_OK);
        assert_false(parse(v, TM_API_CHAT));
        assert_int_equal(g_error.code, TM_API_INVALID_TYPE);
        json_decref(v);
    }
}

/* All pairs of fields at their extreme good values: no refusal but those of the rules between fields, and never
 * one that names a field that is not there. */
static void pairs(void **state)
{
    (void)state;
    static const char *const values[][2] = {
        {"n", "128"},
        {"stream", "true"},
        {"stream_options", "{\"include_usage\":true}"},
        {"logprobs", "true"},
        {"top_logprobs", "20"},
        {"max_tokens", "1"},
        {"min_tokens", "2"},
        {"stop", "[\"a\"]"},
        {"logit_bias", "{\"1\":1}"},
        {"temperature", "0"},
        {"top_p", "0"},
        {"ignore_eos", "true"},
        {"response_format", "{\"type\":\"text\"}"},
        {"tools", "[]"},
        {"continue_final_message", "true"},
        {"add_generation_prompt", "true"},
        {"max_completion_tokens", "1"},
        {"return_token_ids", "true"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(values); i++) {
        for (size_t k = 0; k < TM_ARRAY_LEN(values); k++) {
            json_t *body = base_body(TM_API_CHAT), *v;
            assert_int_equal(tm_json_parse(values[i][1], strlen(values[i][1]), &v, NULL), TM_OK);
            json_object_set_new(body, values[i][0], v);
            assert_int_equal(tm_json_parse(values[k][1], strlen(values[k][1]), &v, NULL), TM_OK);
            json_object_set_new(body, values[k][0], v);
            if (!parse(body, TM_API_CHAT))
                assert_true(strcmp(g_error.param, values[i][0]) == 0 ||
                            strcmp(g_error.param, values[k][0]) == 0);
            json_decref(body);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(null_is_absent),
        cmocka_unit_test(wrong_types),
        cmocka_unit_test(bounds),
        cmocka_unit_test(lengths),
        cmocka_unit_test(unsupported_fields),
        cmocka_unit_test(special_cases),
        cmocka_unit_test(many_entries),
        cmocka_unit_test(wording),
        cmocka_unit_test(unknown_fields_are_named),
        cmocka_unit_test(roots),
        cmocka_unit_test(pairs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
