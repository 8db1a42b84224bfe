/* Whole answers: their form, prompts of every kind, n, echo, logprobs, token ids, usage. */
#include "tests/router/api_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

#define COMPLETIONS "/v1/completions"
#define CHAT        "/v1/chat/completions"

static rig g_rig;

static int start(void **state)
{
    (void)state;
    rig_start(&g_rig, NULL);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    rig_stop(&g_rig);
    return 0;
}

static const json_t *post(answer *a, const char *target, const char *body)
{
    rig_post(&g_rig, a, target, body);
    if (a->status != 200)
        fail_msg("%d: %s", a->status, a->body.data);
    return answer_json(a);
}

static void chat_form(void **state)
{
    (void)state;
    answer a;
    fake_answer("Hello there.", true);
    fake.cached = 2;
    const json_t *o =
        post(&a, CHAT,
             "{\"model\":\"demo\",\"messages\":[{\"role\":\"system\",\"content\":\"s\"},"
             "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"hi\"}]}]}");
    assert_memory_equal(str_at(o, "id"), "chatcmpl-", 9);
    assert_string_equal(str_at(o, "object"), "chat.completion");
    assert_string_equal(str_at(o, "model"), "demo");
    assert_true(int_at(o, "created") > 1700000000);
    assert_string_equal(str_at(o, "system_fingerprint"), "tm-0123456789ab");
    assert_int_equal(json_array_size(at(o, "choices")), 1);
    assert_int_equal(int_at(o, "choices.0.index"), 0);
    assert_string_equal(str_at(o, "choices.0.message.role"), "assistant");
    assert_string_equal(str_at(o, "choices.0.message.content"), "Hello there.");
    assert_true(json_is_null(at(o, "choices.0.message.refusal")));
    assert_true(json_is_null(at(o, "choices.0.logprobs")));
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    int64_t prompt = (int64_t)fake.gens[0]->prompt_len;
    assert_int_equal(int_at(o, "usage.prompt_tokens"), prompt);
    assert_int_equal(int_at(o, "usage.completion_tokens"), fake.count);
    assert_int_equal(int_at(o, "usage.total_tokens"), prompt + fake.count);
    assert_int_equal(int_at(o, "usage.prompt_tokens_details.cached_tokens"), 2);
    assert_null(json_object_get(o, "prompt_token_ids"));
    answer_free(&a);
}

static void prompts_and_choices(void **state)
{
    (void)state;
    static const struct {
        const char *prompt;
        int prompts;
    } rows[] = {{"\"hi\"", 1},         {"[\"hi\"]", 1}, {"[\"a\",\"b\",\"c\"]", 3}, {"[17,18]", 1},
                {"[[17,18],[19]]", 2}, {"[[17]]", 1},   {"\"a\\u0000b\"", 1}};
    answer a;
    char body[200];
    fake_answer("x y", true);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        for (int n = 1; n <= 2; n++) {
            int before = fake.gen_count;
            snprintf(body, sizeof body, "{\"model\":\"demo\",\"prompt\":%s,\"n\":%d,\"seed\":9}",
                     rows[i].prompt, n);
            const json_t *o = post(&a, COMPLETIONS, body);
            int count = rows[i].prompts * n;
            assert_int_equal(json_array_size(at(o, "choices")), count);
            assert_int_equal(fake.gen_count - before, count);
            int64_t tokens = 0;
            for (int k = 0; k < count; k++) {
                const json_t *c = json_array_get(at(o, "choices"), (size_t)k);
                const tm_gen *g = fake.gens[before + k];
                assert_int_equal(int_at(c, "index"), k);
                assert_string_equal(str_at(c, "text"), "x y");
                assert_int_equal(g->sampling.choice, k % n);
                assert_int_equal(g->sampling.seed, 9);
                tokens += k % n == 0 ? (int64_t)g->prompt_len : 0;
            }
            assert_int_equal(int_at(o, "usage.prompt_tokens"), tokens);
            assert_int_equal(int_at(o, "usage.completion_tokens"), count * fake.count);
            answer_free(&a);
        }
}

static void echo_and_logprobs(void **state)
{
    (void)state;
    answer a;
    int32_t prompt[20];
    int n = fake_encode("Hello, world", prompt, 20);
    fake_answer(" and all", false);
    fake.top_count = 2;
    const json_t *o = post(&a, COMPLETIONS,
                           "{\"model\":\"demo\",\"prompt\":\"Hello, world\",\"echo\":true,"
                           "\"logprobs\":2,\"return_token_ids\":true}");
    assert_string_equal(str_at(o, "choices.0.text"), "Hello, world and all");
    size_t records = json_array_size(at(o, "choices.0.logprobs.tokens"));
    assert_int_equal(records, n + fake.count);
    assert_int_equal(json_array_size(at(o, "choices.0.logprobs.token_logprobs")), records);
    assert_int_equal(json_array_size(at(o, "choices.0.logprobs.top_logprobs")), records);
    assert_int_equal(json_array_size(at(o, "choices.0.logprobs.text_offset")), records);
    assert_true(json_is_null(at(o, "choices.0.logprobs.token_logprobs.0")));
    /* The offsets cut the text into the tokens. */
    const char *text = str_at(o, "choices.0.text");
    for (size_t i = 0; i < records; i++) {
        const char *token =
            json_string_value(json_array_get(at(o, "choices.0.logprobs.tokens"), i));
        json_int_t offset =
            json_integer_value(json_array_get(at(o, "choices.0.logprobs.text_offset"), i));
        assert_memory_equal(text + offset, token, strlen(token));
        if (i > 0)
            assert_true(json_real_value(
                            json_array_get(at(o, "choices.0.logprobs.token_logprobs"), i)) == -0.5);
    }
    assert_int_equal(json_array_size(at(o, "choices.0.prompt_token_ids")), n);
    assert_int_equal(json_array_size(at(o, "choices.0.token_ids")), fake.count);
    answer_free(&a);
    /* Scoring: the prompt alone. */
    o = post(&a, COMPLETIONS,
             "{\"model\":\"demo\",\"prompt\":\"Hello, world\",\"echo\":true,\"logprobs\":0,"
             "\"max_tokens\":0}");
    assert_string_equal(str_at(o, "choices.0.text"), "Hello, world");
    assert_int_equal(json_array_size(at(o, "choices.0.logprobs.tokens")), n);
    assert_int_equal(int_at(o, "usage.completion_tokens"), 0);
    answer_free(&a);
}

static void chat_extras(void **state)
{
    (void)state;
    answer a;
    fake_answer("a b c", true);
    fake.top_count = 3;
    const json_t *o = post(&a, CHAT,
                           "{\"model\":\"demo\",\"messages\":\"hi\",\"logprobs\":true,"
                           "\"top_logprobs\":3,\"return_token_ids\":true,\"n\":2}");
    assert_int_equal(json_array_size(at(o, "choices")), 2);
    assert_int_equal(json_array_size(at(o, "choices.1.logprobs.content")), fake.count - 1);
    assert_int_equal(json_array_size(at(o, "choices.1.logprobs.content.0.top_logprobs")), 3);
    assert_string_equal(str_at(o, "choices.1.logprobs.content.0.token"), "a");
    assert_int_equal(int_at(o, "choices.1.logprobs.content.0.bytes.0"), 'a');
    assert_int_equal(json_array_size(at(o, "choices.1.token_ids")), fake.count);
    assert_int_equal(json_array_size(at(o, "prompt_token_ids")), fake.gens[0]->prompt_len);
    assert_int_equal(int_at(o, "usage.completion_tokens"), 2 * fake.count);
    answer_free(&a);
}

static void stops_and_lengths(void **state)
{
    (void)state;
    answer a;
    fake_answer("one two three four", false);
    const json_t *o =
        post(&a, COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"x\",\"stop\":\"three\"}");
    assert_string_equal(str_at(o, "choices.0.text"), "one two ");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "stop");
    assert_int_equal(fake.cancels, 1);
    answer_free(&a);
    o = post(&a, COMPLETIONS,
             "{\"model\":\"demo\",\"prompt\":\"x\",\"stop\":[\"three\",\"zzz\"],"
             "\"include_stop_str_in_output\":true}");
    assert_string_equal(str_at(o, "choices.0.text"), "one two three");
    answer_free(&a);
    o = post(&a, COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"x\",\"max_tokens\":2}");
    assert_string_equal(str_at(o, "choices.0.finish_reason"), "length");
    assert_int_equal(int_at(o, "usage.completion_tokens"), 2);
    answer_free(&a);
}

/* An error after other answers of the request were complete is still one error. */
static void one_fails(void **state)
{
    (void)state;
    answer a;
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"x\",\"n\":3}",
             NULL);
    rig_wait_gens(&g_rig, 3);
    fake_admit(fake.gens[0]);
    fake_end(fake.gens[0], TM_GEN_LENGTH);
    fake_error(fake.gens[2], TM_GEN_ERR_POISON, 0);
    rig_wait(&a);
    assert_error(&a, 500, "server_error", "internal_error", NULL);
    assert_string_equal(answer_header(&a, "x-should-retry"), "false");
    assert_true(fake.gens[1]->cancelled);
    answer_free(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(chat_form, start, stop),
        cmocka_unit_test_setup_teardown(prompts_and_choices, start, stop),
        cmocka_unit_test_setup_teardown(echo_and_logprobs, start, stop),
        cmocka_unit_test_setup_teardown(chat_extras, start, stop),
        cmocka_unit_test_setup_teardown(stops_and_lengths, start, stop),
        cmocka_unit_test_setup_teardown(one_fails, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
