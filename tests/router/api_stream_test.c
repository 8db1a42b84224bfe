/* Server-sent events byte for byte, and everything that can happen to a stream. */
#include "tests/router/api_harness.h"

#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"

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

/* Replaces the id and the time of a stream by ID and 0, after checking that they are the same in all chunks. */
static char *normal(answer *a, const char *id_start)
{
    tm_buf out;
    tm_buf_init(&out, 0);
    char id[64] = "", created[32] = "";
    for (const char *p = a->body.data ? a->body.data : ""; *p;) {
        size_t head = strlen("\"id\":\""), time_head = strlen("\"created\":");
        if (strncmp(p, "\"id\":\"", head) == 0) {
            size_t n = strcspn(p + head, "\"");
            assert_memory_equal(p + head, id_start, strlen(id_start));
            if (!id[0])
                snprintf(id, sizeof id, "%.*s", (int)n, p + head);
            assert_int_equal(strlen(id), n);
            assert_memory_equal(p + head, id, n);
            tm_buf_puts(&out, "\"id\":\"ID");
            p += head + n;
        } else if (strncmp(p, "\"created\":", time_head) == 0) {
            size_t n = strspn(p + time_head, "0123456789");
            if (!created[0])
                snprintf(created, sizeof created, "%.*s", (int)n, p + time_head);
            assert_memory_equal(p + time_head, created, n);
            tm_buf_puts(&out, "\"created\":0");
            p += time_head + n;
        } else {
            tm_buf_putc(&out, *p++);
        }
    }
    return tm_buf_steal(&out, NULL);
}

static void assert_stream(answer *a, const char *id_start, const char *want)
{
    assert_int_equal(a->status, 200);
    char *got = normal(a, id_start);
    if (strcmp(got, want) != 0)
        fail_msg("got:\n%s\nexpected:\n%s", got, want);
    free(got);
}

#define CHAT_HEAD                                                                                  \
    "data: {\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"demo\","  \
    "\"system_fingerprint\":\"tm-0123456789ab\",\"choices\":["
#define TEXT_HEAD                                                                                  \
    "data: {\"id\":\"ID\",\"object\":\"text_completion\",\"created\":0,\"model\":\"demo\","        \
    "\"system_fingerprint\":\"tm-0123456789ab\",\"choices\":["
#define CHAT(i, text, finish)                                                                      \
    CHAT_HEAD "{\"index\":" #i ",\"delta\":{\"role\":\"assistant\",\"content\":\"" text            \
              "\"},\"logprobs\":null,\"finish_reason\":" finish "}]"
#define TEXT(i, text, finish)                                                                      \
    TEXT_HEAD "{\"index\":" #i ",\"text\":\"" text                                                 \
              "\",\"logprobs\":null,\"finish_reason\":" finish "}]"
#define END  "}\n\n"
#define DONE "data: [DONE]\n\n"

static void chat_order(void **state)
{
    (void)state;
    answer a;
    fake_answer("Hello world", true);
    fake.batch = 100;
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":"
             "\"hi\"}]}");
    assert_stream(&a, "chatcmpl-",
                  CHAT(0, "", "null") END CHAT(0, "Hello world", "null") END CHAT(0, "", "\"stop\"")
                      END DONE);
    assert_int_equal(a.end, TM_OK);
    assert_string_equal(answer_header(&a, "content-type"), "text/event-stream");
    assert_string_equal(answer_header(&a, "cache-control"), "no-cache");
    assert_string_equal(answer_header(&a, "x-accel-buffering"), "no");
    assert_non_null(answer_header(&a, "x-request-id"));
    assert_non_null(answer_header(&a, "openai-processing-ms"));
    answer_free(&a);
}

static void usage_chunk(void **state)
{
    (void)state;
    answer a;
    fake_answer("A b", true);
    fake.batch = 100;
    fake.cached = 3;
    int tokens = fake.count;
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"stream_options\":{\"include_usage\":true},"
             "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    char want[4000];
    int prompt = (int)fake.gens[0]->prompt_len;
    snprintf(
        want, sizeof want,
        CHAT(0, "", "null") ",\"usage\":null" END CHAT(0, "A b", "null") ",\"usage\":null" END CHAT(
            0, "", "\"stop\"") ",\"usage\":null" END CHAT_HEAD
                               "],\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_"
                               "tokens\":%d,"
                               "\"prompt_tokens_details\":{\"cached_tokens\":3},"
                               "\"completion_tokens_details\":{\"reasoning_tokens\":0}}" END DONE,
        prompt, tokens, prompt + tokens);
    assert_stream(&a, "chatcmpl-", want);
    answer_free(&a);
}

static void completion_order(void **state)
{
    (void)state;
    answer a;
    fake_answer("Hello", false);
    rig_post(
        &g_rig, &a, "/v1/completions",
        "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"echo\":true,\"max_tokens\":16}");
    /* The echo comes with the admission; no chunk has a role. */
    assert_true(fake.count == 1);
    assert_stream(&a, "cmpl-",
                  TEXT(0, "x", "null") END TEXT(0, "Hello", "null") END TEXT(0, "", "\"length\"")
                      END DONE);
    answer_free(&a);
}

static void length_finish(void **state)
{
    (void)state;
    answer a;
    fake_answer("one two three four five", false);
    fake.batch = 100;
    rig_post(&g_rig, &a, "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":1}");
    assert_int_equal(fake.gens[0]->max_tokens, 1);
    assert_non_null(strstr(a.body.data, "\"finish_reason\":\"length\"}"));
    answer_free(&a);
}

/* All deltas of a choice joined; checks that every one is whole UTF-8 and counts the chunks with text. */
static char *joined(answer *a, int choice, int *chunks, const char **finish)
{
    tm_buf out;
    tm_buf_init(&out, 0);
    tm_buf_puts(&out, "");
    *chunks = 0;
    *finish = NULL;
    const char *p = a->body.data;
    while ((p = strstr(p, "data: "))) {
        p += 6;
        const char *end = strstr(p, "\n\n");
        assert_non_null(end);
        if (strncmp(p, "[DONE]", 6) == 0)
            break;
        json_t *v = NULL;
        assert_int_equal(tm_json_parse(p, (size_t)(end - p), &v, NULL), TM_OK);
        const json_t *c = json_array_get(json_object_get(v, "choices"), 0);
        if (c && json_integer_value(json_object_get(c, "index")) == choice) {
            const json_t *t = json_object_get(c, "text");
            if (!t)
                t = json_object_get(json_object_get(c, "delta"), "content");
            tm_buf_append(&out, json_string_value(t), json_string_length(t));
            *chunks += json_string_length(t) > 0;
            const char *f = json_string_value(json_object_get(c, "finish_reason"));
            if (f)
                *finish = strcmp(f, "stop") == 0 ? "stop" : "length";
        }
        json_decref(v);
        p = end;
    }
    return tm_buf_steal(&out, NULL);
}

static void utf8_is_never_cut(void **state)
{
    (void)state;
    static const char text[] =
        "na\xc3\xafve \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80\xf0\x9f\x8e\x89 ok";
    answer a;
    fake_answer(text, true);
    assert_true(fake.count > 8);
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":"
             "\"hi\"}]}");
    int chunks;
    const char *finish;
    char *got = joined(&a, 0, &chunks, &finish);
    assert_string_equal(got, text);
    assert_string_equal(finish, "stop");
    assert_true(chunks >= 3);
    free(got);
    answer_free(&a);
}

static void stop_strings(void **state)
{
    (void)state;
    static const struct {
        const char *stop, *want;
        bool include;
    } rows[] = {
        {"\"three\"", "one two ", false},
        {"[\"zzz\",\"o thr\"]", "one tw", false},
        {"\"three\"", "one two three", true},
        {"\"one\"", "", false},
        {"\"nothing\"", "one two three four", false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        for (int batch = 1; batch <= 100; batch += 99) {
            answer a;
            char body[400];
            fake_reset();
            fake_answer("one two three four", true);
            fake.batch = batch;
            snprintf(
                body, sizeof body,
                "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":100,\"stop\":%"
                "s,"
                "\"include_stop_str_in_output\":%s,\"stream_options\":{\"include_usage\":true}}",
                rows[i].stop, rows[i].include ? "true" : "false");
            rig_post(&g_rig, &a, "/v1/completions", body);
            int chunks;
            const char *finish;
            char *got = joined(&a, 0, &chunks, &finish);
            assert_string_equal(got, rows[i].want);
            assert_string_equal(finish, "stop");
            bool matched = strcmp(rows[i].stop, "\"nothing\"") != 0;
            assert_int_equal(fake.cancels, matched);
            free(got);
            answer_free(&a);
        }
    }
}

/* A stop id that the engine went over (min_tokens) is an ordinary token; the last one is not text. */
static void stop_ids_are_not_text(void **state)
{
    (void)state;
    answer a;
    int32_t ids[8];
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":50,\"skip_"
             "special_tokens\":false,"
             "\"min_tokens\":2,\"return_token_ids\":true}",
             NULL);
    rig_wait_gens(&g_rig, 1);
    tm_gen *g = fake.gens[0];
    assert_int_equal(g->sampling.min_tokens, 2);
    int n = fake_encode("Hello", ids, 6);
    assert_int_equal(n, 1);
    const int32_t eos = fake_served->stop_ids[0];
    fake_admit(g);
    fake_tokens(g, &eos, 1);
    fake_tokens(g, ids, 1);
    fake_tokens(g, &eos, 1);
    fake_end(g, TM_GEN_STOP);
    rig_wait(&a);
    int chunks;
    const char *finish;
    char *got = joined(&a, 0, &chunks, &finish);
    assert_string_equal(got, "<|im_end|>Hello");
    free(got);
    /* All three are counted and listed. */
    char *p = strstr(a.body.data, "\"token_ids\":[2]");
    assert_non_null(p);
    assert_non_null(strstr(p + 1, "\"token_ids\":[2]"));
    answer_free(&a);
}

static void request_stop_ids(void **state)
{
    (void)state;
    answer a;
    fake_answer("one two three four", false);
    char body[300];
    snprintf(body, sizeof body,
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":3,\"stop_token_"
             "ids\":[%d,7]}",
             fake.tokens[2]);
    fake.count = 3;
    fake.finish = TM_GEN_STOP;
    rig_post(&g_rig, &a, "/v1/completions", body);
    assert_int_equal(fake.gens[0]->stop_count, 2);
    assert_int_equal(fake.gens[0]->stop_ids[1], 7);
    int chunks;
    const char *finish;
    char *got = joined(&a, 0, &chunks, &finish);
    assert_string_equal(got, "one two");
    assert_string_equal(finish, "stop");
    free(got);
    answer_free(&a);
}

static void choices_interleave(void **state)
{
    (void)state;
    answer a;
    fake_answer("same text for all", true);
    rig_post(&g_rig, &a, "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":[\"a "
             "b\",\"c\"],\"n\":2,\"max_tokens\":50,\"seed\":5,"
             "\"stream_options\":{\"include_usage\":true}}");
    assert_int_equal(fake.gen_count, 4);
    int32_t ids[8];
    int n = fake_encode("c", ids, 8);
    for (int i = 0; i < 4; i++) {
        int chunks;
        const char *finish;
        char *got = joined(&a, i, &chunks, &finish);
        assert_string_equal(got, "same text for all");
        assert_string_equal(finish, "stop");
        free(got);
        assert_int_equal(fake.gens[i]->sampling.choice, i % 2);
        assert_int_equal(fake.gens[i]->sampling.seed, 5);
    }
    assert_int_equal(fake.gens[2]->prompt_len, n);
    assert_memory_equal(fake.gens[3]->prompt, ids, (size_t)n * sizeof ids[0]);
    /* Two chunks in a row of different choices somewhere. */
    assert_non_null(strstr(a.body.data, "\"index\":3"));
    /* Each prompt counts once. */
    char want[100];
    snprintf(want, sizeof want, "\"prompt_tokens\":%d,\"completion_tokens\":%d",
             (int)(fake.gens[0]->prompt_len + fake.gens[2]->prompt_len), fake.count * 4);
    assert_non_null(strstr(a.body.data, want));
    answer_free(&a);
}

static void tokens_of_one_step_make_one_chunk(void **state)
{
    (void)state;
    answer a;
    fake_answer("the quick brown fox jumps over the lazy dog", true);
    fake.batch = 4;
    int batches = (fake.count + 3) / 4;
    rig_post(&g_rig, &a, "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":100}");
    int chunks;
    const char *finish;
    char *got = joined(&a, 0, &chunks, &finish);
    assert_string_equal(got, "the quick brown fox jumps over the lazy dog");
    assert_true(chunks <= batches);
    free(got);
    answer_free(&a);
}

static void token_ids_of_chat(void **state)
{
    (void)state;
    answer a;
    fake_answer("Hello", true);
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"return_token_ids\":true,\"input_ids\":[5,6,7],"
             "\"messages\":[]}");
    char want[4000];
    snprintf(want, sizeof want,
             CHAT(0, "", "null") ",\"prompt_token_ids\":[5,6,7]" END CHAT_HEAD
                                 "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":"
                                 "\"Hello\"},\"logprobs\":null,"
                                 "\"token_ids\":[%d],\"finish_reason\":null}]" END CHAT_HEAD
                                 "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                                 "\"logprobs\":null,"
                                 "\"token_ids\":[2],\"finish_reason\":null}]" END CHAT(
                                     0, "", "\"stop\"") END DONE,
             fake.tokens[0]);
    assert_stream(&a, "chatcmpl-", want);
    answer_free(&a);
}

static void chat_logprobs(void **state)
{
    (void)state;
    answer a;
    fake_answer("Hello", true);
    fake.top_count = 3;
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"logprobs\":true,\"top_logprobs\":1,"
             "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}");
    assert_int_equal(fake.gens[0]->sampling.logprobs, 1);
    assert_stream(
        &a, "chatcmpl-",
        CHAT(0, "", "null") END CHAT_HEAD
        "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"Hello\"},\"logprobs\":{"
        "\"content\":["
        "{\"token\":\"Hello\",\"logprob\":-0.5,\"bytes\":[72,101,108,108,111],\"top_logprobs\":["
        "{\"token\":\"<|im_start|>\",\"logprob\":-1,\"bytes\":[60,124,105,109,95,115,116,97,114,"
        "116,124,62]}"
        "]}],\"refusal\":null},\"finish_reason\":null}]" END CHAT(0, "", "\"stop\"") END DONE);
    answer_free(&a);
}

/* The records of all chunks together are the text, whatever was held back on the way. */
static void logprobs_follow_the_text(void **state)
{
    (void)state;
    static const char *const stops[] = {"[\"zz\"]", "[\"four\"]", "[\"ee fo\"]",
                                        "[\"three four five six\"]"};
    for (size_t k = 0; k < TM_ARRAY_LEN(stops); k++) {
        for (int batch = 1; batch < 5; batch += 3) {
            answer a;
            char body[300];
            fake_reset();
            fake_answer("one tw\xc3\xb6 three four \xf0\x9f\x98\x80 five", true);
            fake.batch = batch;
            snprintf(body, sizeof body,
                     "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":100,"
                     "\"logprobs\":0,"
                     "\"stop\":%s}",
                     stops[k]);
            rig_post(&g_rig, &a, "/v1/completions", body);
            int chunks;
            const char *finish;
            char *text = joined(&a, 0, &chunks, &finish);
            size_t covered = 0, records = 0;
            const char *p = a.body.data;
            while ((p = strstr(p, "data: {"))) {
                p += 6;
                json_t *v = NULL;
                assert_int_equal(tm_json_parse(p, strcspn(p, "\n"), &v, NULL), TM_OK);
                const json_t *lp =
                    json_object_get(json_array_get(json_object_get(v, "choices"), 0), "logprobs");
                size_t i;
                json_t *t;
                json_array_foreach(json_object_get(lp, "tokens"), i, t)
                {
                    const char *s = json_string_value(t);
                    covered += strncmp(s, "bytes:", 6) == 0 ? (strlen(s) - 6) / 4 : strlen(s);
                    records++;
                }
                json_decref(v);
            }
            /* A token that a stop string cuts is there with all its bytes. */
            assert_true(covered >= strlen(text));
            assert_true(covered < strlen(text) + 8);
            assert_true(records > 0);
            if (k == 0)
                assert_int_equal(covered, strlen(text));
            free(text);
            answer_free(&a);
        }
    }
}

static void error_before_the_first_byte(void **state)
{
    (void)state;
    static const struct {
        tm_gen_error error;
        int status;
        const char *type, *code, *retry;
    } rows[] = {
        {TM_GEN_ERR_INVALID, 400, "invalid_request_error", "invalid_value", NULL},
        {TM_GEN_ERR_TOO_LONG, 400, "invalid_request_error", "context_length_exceeded", NULL},
        {TM_GEN_ERR_BUSY, 429, "rate_limit_error", "queue_full", "true"},
        {TM_GEN_ERR_NO_WORKER, 503, "server_error", "no_worker", "true"},
        {TM_GEN_ERR_POISON, 500, "server_error", "internal_error", "false"},
        {TM_GEN_ERR_TIMEOUT, 408, "invalid_request_error", "timeout", NULL},
        {TM_GEN_ERR_INTERNAL, 500, "server_error", "internal_error", NULL},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        for (int stream = 0; stream < 2; stream++) {
            answer a;
            fake_reset();
            fake.manual = true;
            rig_send(&g_rig, &a, "POST", "/v1/completions",
                     stream ? "{\"model\":\"demo\",\"stream\":true,\"n\":3,\"prompt\":\"x\"}"
                            : "{\"model\":\"demo\",\"n\":3,\"prompt\":\"x\"}",
                     NULL);
            rig_wait_gens(&g_rig, 3);
            fake_error(fake.gens[1], rows[i].error, 2500);
            rig_wait(&a);
            assert_error(&a, rows[i].status, rows[i].type, rows[i].code, NULL);
            bool later = rows[i].status == 429 || rows[i].status == 503;
            if (later)
                assert_string_equal(answer_header(&a, "retry-after"), "3");
            if (later)
                assert_string_equal(answer_header(&a, "retry-after-ms"), "2500");
            if (rows[i].retry)
                assert_string_equal(answer_header(&a, "x-should-retry"), rows[i].retry);
            else
                assert_null(answer_header(&a, "x-should-retry"));
            assert_true(fake.gens[0]->cancelled && fake.gens[2]->cancelled);
            answer_free(&a);
        }
    }
}

static void error_in_the_middle(void **state)
{
    (void)state;
    answer a;
    fake_answer("one two three", true);
    fake.error_after = 1;
    fake.error = TM_GEN_ERR_NO_WORKER;
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":"
             "\"hi\"}]}");
    assert_stream(
        &a, "chatcmpl-",
        CHAT(0, "", "null") END CHAT(0, "one", "null") END
        "data: {\"error\":{\"message\":\"No worker could take the request, try again later.\","
        "\"type\":\"server_error\",\"param\":null,\"code\":\"no_worker\"},\"object\":\"error\","
        "\"message\":\"No worker could take the request, try again later.\","
        "\"type\":\"server_error\",\"param\":null,\"code\":503}\n\n");
    /* The stream is cut, not ended: a client must not take it for whole. */
    assert_int_equal(a.end, TM_STATUS_CLOSED);
    answer_free(&a);
}

static void a_client_that_leaves_cancels(void **state)
{
    (void)state;
    answer a;
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"n\":2,\"prompt\":\"x\"}", NULL);
    rig_wait_gens(&g_rig, 2);
    fake_admit(fake.gens[0]);
    fake_admit(fake.gens[1]);
    int32_t ids[16];
    int n = fake_encode("Hello", ids, 16);
    fake_tokens(fake.gens[0], ids, n);
    rig_wait_body(&a, 10);
    answer_free(&a);
    for (int i = 0; i < 500 && fake.active > 0; i++)
        rig_turn(&g_rig);
    assert_int_equal(fake.active, 0);
    assert_int_equal(fake.cancels, 2);
    assert_int_equal(tm_api_active(g_rig.api), 0);
    /* The same before the first byte, and without a stream. */
    for (int stream = 0; stream < 2; stream++) {
        fake_reset();
        fake.manual = true;
        rig_send(&g_rig, &a, "POST", "/v1/completions",
                 stream ? "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\"}"
                        : "{\"model\":\"demo\",\"prompt\":\"x\"}",
                 NULL);
        rig_wait_gens(&g_rig, 1);
        answer_free(&a);
        for (int i = 0; i < 500 && fake.active > 0; i++)
            rig_turn(&g_rig);
        assert_int_equal(fake.cancels, 1);
    }
}

static void pings(void **state)
{
    (void)state;
    rig_stop(&g_rig);
    rig_opts o = rig_opts_default();
    o.api.ping_ms = 30;
    rig_start(&g_rig, &o);
    answer a;
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", "/v1/chat/completions",
             "{\"model\":\"demo\",\"stream\":true,\"messages\":\"hi\"}", NULL);
    rig_wait_gens(&g_rig, 1);
    for (int64_t end = tm_clock_ms() + 100; tm_clock_ms() < end;)
        rig_turn(&g_rig);
    assert_int_equal(a.status, 0); /* the status is not decided before the admission */
    fake_admit(fake.gens[0]);
    rig_wait_body(&a, 100);
    size_t before = a.body.len;
    rig_wait_body(&a, before + 18);
    assert_memory_equal(a.body.data + before, ": ping\n\n: ping\n\n", 16);
    fake_end(fake.gens[0], TM_GEN_STOP);
    rig_wait(&a);
    assert_non_null(strstr(a.body.data, DONE));
    answer_free(&a);
}

/* A slow reader: chunks stop, text gathers, and everything comes after the drain, in few chunks. */
static void slow_readers_pause(void **state)
{
    (void)state;
    rig_stop(&g_rig);
    rig_opts o = rig_opts_default();
    o.http.stream_buffer_max = 4096;
    rig_start(&g_rig, &o);
    answer a;
    int32_t id[4];
    fake.manual = true;
    assert_int_equal(fake_encode("Hello", id, 4), 1);
    rig_send(&g_rig, &a, "POST", "/v1/completions",
             "{\"model\":\"demo\",\"stream\":true,\"prompt\":\"x\",\"max_tokens\":1900}", NULL);
    rig_wait_gens(&g_rig, 1);
    fake_admit(fake.gens[0]);
    /* All within one loop turn: nothing can leave, as if the client did not read. */
    for (int i = 0; i < 1800; i++)
        fake_tokens(fake.gens[0], id, 1);
    fake_end(fake.gens[0], TM_GEN_LENGTH);
    rig_wait(&a);
    assert_int_equal(a.end, TM_OK);
    int chunks;
    const char *finish;
    char *got = joined(&a, 0, &chunks, &finish);
    assert_int_equal(strlen(got), 1800 * 5);
    assert_string_equal(finish, "length");
    assert_true(chunks < 100);
    free(got);
    answer_free(&a);
}

static void parameters_arrive(void **state)
{
    (void)state;
    answer a;
    fake_answer("x", true);
    rig_post(
        &g_rig, &a, "/v1/chat/completions",
        "{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"temperature\":"
        "0.5,"
        "\"top_p\":0.25,\"top_k\":7,\"min_p\":0.125,\"repetition_penalty\":1.5,\"presence_"
        "penalty\":-1,"
        "\"frequency_penalty\":2,\"seed\":-3,\"logit_bias\":{\"17\":-100,\"8191\":2.5},\"min_"
        "tokens\":1,"
        "\"ignore_eos\":true,\"max_tokens\":9,\"session_id\":42,\"user\":\"u\",\"priority\":-5,"
        "\"timeout\":2.5,\"cache_salt\":\"s\",\"n\":1.0}");
    assert_int_equal(a.status, 200);
    const tm_gen *g = fake.gens[0];
    assert_true(g->sampling.temperature == 0.5f && g->sampling.top_p == 0.25f);
    assert_int_equal(g->sampling.top_k, 7);
    assert_true(g->sampling.min_p == 0.125f && g->sampling.repetition_penalty == 1.5f);
    assert_true(g->sampling.presence_penalty == -1 && g->sampling.frequency_penalty == 2);
    assert_int_equal((int64_t)g->sampling.seed, -3);
    assert_int_equal(g->sampling.logit_bias_count, 2);
    assert_int_equal(g->bias[0].token + g->bias[1].token, 17 + 8191);
    assert_true(g->bias[0].bias + g->bias[1].bias == -97.5f);
    assert_int_equal(g->sampling.min_tokens, 1);
    assert_true(g->sampling.ignore_eos);
    assert_int_equal(g->sampling.logprobs, -1);
    assert_int_equal(g->max_tokens, 9);
    assert_string_equal(g->session, "42");
    assert_int_equal(g->priority, -5);
    assert_in_range(g->deadline_ms, 2500, 2501);
    assert_true(g->cache_salt != 0);
    answer_free(&a);
    /* Defaults: the model's own, to the end of the context, a seed of its own each time, `user` as affinity. */
    rig_post(&g_rig, &a, "/v1/chat/completions",
             "{\"model\":\"demo\",\"messages\":\"hi\",\"user\":\"u\",\"n\":2}");
    g = fake.gens[1];
    assert_true(g->sampling.temperature == fake_served->temperature);
    assert_true(g->sampling.top_p == 1 && g->sampling.repetition_penalty == 1);
    assert_int_equal(g->max_tokens, fake_served->max_context - (int)g->prompt_len);
    assert_string_equal(g->session, "u");
    assert_true(g->sampling.seed == fake.gens[2]->sampling.seed);
    assert_true(g->cache_salt == 0 && g->deadline_ms == 0);
    answer_free(&a);
    rig_post(&g_rig, &a, "/v1/completions", "{\"model\":\"demo\",\"prompt\":\"hi\"}");
    assert_int_equal(fake.gens[3]->max_tokens, 16);
    assert_true(fake.gens[3]->sampling.seed != g->sampling.seed);
    assert_string_equal(fake.gens[3]->session, "");
    answer_free(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(chat_order, start, stop),
        cmocka_unit_test_setup_teardown(usage_chunk, start, stop),
        cmocka_unit_test_setup_teardown(completion_order, start, stop),
        cmocka_unit_test_setup_teardown(length_finish, start, stop),
        cmocka_unit_test_setup_teardown(utf8_is_never_cut, start, stop),
        cmocka_unit_test_setup_teardown(stop_strings, start, stop),
        cmocka_unit_test_setup_teardown(stop_ids_are_not_text, start, stop),
        cmocka_unit_test_setup_teardown(request_stop_ids, start, stop),
        cmocka_unit_test_setup_teardown(choices_interleave, start, stop),
        cmocka_unit_test_setup_teardown(tokens_of_one_step_make_one_chunk, start, stop),
        cmocka_unit_test_setup_teardown(token_ids_of_chat, start, stop),
        cmocka_unit_test_setup_teardown(chat_logprobs, start, stop),
        cmocka_unit_test_setup_teardown(logprobs_follow_the_text, start, stop),
        cmocka_unit_test_setup_teardown(error_before_the_first_byte, start, stop),
        cmocka_unit_test_setup_teardown(error_in_the_middle, start, stop),
        cmocka_unit_test_setup_teardown(a_client_that_leaves_cancels, start, stop),
        cmocka_unit_test_setup_teardown(pings, start, stop),
        cmocka_unit_test_setup_teardown(slow_readers_pause, start, stop),
        cmocka_unit_test_setup_teardown(parameters_arrive, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
