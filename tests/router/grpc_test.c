/* Generate and Chat of the public gRPC service: what goes in, what comes out, how they end. */
#include "tests/router/grpc_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

static void generate(void **state)
{
    (void)state;
    gcall c;
    told t;
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_temperature = s.has_seed = s.has_max_tokens = s.has_top_k = 1;
    s.temperature = 0.7f;
    s.seed = -3;
    s.max_tokens = 100;
    s.top_k = 5;
    PUB(GenerateRequest) r = text_request("Tell me.", &s);
    r.request_id = (char *)(uintptr_t) "my-id.7";
    r.session_id = (char *)(uintptr_t) "s1";
    fake_answer("Paris, \xc3\xa9t\xc3\xa9 \xf0\x9f\x98\x80!", true);
    fake.cached = 2;
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, "Paris, \xc3\xa9t\xc3\xa9 \xf0\x9f\x98\x80!");
    assert_string_equal(t.finish, "stop");
    assert_string_equal(t.request_id, "my-id.7");
    assert_int_equal(t.id_count, fake.count);
    assert_memory_equal(t.ids, fake.tokens, (size_t)fake.count * sizeof t.ids[0]);
    assert_int_equal(t.lp_count, 0);
    assert_int_equal(t.completion, fake.count);
    assert_int_equal(t.prompt, fake.gens[0]->prompt_len);
    assert_int_equal(t.cached, 2);
    const tm_gen *g = fake.gens[0];
    assert_true(g->sampling.temperature == 0.7f);
    assert_int_equal((int64_t)g->sampling.seed, -3);
    assert_int_equal(g->sampling.top_k, 5);
    assert_int_equal(g->max_tokens, 100);
    assert_string_equal(g->session, "s1");
    assert_true(g->deadline_ms == 0);
    told_free(&t);
    gcall_free(&c);
    /* The default is the completion API's. */
    r = text_request("Tell me.", NULL);
    r.request_id = (char *)(uintptr_t) "not harmless\n";
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_int_equal(fake.gens[1]->max_tokens, 16);
    assert_memory_equal(t.request_id, "req-", 4);
    told_free(&t);
    gcall_free(&c);
}

static void tokens_and_logprobs(void **state)
{
    (void)state;
    gcall c;
    told t;
    int32_t ids[] = {1, 320, 201};
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_logprobs = s.has_ignore_eos = 1;
    s.logprobs = 20;
    s.ignore_eos = 1;
    PUB(TokenList) list = TURBOMESH__V1__TOKEN_LIST__INIT;
    list.n_id = 3;
    list.id = ids;
    PUB(GenerateRequest) r = empty_request();
    r.prompt_case = TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    r.tokens = &list;
    r.sampling = &s;
    fake_answer("one two three four five", false);
    fake.batch = 3;
    fake.top_count = 20;
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, "one two three four five");
    assert_string_equal(t.finish, "length");
    assert_int_equal(t.lp_count, fake.count);
    assert_int_equal(t.top_count, fake.count * 20);
    for (int i = 0; i < t.lp_count; i++)
        assert_true(t.lps[i] == -0.5f);
    assert_int_equal(fake.gens[0]->prompt_len, 3);
    assert_memory_equal(fake.gens[0]->prompt, ids, sizeof ids);
    assert_int_equal(fake.gens[0]->sampling.logprobs, 20);
    assert_true(fake.gens[0]->sampling.ignore_eos);
    told_free(&t);
    gcall_free(&c);
}

static PUB(ChatMessage) chat_message(const char *role, const char *text, size_t len)
{
    PUB(ChatMessage) m = TURBOMESH__V1__CHAT_MESSAGE__INIT;
    m.role = (char *)(uintptr_t)role;
    m.content = (ProtobufCBinaryData){len, (uint8_t *)(uintptr_t)text};
    return m;
}

static void chat(void **state)
{
    (void)state;
    gcall c;
    told t;
    PUB(ChatMessage)
    m[] = {chat_message("system", "Be brief.", 9), chat_message("user", "a\0b", 3)};
    PUB(ChatMessage) * list[] = {&m[0], &m[1]};
    PUB(ChatRequest) r = TURBOMESH__V1__CHAT_REQUEST__INIT;
    r.model = (char *)(uintptr_t) "demo";
    r.n_message = 2;
    r.message = list;
    fake_answer("Paris.", true);
    gcall_start(&c, "Chat", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, "Paris.");
    const tm_gen *g = fake.gens[0];
    assert_int_equal(g->max_tokens, fake_served->max_context - (int)g->prompt_len);
    /* The text behind a NUL is there too, on the way in ... */
    char *prompt;
    size_t len;
    assert_int_equal(tm_tokenizer_decode(fake_served->tokenizer, g->prompt, g->prompt_len, false,
                                         &prompt, &len, NULL),
                     TM_OK);
    assert_non_null(memmem(prompt, len, "a\0b", 3));
    assert_non_null(memmem(prompt, len, "Be brief.", 9));
    free(prompt);
    told_free(&t);
    gcall_free(&c);
    /* ... and on the way out. */
    const tm_encode_opts o = {0};
    int32_t *ids;
    size_t count;
    assert_int_equal(tm_tokenizer_encode(fake_served->tokenizer, "x\0y", 3, &o, &ids, &count, NULL),
                     TM_OK);
    memcpy(fake.tokens, ids, count * sizeof *ids);
    fake.count = (int)count;
    free(ids);
    gcall_start(&c, "Chat", &r.base);
    gcall_hear(&c, &t);
    assert_int_equal(t.text.len, 3);
    assert_memory_equal(t.text.data, "x\0y", 3);
    told_free(&t);
    gcall_free(&c);
}

static void stops(void **state)
{
    (void)state;
    gcall c;
    told t;
    char *words[] = {(char *)(uintptr_t) "three"};
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_max_tokens = 1;
    s.max_tokens = 500;
    s.n_stop = 1;
    s.stop = words;
    PUB(GenerateRequest) r = text_request("count", &s);
    fake_answer("one two three four five", false);
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, "one two ");
    assert_string_equal(t.finish, "stop");
    assert_int_equal(fake.cancels, 1);
    told_free(&t);
    gcall_free(&c);
    /* A stop id that did not end it is text after all, one that did is not. */
    int32_t id;
    assert_int_equal(fake_encode(" the", &id, 1), 1);
    s.n_stop = 0;
    s.n_stop_token_id = 1;
    s.stop_token_id = &id;
    fake.tokens[0] = fake.tokens[1] = fake.tokens[2] = id;
    fake.count = 3;
    fake.finish = TM_GEN_STOP;
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, " the the");
    assert_int_equal(t.id_count, 3);
    assert_string_equal(t.finish, "stop");
    told_free(&t);
    gcall_free(&c);
    fake.finish = TM_GEN_LENGTH;
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, " the the the");
    assert_string_equal(t.finish, "length");
    told_free(&t);
    gcall_free(&c);
}

static void bad_requests(void **state)
{
    (void)state;
    gcall c;
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    PUB(GenerateRequest) r = text_request("x", &s);
    r.model = (char *)(uintptr_t) "other";
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_NOT_FOUND, "other");
    r.model = NULL;
    s.has_top_p = 1;
    static const struct {
        float v;
        const char *part;
    } values[] = {{1.5f, "1.5"}, {-1, "top_p"}, {0.0f / 0.0f, "finite"}, {1e38f * 10, "finite"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(values); i++) {
        s.top_p = values[i].v;
        gcall_start(&c, "Generate", &r.base);
        gcall_expect(&c, TM_STATUS_INVALID, values[i].part);
    }
    s.has_top_p = 0;
    s.has_logprobs = 1;
    s.logprobs = 21;
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_INVALID, "[0, 20]");
    s.has_logprobs = 0;
    r = text_request("bad \xff utf-8", NULL);
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_INVALID, "UTF-8");
    r = text_request("", NULL);
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_INVALID, "empty");
    PUB(GenerateRequest) none = empty_request();
    gcall_start(&c, "Generate", &none.base);
    gcall_expect(&c, TM_STATUS_INVALID, "prompt");
    PUB(ChatRequest) chat_none = TURBOMESH__V1__CHAT_REQUEST__INIT;
    gcall_start(&c, "Chat", &chat_none.base);
    gcall_expect(&c, TM_STATUS_INVALID, "messages");
    int32_t outside = fake_served->vocab;
    PUB(TokenList) list = TURBOMESH__V1__TOKEN_LIST__INIT;
    list.n_id = 1;
    list.id = &outside;
    none.prompt_case = TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    none.tokens = &list;
    gcall_start(&c, "Generate", &none.base);
    gcall_expect(&c, TM_STATUS_INVALID, "vocabulary");
    /* Longer than the context: both numbers. */
    int32_t *many = calloc(5000, sizeof *many);
    list.n_id = 5000;
    list.id = many;
    gcall_start(&c, "Generate", &none.base);
    gcall_expect(&c, TM_STATUS_INVALID, "5000");
    free(many);
    assert_int_equal(fake.gen_count, 0);
}

static void bad_calls(void **state)
{
    (void)state;
    gcall c;
    gcall_open(&c, SERVICE "Generate", NULL, 0);
    assert_int_equal(tm_rpc_stream_send(c.stream, "\xff\xff\xff", 3), TM_OK);
    gcall_expect(&c, TM_STATUS_INVALID, "parse");
    gcall_open(&c, SERVICE "Chat", NULL, 0);
    tm_rpc_stream_half_close(c.stream);
    gcall_expect(&c, TM_STATUS_INVALID, "no request message");
    gcall_open(&c, SERVICE "Nothing", NULL, 0);
    gcall_expect(&c, TM_STATUS_UNSUPPORTED, "");
    fake.manual = true;
    PUB(GenerateRequest) r = text_request("x", NULL);
    gcall_open(&c, SERVICE "Generate", NULL, 0);
    gcall_send(&c, &r.base);
    gcall_send(&c, &r.base);
    gcall_expect(&c, TM_STATUS_INVALID, "one request message");
    char *big = malloc(9 << 20);
    memset(big, 'x', 9 << 20);
    big[(9 << 20) - 1] = '\0';
    r = text_request(big, NULL);
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_BUSY, "large"); /* one code on the wire */
    free(big);
    WAIT_FOR(fake.active == 0);
}

static void dispatch_errors(void **state)
{
    (void)state;
    gcall c;
    PUB(GenerateRequest) r = text_request("x", NULL);
    static const struct {
        tm_status start, want;
        const char *part;
    } starts[] = {{TM_STATUS_BUSY, TM_STATUS_BUSY, "retry after 1500 ms"},
                  {TM_STATUS_UNAVAILABLE, TM_STATUS_UNAVAILABLE, "retry after 1500 ms"},
                  {TM_STATUS_NO_MEMORY, TM_STATUS_INTERNAL, ""}};
    fake.retry_after_ms = 1500;
    for (size_t i = 0; i < TM_ARRAY_LEN(starts); i++) {
        fake.start_status = starts[i].start;
        gcall_start(&c, "Generate", &r.base);
        WAIT_FOR(gcall_closed(&c));
        assert_int_equal(tm_status_grpc(c.st), tm_status_grpc(starts[i].want));
        assert_non_null(strstr(c.text, starts[i].part));
        gcall_free(&c);
    }
    fake.start_status = TM_OK;
    fake_answer("one two three", false);
    fake.error_after = 2;
    static const struct {
        tm_gen_error error;
        int code;
    } ends[] = {{TM_GEN_ERR_INVALID, 3},    {TM_GEN_ERR_TOO_LONG, 3}, {TM_GEN_ERR_BUSY, 8},
                {TM_GEN_ERR_NO_WORKER, 14}, {TM_GEN_ERR_POISON, 13},  {TM_GEN_ERR_TIMEOUT, 4},
                {TM_GEN_ERR_INTERNAL, 13}};
    for (size_t i = 0; i < TM_ARRAY_LEN(ends); i++) {
        fake.error = ends[i].error;
        gcall_start(&c, "Generate", &r.base);
        WAIT_FOR(gcall_closed(&c));
        assert_int_equal(tm_status_grpc(c.st), ends[i].code);
        assert_int_equal(c.count, 2); /* what came before went out */
        gcall_free(&c);
    }
    fake.error_after = -1;
    fake.served_count = 0;
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_UNAVAILABLE, "ready");
}

static void client_leaves(void **state)
{
    (void)state;
    gcall c;
    fake.manual = true;
    PUB(GenerateRequest) r = text_request("x", NULL);
    gcall_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    assert_int_equal(tm_public_active(grig.server), 1);
    fake_admit(fake.gens[0]);
    int32_t ids[] = {17, 18};
    fake_tokens(fake.gens[0], ids, 2);
    WAIT_FOR(gcall_count(&c) == 1);
    tm_rpc_stream_cancel(c.stream);
    WAIT_FOR(fake.cancels == 1);
    assert_int_equal(tm_public_active(grig.server), 0);
    gcall_free(&c);
    /* The deadline of the call is the request's, and ends it. */
    gcall_open(&c, SERVICE "Generate", NULL, 300);
    gcall_send(&c, &r.base);
    tm_rpc_stream_half_close(c.stream);
    WAIT_FOR(fake.gen_count == 2);
    assert_in_range(fake.gens[1]->deadline_ms, 1, 301);
    WAIT_FOR(fake.cancels == 2);
    gcall_expect(&c, TM_STATUS_TIMEOUT, "");
}

/* Seeded: calls that are cancelled at any moment, long prompts among them, leave nothing behind. */
static void leaving_at_any_time(void **state)
{
    (void)state;
    unsigned seed = getenv("TM_SEED") ? (unsigned)strtoul(getenv("TM_SEED"), NULL, 10)
                                      : (unsigned)tm_clock_ns();
    printf("TM_SEED=%u\n", seed);
    srandom(seed);
    char *text = malloc(20001);
    for (int i = 0; i < 20000; i++)
        text[i] = "ab c\n"[i % 5];
    text[20000] = '\0';
    fake_answer("one two three four five six seven", true);
    for (int round = 0; round < 60; round++) {
        gcall c[4];
        for (size_t i = 0; i < TM_ARRAY_LEN(c); i++) {
            PUB(GenerateRequest) r = text_request(random() % 2 ? text + 19990 : text, NULL);
            gcall_start(&c[i], "Generate", &r.base);
        }
        for (long n = random() % 12; n > 0; n--)
            grig_turn();
        for (size_t i = 0; i < TM_ARRAY_LEN(c); i++)
            gcall_free(&c[i]);
    }
    free(text);
    WAIT_FOR(fake.active == 0 && tm_public_active(grig.server) == 0);
}

static void long_prompts(void **state)
{
    (void)state;
    gcall c;
    told t;
    char text[9001];
    for (int i = 0; i < 9000; i++)
        text[i] = i % 9 ? 'a' : ' ';
    text[9000] = '\0';
    fake_served->max_context = 20000;
    fake_answer("ok", true);
    PUB(GenerateRequest) r = text_request(text, NULL);
    gcall_start(&c, "Generate", &r.base);
    gcall_hear(&c, &t);
    assert_told(&t, "ok");
    told_free(&t);
    gcall_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(generate, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(tokens_and_logprobs, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(chat, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(stops, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(bad_requests, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(bad_calls, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(dispatch_errors, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(client_leaves, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(leaving_at_any_time, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(long_prompts, grig_setup, grig_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
