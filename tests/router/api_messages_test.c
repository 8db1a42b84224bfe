/* Chat messages: what is refused and where, and what the template gets. */
#include "tests/router/api_harness.h"

#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "router/api/messages.h"

static json_t *parse(const char *text)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(text, strlen(text), &v, &err) != TM_OK)
        fail_msg("%s: %s", text, err.msg);
    return v;
}

static void accepted(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"\"hi\"", "[{\"role\":\"user\",\"content\":\"hi\"}]"},
        {"[{\"role\":\"developer\",\"content\":\"d\"}]",
         "[{\"role\":\"system\",\"content\":\"d\"}]"},
        {"[{\"role\":\"user\",\"content\":\"x\",\"name\":\"bob\",\"extra\":1}]",
         "[{\"role\":\"user\",\"content\":\"x\",\"name\":\"bob\"}]"},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\","
         "\"text\":\"b\"}]}]",
         "[{\"role\":\"user\",\"content\":\"a\\nb\"}]"},
        {"[{\"role\":\"assistant\",\"content\":[{\"type\":\"refusal\",\"refusal\":\"no\"}]}]",
         "[{\"role\":\"assistant\",\"content\":\"no\"}]"},
        {"[{\"role\":\"assistant\",\"content\":null,\"refusal\":\"no\"}]",
         "[{\"role\":\"assistant\",\"content\":\"\"}]"},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"reasoning\":\"r\"}]",
         "[{\"role\":\"assistant\",\"content\":\"a\",\"reasoning_content\":\"r\"}]"},
        {"[{\"role\":\"user\",\"content\":\"a\\u0000b\"}]",
         "[{\"role\":\"user\",\"content\":\"a\\u0000b\"}]"},
        {"[{\"role\":\"user\",\"content\":\"\"}]", "[{\"role\":\"user\",\"content\":\"\"}]"},
        {"[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c1\",\"type\":"
         "\"function\","
         "\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"x\\\":1}\"}},{\"id\":\"c2\",\"type\":"
         "\"function\","
         "\"function\":{\"name\":\"g\",\"arguments\":\"\"}}]},"
         "{\"role\":\"tool\",\"tool_call_id\":\"c1\",\"content\":\"42\"}]",
         "[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c1\",\"type\":"
         "\"function\","
         "\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1}}},{\"id\":\"c2\",\"type\":"
         "\"function\","
         "\"function\":{\"name\":\"g\",\"arguments\":{}}}]},"
         "{\"role\":\"tool\",\"content\":\"42\",\"tool_call_id\":\"c1\"}]"},
        /* arguments of a call that was cut */
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{\"id\":\"x\",\"function\":{"
         "\"name\":\"f\",\"arguments\":\"{\\\"a\"}},{\"id\":\"y\",\"function\":{\"name\":\"f\","
         "\"arguments\":\"[1]\"}}]}]",
         "[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{\"id\":\"x\",\"type\":"
         "\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"{\\\"a\"}},{\"id\":\"y\","
         "\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":\"[1]\"}}]}]"},
        {"[{\"role\":\"assistant\",\"content\":null,\"function_call\":{\"name\":\"f\","
         "\"arguments\":"
         "\"{}\"}}]",
         "[{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"type\":\"function\","
         "\"function\":{\"name\":\"f\",\"arguments\":{}}}]}]"},
        {"[{\"role\":\"function\",\"name\":\"f\",\"content\":\"42\"}]",
         "[{\"role\":\"tool\",\"content\":\"42\",\"name\":\"f\"}]"},
    };
    tm_api_limits limits = tm_api_limits_default();
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        json_t *in = parse(rows[i][0]), *want = parse(rows[i][1]), *out = NULL;
        tm_api_error e;
        if (!tm_api_messages(in, &limits, &out, &e))
            fail_msg("%s: %s", rows[i][0], e.message);
        if (!json_equal(out, want))
            fail_msg("%s became %s", rows[i][0], json_dumps(out, 0));
        json_decref(out);
        json_decref(in);
        json_decref(want);
    }
}

static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *in, *param;
        tm_api_code code;
    } rows[] = {
        {"[]", "messages", TM_API_INVALID_VALUE},
        {"[5]", "messages[0]", TM_API_INVALID_TYPE},
        {"[{}]", "messages[0].role", TM_API_MISSING},
        {"[{\"role\":5}]", "messages[0].role", TM_API_INVALID_TYPE},
        {"[{\"role\":\"\"}]", "messages[0].role", TM_API_INVALID_VALUE},
        {"[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"boss\",\"content\":\"a\"}]",
         "messages[1].role", TM_API_INVALID_VALUE},
        {"[{\"role\":\"user\"}]", "messages[0].content", TM_API_MISSING},
        {"[{\"role\":\"user\",\"content\":null}]", "messages[0].content", TM_API_MISSING},
        {"[{\"role\":\"user\",\"content\":5}]", "messages[0].content", TM_API_INVALID_TYPE},
        {"[{\"role\":\"user\",\"content\":{}}]", "messages[0].content", TM_API_INVALID_TYPE},
        {"[{\"role\":\"user\",\"content\":[]}]", "messages[0].content", TM_API_INVALID_VALUE},
        {"[{\"role\":\"user\",\"content\":[5]}]", "messages[0].content[0]", TM_API_INVALID_TYPE},
        {"[{\"role\":\"user\",\"content\":[{}]}]", "messages[0].content[0].type", TM_API_MISSING},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]", "messages[0].content[0].text",
         TM_API_MISSING},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":1}]}]",
         "messages[0].content[0].text", TM_API_INVALID_TYPE},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]",
         "messages[0].content[0].type", TM_API_UNSUPPORTED},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"input_audio\"}]}]",
         "messages[0].content[0].type", TM_API_UNSUPPORTED},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"refusal\",\"refusal\":\"x\"}]}]",
         "messages[0].content[0].type", TM_API_INVALID_VALUE},
        {"[{\"role\":\"user\",\"content\":[{\"type\":\"poem\"}]}]", "messages[0].content[0].type",
         TM_API_INVALID_VALUE},
        {"[{\"role\":\"user\",\"content\":\"a\",\"name\":5}]", "messages[0].name",
         TM_API_INVALID_TYPE},
        {"[{\"role\":\"assistant\"}]", "messages[0].content", TM_API_MISSING},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"reasoning_content\":5}]",
         "messages[0].reasoning_content", TM_API_INVALID_TYPE},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":{}}]", "messages[0].tool_calls",
         TM_API_INVALID_TYPE},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[5]}]",
         "messages[0].tool_calls[0]", TM_API_INVALID_TYPE},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{}]}]",
         "messages[0].tool_calls[0].id", TM_API_MISSING},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{\"id\":\"x\"}]}]",
         "messages[0].tool_calls[0].function", TM_API_INVALID_TYPE},
        {"[{\"role\":\"assistant\",\"content\":\"a\",\"tool_calls\":[{\"id\":\"x\",\"function\":{"
         "\"name\":\"f\"}}]}]",
         "messages[0].tool_calls[0].function.arguments", TM_API_MISSING},
        {"[{\"role\":\"tool\",\"content\":\"a\"}]", "messages[0].tool_call_id", TM_API_MISSING},
        {"[{\"role\":\"tool\",\"content\":\"a\",\"tool_call_id\":\"x\"}]",
         "messages[0].tool_call_id", TM_API_INVALID_VALUE},
        {"[{\"role\":\"function\",\"content\":\"a\"}]", "messages[0].name", TM_API_MISSING},
    };
    tm_api_limits limits = tm_api_limits_default();
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        json_t *in = parse(rows[i].in), *out = NULL;
        tm_api_error e = {0};
        if (tm_api_messages(in, &limits, &out, &e))
            fail_msg("%s: accepted", rows[i].in);
        assert_null(out);
        if (strcmp(e.param, rows[i].param) != 0 || e.code != rows[i].code)
            fail_msg("%s: %s, %s", rows[i].in, e.param, e.message);
        json_decref(in);
    }
}

static void part_limit(void **state)
{
    (void)state;
    tm_api_limits limits = tm_api_limits_default();
    for (int n = 63; n <= 65; n++) {
        json_t *parts = json_array(), *out = NULL;
        tm_api_error e;
        for (int i = 0; i < n; i++)
            json_array_append_new(parts, json_pack("{s:s, s:s}", "type", "text", "text", "x"));
        json_t *in = json_pack("[{s:s, s:o}]", "role", "user", "content", parts);
        assert_int_equal(tm_api_messages(in, &limits, &out, &e), n <= 64);
        json_decref(out);
        json_decref(in);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(accepted),
        cmocka_unit_test(refused),
        cmocka_unit_test(part_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
