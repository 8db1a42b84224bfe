/* Tools and templates that differ: no place for tools, parsers by name, stops and instructions of templates. */
#include "tests/router/api_tools.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"

static rig g_rig;

static void start_with(const char *template, const char *tools, const char *reason,
                       const char *meta)
{
    rig_start_model(&g_rig, template, tools, reason, meta);
}

static const json_t *post(answer *a, const char *body)
{
    rig_post(&g_rig, a, CHAT, body);
    if (a->status != 200)
        fail_msg("%d: %s", a->status, a->body.data);
    return answer_json(a);
}

static void without_a_place_for_tools(void **state)
{
    (void)state;
    answer a;
    start_with(NULL, NULL, NULL, NULL);
    rig_post(&g_rig, &a, CHAT, BODY(TOOLS));
    assert_error(&a, 400, "invalid_request_error", "unsupported_feature", "tools");
    answer_free(&a);
    fake_answer("ok", true);
    post(&a, BODY(TOOLS ",\"tool_choice\":\"none\""));
    answer_free(&a);
    rig_stop(&g_rig);
}

static void parsers_off(void **state)
{
    (void)state;
    answer a;
    start_with(template_text, "none", "none", NULL);
    fake_answer("<think>a</think>" CALL("now", "{}"), true);
    const json_t *o = post(&a, BODY(TOOLS));
    assert_string_equal(str_at(o, "choices.0.message.content"),
                        "<think>a</think>" CALL("now", "{}"));
    answer_free(&a);
    rig_post(&g_rig, &a, CHAT, BODY(TOOLS ",\"tool_choice\":\"required\""));
    assert_error(&a, 400, "invalid_request_error", "unsupported_feature", "tool_choice");
    answer_free(&a);
    rig_stop(&g_rig);
}

static void named_parser(void **state)
{
    (void)state;
    answer a;
    start_with(template_text, "mistral", NULL, NULL);
    fake_answer("[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]", true);
    const json_t *o = post(&a, BODY(TOOLS));
    assert_int_equal(strlen(str_at(o, "choices.0.message.tool_calls.0.id")), 9);
    answer_free(&a);
    rig_stop(&g_rig);
}

static void stops_of_the_template(void **state)
{
    (void)state;
    answer a;
    start_with("vicuna", NULL, NULL, "Be brief.");
    fake_answer("Hello</s> and more", true);
    const json_t *o = post(&a, BODY("\"temperature\":0"));
    assert_string_equal(str_at(o, "choices.0.message.content"), "Hello");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    char *text = fake_prompt(0);
    assert_string_equal(text, "Be brief. USER: hi ASSISTANT: ");
    free(text);
    answer_free(&a);
    post(&a, BODY("\"ignore_eos\":true,\"max_tokens\":4"));
    answer_free(&a);
    rig_stop(&g_rig);
    /* a special token is no text: it ends the answer by its id */
    start_with("chatml", NULL, NULL, NULL);
    fake_answer("Hello", true);
    post(&a, BODY("\"stop_token_ids\":[77]"));
    assert_int_equal(fake.gens[0]->stop_count, 2);
    assert_int_equal(fake.gens[0]->stop_ids[0], 77);
    assert_int_equal(fake.gens[0]->stop_ids[1], 2);
    answer_free(&a);
    rig_stop(&g_rig);
}

static void meta_instruction(void **state)
{
    (void)state;
    answer a;
    start_with(template_text, NULL, NULL, "Be brief.");
    fake_answer("ok", true);
    post(&a, BODY("\"n\":1"));
    char *text = fake_prompt(0);
    assert_memory_equal(text, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi", 53);
    free(text);
    answer_free(&a);
    post(&a, "{\"model\":\"demo\",\"messages\":[{\"role\":\"system\",\"content\":\"own\"}]}");
    text = fake_prompt(1);
    assert_null(strstr(text, "brief"));
    free(text);
    answer_free(&a);
    rig_stop(&g_rig);
}

/* Templates that want arguments as text, every content as a string, or every function described are given what
 * they want, and none is not printed as a word. */
static void picky_templates(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '<' + c.function.arguments + "
         "'>' "
         "}}{% endfor %}{% endfor %}{# tools #}",
         "<{\"a\": 1}>"},
        {"{% for m in messages %}{{ '(' + m.content + ')' }}{% endfor %}{# tools #}", "(hi)()"},
        {"{% for m in messages %}{{ '(' + m.content + ')' }}{% for c in m.tool_calls or [] %}{{ "
         "'<' + "
         "c.function.arguments + '>' }}{% endfor %}{% endfor %}{# tools #}",
         "(hi)()<{\"a\": 1}>"},
        {"{% for t in tools %}{{ t.function.name ~ t.function.description.strip() ~ "
         "(t.function.parameters.properties | length) }} {% endfor %}",
         "weatherd1 now0 "},
        {"{% for m in messages %}({{ m.content }}){% endfor %}{# tools #}", "(hi)()"},
        {"{% for m in messages %}{% if m.content is none %}-{% endif %}{% endfor %}None{# tools #}",
         "-None"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        answer a;
        start_with(rows[i][0], NULL, NULL, NULL);
        fake_answer("ok", true);
        post(&a,
             "{\"model\":\"demo\"," TOOLS ",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{"
             "\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c\",\"type\":"
             "\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\\\": 1}\"}}]}]}");
        char *text = fake_prompt(0);
        assert_string_equal(text, rows[i][1]);
        free(text);
        answer_free(&a);
        rig_stop(&g_rig);
    }
}

/* A call and its result through templates as they were published, and how each writes the call. */
static void published_templates(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"Qwen-Qwen2.5-7B-Instruct",
         "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>"},
        {"Qwen3.5-4B", "<function=weather>\n<parameter=city>\nOslo\n</parameter>"},
        {"meta-llama-Llama-3.1-8B-Instruct",
         "{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}"},
        {"mistralai-Mistral-Nemo-Instruct-2407",
         "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}"},
        {"vllm-tool-deepseekr1", "weather\n```json\n{\"city\": \"Oslo\"}\n```"},
        {"deepseek-ai-DeepSeek-V3.2", "name=\"city\" string=\"true\">Oslo<"},
        {"vllm-tool-internlm2_tool", "<|plugin|>\n{\"name\": \"weather\", "},
        {"GLM-4.6", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>"},
        {"ByteDance-Seed-OSS", "<function=weather>\n<parameter=city>Oslo"},
        {"NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "\"name\": \"weather\""},
        {"vllm-tool-hermes", "\"name\": \"weather\""},
        {"ibm-granite-granite-3.3-2B-Instruct", "\"name\": \"now\""},
    };
    const char *shared = getenv("TM_SHARED");
    char dir[400];
    snprintf(dir, sizeof(dir), "%s/testdata/chat_templates", shared ? shared : "");
    if (!tm_dir_exists(dir)) {
        print_message("TM_SHARED has no testdata/chat_templates: skipped\n");
        skip();
    }
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        answer a;
        char path[600];
        snprintf(path, sizeof path, "%s/%s.jinja", dir, rows[i][0]);
        start_with(path, NULL, NULL, NULL);
        fake_answer("ok", true);
        post(&a,
             "{\"model\":\"demo\"," TOOLS ",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"},{"
             "\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"call12345\","
             "\"type\":\"function\",\"function\":{\"name\":\"weather\",\"arguments\":\"{"
             "\\\"city\\\": "
             "\\\"Oslo\\\"}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"call12345\",\"content\":"
             "\"rain\"}]}");
        char *text = fake_prompt(0);
        if (!strstr(text, rows[i][1]) || !strstr(text, "rain") || strstr(text, "None"))
            fail_msg("%s: %s", rows[i][0], text);
        free(text);
        answer_free(&a);
        rig_stop(&g_rig);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_place_for_tools),
        cmocka_unit_test(parsers_off),
        cmocka_unit_test(named_parser),
        cmocka_unit_test(stops_of_the_template),
        cmocka_unit_test(meta_instruction),
        cmocka_unit_test(picky_templates),
        cmocka_unit_test(published_templates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
