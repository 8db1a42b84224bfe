/* Tools and reasoning over HTTP: what reaches the template, what comes back as a whole and as a stream. */
#include "tests/router/api_tools.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

static rig g_rig;

static int start(void **state)
{
    (void)state;
    rig_start_model(&g_rig, template_text, NULL, NULL, NULL);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    rig_stop(&g_rig);
    return 0;
}

static const json_t *post(answer *a, const char *body)
{
    rig_post(&g_rig, a, CHAT, body);
    if (a->status != 200)
        fail_msg("%d: %s", a->status, a->body.data);
    return answer_json(a);
}

static void assert_prompt_ends(const char *end)
{
    char *text = fake_prompt(fake.gen_count - 1);
    size_t len = strlen(text), n = strlen(end);
    if (len < n || strcmp(text + len - n, end) != 0)
        fail_msg("%s\nshould end in\n%s", text, end);
    free(text);
}

/* ---- streams put together ---- */

typedef struct joined {
    tm_buf content, reasoning, args[8];
    char name[8][32], id[8][40];
    int calls, deltas;
    char finish[32];
} joined;

static void join_call(joined *j, const json_t *call)
{
    int64_t i = int_at(call, "index");
    assert_true(i >= 0 && i < 8);
    if (i == j->calls) { /* the first delta says everything but the arguments */
        j->calls++;
        snprintf(j->id[i], sizeof j->id[i], "%s", str_at(call, "id"));
        assert_string_equal(str_at(call, "type"), "function");
        snprintf(j->name[i], sizeof j->name[i], "%s", str_at(call, "function.name"));
        assert_string_equal(str_at(call, "function.arguments"), "");
        return;
    }
    assert_int_equal(i, j->calls - 1);
    assert_null(json_object_get(call, "id"));
    assert_null(json_object_get(call, "type"));
    assert_null(json_object_get(json_object_get(call, "function"), "name"));
    tm_buf_puts(&j->args[i], str_at(call, "function.arguments"));
}

static void join_delta(joined *j, const json_t *delta)
{
    const json_t *content = json_object_get(delta, "content"),
                 *reasoning = json_object_get(delta, "reasoning_content"),
                 *calls = json_object_get(delta, "tool_calls");
    assert_string_equal(str_at(delta, "role"), "assistant");
    assert_int_equal(json_object_size(delta), 2); /* the role and one of the three */
    if (content)
        tm_buf_puts(&j->content, json_string_value(content));
    if (reasoning)
        tm_buf_puts(&j->reasoning, json_string_value(reasoning));
    for (size_t i = 0; i < json_array_size(calls); i++)
        join_call(j, json_array_get(calls, i));
    j->deltas++;
}

static void join(joined *j, answer *a, int index)
{
    char *line = a->body.data, *end;
    memset(j, 0, sizeof *j);
    for (; (end = strstr(line, "\n\n")) != NULL; line = end + 2) {
        json_t *chunk;
        if (strncmp(line, "data: {", 7) != 0)
            continue;
        assert_int_equal(tm_json_parse(line + 6, (size_t)(end - line - 6), &chunk, NULL), TM_OK);
        const json_t *choice = json_array_get(json_object_get(chunk, "choices"), 0);
        if (choice && int_at(choice, "index") == index) {
            assert_string_equal(j->finish, "");
            join_delta(j, json_object_get(choice, "delta"));
            const json_t *finish = json_object_get(choice, "finish_reason");
            if (json_is_string(finish))
                snprintf(j->finish, sizeof j->finish, "%s", json_string_value(finish));
        }
        json_decref(chunk);
    }
}

static void drop(joined *j)
{
    tm_buf_deinit(&j->content);
    tm_buf_deinit(&j->reasoning);
    for (int i = 0; i < 8; i++)
        tm_buf_deinit(&j->args[i]);
}

static const char *text_of(const tm_buf *b)
{
    return b->data ? b->data : "";
}

/* ---- tests ---- */

static void whole_answer(void **state)
{
    (void)state;
    answer a;
    fake_answer("Let me see.\n" CALL("weather", PARIS) "\n" CALL("now", "{}"), true);
    const json_t *o = post(&a, BODY(TOOLS));
    const json_t *m = at(o, "choices.0.message");
    assert_string_equal(str_at(m, "content"), "Let me see.");
    assert_int_equal(json_array_size(at(m, "tool_calls")), 2);
    assert_memory_equal(str_at(m, "tool_calls.0.id"), "call_", 5);
    assert_string_equal(str_at(m, "tool_calls.0.type"), "function");
    assert_string_equal(str_at(m, "tool_calls.0.function.name"), "weather");
    assert_string_equal(str_at(m, "tool_calls.0.function.arguments"), PARIS);
    assert_string_equal(str_at(m, "tool_calls.1.function.name"), "now");
    assert_string_equal(str_at(m, "tool_calls.1.function.arguments"), "{}");
    assert_string_not_equal(str_at(m, "tool_calls.0.id"), str_at(m, "tool_calls.1.id"));
    assert_null(json_object_get(m, "reasoning_content"));
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "tool_calls");
    assert_int_equal(int_at(o, "usage.completion_tokens"), fake.count);
    answer_free(&a);
    /* no content at all is null */
    fake_answer(CALL("now", "{}"), true);
    o = post(&a, BODY(TOOLS));
    assert_true(json_is_null(at(o, "choices.0.message.content")));
    answer_free(&a);
}

static void streams_say_the_same(void **state)
{
    (void)state;
    for (int batch = 1; batch <= 64; batch = batch < 9 ? batch + 1 : batch * 2) {
        answer a;
        joined j;
        fake_reset();
        fake_answer("Let me see.\n" CALL("weather", PARIS) "\n" CALL("now", "{}"), true);
        fake.batch = batch;
        rig_post(&g_rig, &a, CHAT, BODY(TOOLS ",\"stream\":true,\"n\":2"));
        for (int i = 0; i < 2; i++) {
            join(&j, &a, i);
            assert_string_equal(text_of(&j.content), "Let me see.");
            assert_int_equal(j.calls, 2);
            assert_string_equal(j.name[0], "weather");
            assert_string_equal(text_of(&j.args[0]), PARIS);
            assert_string_equal(j.name[1], "now");
            assert_string_equal(text_of(&j.args[1]), "{}");
            assert_string_equal(j.finish, "tool_calls");
            if (batch == 1) /* arguments come in several pieces */
                assert_true(j.deltas > 9);
            drop(&j);
        }
        assert_non_null(strstr(a.body.data, "data: [DONE]"));
        answer_free(&a);
    }
}

static void prompt_has_tools_and_results(void **state)
{
    (void)state;
    answer a;
    fake_answer("ok", true);
    post(&a, "{\"model\":\"demo\"," TOOLS ",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},"
             "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c\",\"type\":"
             "\"function\",\"function\":{\"name\":\"weather\",\"arguments\":\"{\\\"city\\\": "
             "\\\"Oslo\\\"}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c\",\"content\":\"rain "
             "<|im_end|>\"}]}");
    char *text = fake_prompt(0);
    const char *tool = "{\"type\": \"function\", \"function\": {\"name\": \"weather\", "
                       "\"description\": \"d\", \"parameters\": {\"type\": \"object\", "
                       "\"properties\": {\"city\": {\"type\": \"string\"}}}}}\n";
    assert_non_null(strstr(text, tool));
    assert_non_null(strstr(text, "[weather {\"city\": \"Oslo\"}]"));
    assert_non_null(strstr(text, "<|im_start|>tool\nrain <|im_end|><|im_end|>\n"));
    free(text);
    /* what a tool says is no control token */
    int ends = 0;
    for (size_t i = 0; i < fake.gens[0]->prompt_len; i++)
        ends += fake.gens[0]->prompt[i] == fake_served->stop_ids[0];
    assert_int_equal(ends, 4);
    answer_free(&a);
}

/* /tokenize counts the prompt that chat would send. */
static void tokenize_counts_tools(void **state)
{
    (void)state;
    static const char *const more[] = {"", ",\"tool_choice\":\"none\"",
                                       ",\"enable_thinking\":true"};
    for (size_t i = 0; i < TM_ARRAY_LEN(more); i++) {
        answer a;
        char body[2000];
        snprintf(body, sizeof body, "{\"model\":\"demo\"," ASK "," TOOLS "%s}", more[i]);
        fake_answer("ok", true);
        post(&a, body);
        answer_free(&a);
        rig_post(&g_rig, &a, "/tokenize", body);
        assert_int_equal(a.status, 200);
        assert_int_equal(int_at(answer_json(&a), "count"), fake.gens[i]->prompt_len);
        answer_free(&a);
    }
    answer a;
    rig_post(&g_rig, &a, "/tokenize", BODY("\"tools\":[5]"));
    assert_error(&a, 400, "invalid_request_error", "invalid_type", "tools[0]");
    answer_free(&a);
}

static void choice_none(void **state)
{
    (void)state;
    answer a;
    fake_answer(CALL("now", "{}"), true);
    const json_t *o = post(&a, BODY(TOOLS ",\"tool_choice\":\"none\""));
    char *text = fake_prompt(0);
    assert_null(strstr(text, "weather"));
    free(text);
    assert_string_equal(str_at(o, "choices.0.message.content"), CALL("now", "{}"));
    assert_null(json_object_get(at(o, "choices.0.message"), "tool_calls"));
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    answer_free(&a);
}

static void forced(const char *choice, const char *end, const char *text, const char *name,
                   const char *args)
{
    answer a;
    char body[2000];
    joined j;
    fake_reset();
    fake_answer(text, true);
    snprintf(body, sizeof body, "{\"model\":\"demo\"," ASK "," TOOLS ",\"tool_choice\":%s}",
             choice);
    const json_t *o = post(&a, body);
    assert_prompt_ends(end);
    assert_int_equal(json_array_size(at(o, "choices.0.message.tool_calls")), 1);
    assert_string_equal(str_at(o, "choices.0.message.tool_calls.0.function.name"), name);
    assert_string_equal(str_at(o, "choices.0.message.tool_calls.0.function.arguments"), args);
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "tool_calls");
    answer_free(&a);
    snprintf(body, sizeof body,
             "{\"model\":\"demo\"," ASK "," TOOLS ",\"stream\":true,\"tool_choice\":%s}", choice);
    rig_post(&g_rig, &a, CHAT, body);
    join(&j, &a, 0);
    assert_int_equal(j.calls, 1);
    assert_string_equal(j.name[0], name);
    assert_string_equal(text_of(&j.args[0]), args);
    drop(&j);
    answer_free(&a);
}

#define BEGUN "<|im_start|>assistant\n<tool_call>\n{\"name\": \""

static void choice_required_and_named(void **state)
{
    (void)state;
    forced("\"required\"", BEGUN, "now\", \"arguments\": {}}\n</tool_call>", "now", "{}");
    forced("{\"type\":\"function\",\"function\":{\"name\":\"weather\"}}",
           BEGUN "weather\", \"arguments\":", " " PARIS "}\n</tool_call>\n" CALL("now", "{}"),
           "weather", PARIS);
    forced(
        "{\"type\":\"allowed_tools\",\"allowed_tools\":{\"mode\":\"required\",\"tools\":[{\"type\":"
        "\"function\",\"function\":{\"name\":\"now\"}}]}}",
        BEGUN "now\", \"arguments\":", " {}}", "now", "{}");
    /* reasoning that the template opened is closed first */
    answer a;
    fake_reset();
    fake_answer(" {}}", true);
    post(&a, BODY(TOOLS ",\"enable_thinking\":true,\"tool_choice\":{\"type\":\"function\","
                        "\"function\":{\"name\":\"now\"}}"));
    assert_prompt_ends("<think>\n\n</think>\n\n<tool_call>\n{\"name\": \"now\", \"arguments\":");
    answer_free(&a);
    /* a name that is not among the tools is no call */
    fake_answer("then\", \"arguments\": {}}", true);
    const json_t *o = post(&a, BODY(TOOLS ",\"tool_choice\":\"required\""));
    assert_string_equal(str_at(o, "choices.0.message.content"),
                        "<tool_call>\n{\"name\": \"then\", \"arguments\": {}}");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    answer_free(&a);
}

static void one_call_at_most(void **state)
{
    (void)state;
    answer a;
    fake_answer(CALL("weather", PARIS) "\n" CALL("now", "{}"), true);
    const json_t *o = post(&a, BODY(TOOLS ",\"parallel_tool_calls\":false"));
    assert_int_equal(json_array_size(at(o, "choices.0.message.tool_calls")), 1);
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "tool_calls");
    assert_int_equal(fake.cancels, 1); /* the rest is not generated */
    answer_free(&a);
}

static void reasoning(void **state)
{
    (void)state;
    answer a;
    joined j;
    fake_answer("Hm, so.\n</think>\n\nIt is.", true);
    const json_t *o = post(&a, BODY("\"enable_thinking\":true"));
    assert_prompt_ends("assistant\n<think>\n");
    assert_string_equal(str_at(o, "choices.0.message.reasoning_content"), "Hm, so.");
    assert_string_equal(str_at(o, "choices.0.message.content"), "It is.");
    int64_t tokens = int_at(o, "usage.completion_tokens_details.reasoning_tokens");
    assert_true(tokens >= 3 && tokens < fake.count - 2);
    answer_free(&a);
    rig_post(&g_rig, &a, CHAT, BODY("\"enable_thinking\":true,\"stream\":true"));
    join(&j, &a, 0);
    assert_string_equal(text_of(&j.reasoning), "Hm, so.");
    assert_string_equal(text_of(&j.content), "It is.");
    assert_string_equal(j.finish, "stop");
    drop(&j);
    answer_free(&a);
    /* never closed: there is no content */
    fake_answer("<think>Hm", false);
    o = post(&a, BODY(TOOLS));
    assert_string_equal(str_at(o, "choices.0.message.reasoning_content"), "Hm");
    assert_string_equal(str_at(o, "choices.0.message.content"), "");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "length");
    answer_free(&a);
    /* reasoning, then a call */
    fake_answer("<think>\nI call.\n</think>\n\n" CALL("now", "{}"), true);
    o = post(&a, BODY(TOOLS));
    assert_string_equal(str_at(o, "choices.0.message.reasoning_content"), "I call.");
    assert_true(json_is_null(at(o, "choices.0.message.content")));
    assert_string_equal(str_at(o, "choices.0.message.tool_calls.0.function.name"), "now");
    answer_free(&a);
    /* an answer that is continued inside of its reasoning */
    fake_answer(" more</think>Yes", true);
    o = post(
        &a, "{\"model\":\"demo\",\"continue_final_message\":true,\"messages\":[{\"role\":"
            "\"user\",\"content\":\"hi\"},{\"role\":\"assistant\",\"content\":\"<think>a bit\"}]}");
    assert_string_equal(str_at(o, "choices.0.message.reasoning_content"), "more");
    assert_string_equal(str_at(o, "choices.0.message.content"), "Yes");
    answer_free(&a);
}

static void cut_and_malformed(void **state)
{
    (void)state;
    answer a;
    joined j;
    const char *broken = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": Paris}}";
    fake_answer("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Pa", false);
    const json_t *o = post(&a, BODY(TOOLS));
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "length");
    assert_string_equal(str_at(o, "choices.0.message.tool_calls.0.function.arguments"),
                        "{\"city\": \"Pa");
    answer_free(&a);
    fake_answer(broken, true);
    o = post(&a, BODY(TOOLS));
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    assert_string_equal(str_at(o, "choices.0.message.content"), broken);
    assert_null(json_object_get(at(o, "choices.0.message"), "tool_calls"));
    answer_free(&a);
    /* a stream cannot take the call back, but the text is whole */
    rig_post(&g_rig, &a, CHAT, BODY(TOOLS ",\"stream\":true"));
    join(&j, &a, 0);
    assert_string_equal(text_of(&j.content), broken);
    assert_string_equal(j.finish, "stop");
    drop(&j);
    answer_free(&a);
}

static void stop_strings_and_logprobs(void **state)
{
    (void)state;
    answer a;
    fake_answer("Well. STOP " CALL("now", "{}"), true);
    const json_t *o = post(&a, BODY(TOOLS ",\"stop\":\"STOP\""));
    assert_string_equal(str_at(o, "choices.0.message.content"), "Well. ");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    answer_free(&a);
    const char *text = "See:\n" CALL("weather", PARIS);
    fake_answer(text, true);
    o = post(&a, BODY(TOOLS ",\"logprobs\":true"));
    tm_buf all;
    tm_buf_init(&all, 0);
    const json_t *list = at(o, "choices.0.logprobs.content");
    for (size_t i = 0; i < json_array_size(list); i++)
        tm_buf_puts(&all, str_at(json_array_get(list, i), "token"));
    assert_string_equal(all.data, text); /* records are of all tokens, marks too */
    tm_buf_deinit(&all);
    answer_free(&a);
}

static void old_functions(void **state)
{
    (void)state;
    answer a;
    const char *old = BODY("\"functions\":[{\"name\":\"now\"},{\"name\":\"weather\"}]");
    fake_answer(CALL("weather", PARIS) CALL("now", "{}"), true);
    const json_t *o = post(&a, old);
    assert_string_equal(str_at(o, "choices.0.message.function_call.name"), "weather");
    assert_string_equal(str_at(o, "choices.0.message.function_call.arguments"), PARIS);
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "function_call");
    answer_free(&a);
    rig_post(&g_rig, &a, CHAT,
             BODY("\"stream\":true,\"functions\":[{\"name\":\"now\"}],\"function_call\":{\"name\":"
                  "\"now\"}"));
    assert_prompt_ends(BEGUN "now\", \"arguments\":");
    answer_free(&a);
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        const char *more, *param, *code;
    } rows[] = {
        {TOOLS ",\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"x\"}}",
         "tool_choice", "invalid_value"},
        {TOOLS ",\"tool_choice\":{\"type\":\"allowed_tools\",\"allowed_tools\":{\"mode\":\"auto\","
               "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"x\"}}]}}",
         "tool_choice", "invalid_value"},
        {"\"tools\":[" NOW "," NOW "]", "tools", "invalid_value"},
        {TOOLS ",\"functions\":[{\"name\":\"f\"}]", "functions", "invalid_value"},
        {TOOLS ",\"tool_choice\":\"required\",\"add_generation_prompt\":false", "tool_choice",
         "unsupported_feature"},
        {"\"tool_choice\":\"required\"", "tool_choice", "invalid_value"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        answer a;
        char body[2000];
        snprintf(body, sizeof body, "{\"model\":\"demo\"," ASK ",%s}", rows[i].more);
        rig_post(&g_rig, &a, CHAT, body);
        assert_error(&a, 400, "invalid_request_error", rows[i].code, rows[i].param);
        answer_free(&a);
    }
    assert_int_equal(fake.gen_count, 0);
}

static void limits(void **state)
{
    (void)state;
    for (int count = 128; count <= 129; count++) {
        for (int len = 64; len <= 65; len++) {
            answer a;
            char name[80];
            tm_buf body;
            tm_buf_init(&body, 0);
            memset(name, 'n', sizeof name);
            name[len] = 0;
            tm_buf_puts(&body, "{\"model\":\"demo\"," ASK ",\"tools\":[");
            for (int i = 0; i < count; i++)
                tm_buf_printf(&body, "%s{\"type\":\"function\",\"function\":{\"name\":\"%s%d\"}}",
                              i ? "," : "", i ? "f" : name + 1, i);
            tm_buf_puts(&body, "],\"tool_choice\":\"none\"}");
            fake_answer("ok", true);
            rig_post(&g_rig, &a, CHAT, body.data);
            if (count == 128 && len == 64)
                assert_int_equal(a.status, 200);
            else
                assert_error(&a, 400, "invalid_request_error", "invalid_value",
                             count > 128 ? "tools" : "tools[0].function.name");
            answer_free(&a);
            tm_buf_deinit(&body);
        }
    }
}

static void schema_limit(void **state)
{
    (void)state;
    const size_t max = (size_t)256 << 10, around = strlen("{\"x\":\"\"}");
    for (size_t size = max; size <= max + 1; size++) {
        answer a;
        tm_buf body;
        tm_buf_init(&body, 0);
        tm_buf_puts(&body,
                    "{\"model\":\"demo\"," ASK ",\"tool_choice\":\"none\",\"tools\":[{\"type\":"
                    "\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"x\":\"");
        for (size_t i = around; i < size; i++)
            tm_buf_putc(&body, 'x');
        tm_buf_puts(&body, "\"}}}]}");
        fake_answer("ok", true);
        rig_post(&g_rig, &a, CHAT, body.data);
        if (size == max)
            assert_int_equal(a.status, 200);
        else
            assert_error(&a, 400, "invalid_request_error", "invalid_value",
                         "tools[0].function.parameters");
        answer_free(&a);
        tm_buf_deinit(&body);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(whole_answer, start, stop),
        cmocka_unit_test_setup_teardown(streams_say_the_same, start, stop),
        cmocka_unit_test_setup_teardown(prompt_has_tools_and_results, start, stop),
        cmocka_unit_test_setup_teardown(tokenize_counts_tools, start, stop),
        cmocka_unit_test_setup_teardown(choice_none, start, stop),
        cmocka_unit_test_setup_teardown(choice_required_and_named, start, stop),
        cmocka_unit_test_setup_teardown(one_call_at_most, start, stop),
        cmocka_unit_test_setup_teardown(reasoning, start, stop),
        cmocka_unit_test_setup_teardown(cut_and_malformed, start, stop),
        cmocka_unit_test_setup_teardown(stop_strings_and_logprobs, start, stop),
        cmocka_unit_test_setup_teardown(old_functions, start, stop),
        cmocka_unit_test_setup_teardown(refusals, start, stop),
        cmocka_unit_test_setup_teardown(limits, start, stop),
        cmocka_unit_test_setup_teardown(schema_limit, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
