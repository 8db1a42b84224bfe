/* The public gRPC service in front of the scripted dispatch, from a client of net/rpc. The client's callbacks run
 * on its own thread and only record; the loop runs here. */
#include "tests/router/api_harness.h"

#include <event2/event.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "common/log.h"
#include "net/rpc/rpc.h"
#include "proto/health.pb-c.h"
#include "proto/reflection.pb-c.h"
#include "proto/turbomesh.pb-c.h"
#include "router/access.h"
#include "router/grpc/public.h"

#define PUB(name)    Turbomesh__V1__##name
#define SERVICE      "/turbomesh.v1.TurboMesh/"
#define MESSAGES_MAX 256
#define WAIT_MS      20000

static struct {
    struct event_base *base;
    tm_metrics *metrics;
    tm_keys *keys;
    tm_access access;
    tm_public *server;
    tm_rpc_channel *channel;
} T;

static void start_with(const char *key_file, const tm_public_opts *over, tm_limit_opts limit)
{
    tm_err err = TM_ERR_INIT;
    char address[32];
    tm_log_init("grpc_test", getenv("TM_TEST_LOG") ? TM_LOG_DEBUG : TM_LOG_ERROR, TM_LOG_TEXT);
    T.base = fake_base = event_base_new();
    T.metrics = tm_metrics_create();
    fake_load_served();
    fake_reset();
    assert_int_equal(tm_keys_create(&T.keys, key_file, &err), TM_OK);
    T.access = (tm_access){T.keys, limit, T.metrics};
    tm_public_opts o = over ? *over : (tm_public_opts){.text_inline_bytes = 8192};
    o.base = T.base;
    o.metrics = T.metrics;
    o.address = "127.0.0.1:0";
    o.access = tm_access_for_grpc(&T.access);
    o.limits = tm_api_limits_default();
    if (tm_public_create(&T.server, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    snprintf(address, sizeof address, "127.0.0.1:%d", tm_public_port(T.server));
    assert_int_equal(tm_rpc_channel_create(&T.channel, address, &err), TM_OK);
}

static int start(void **state)
{
    (void)state;
    start_with(NULL, NULL, (tm_limit_opts){0});
    return 0;
}

static int stop(void **state)
{
    (void)state;
    tm_rpc_channel_destroy(T.channel);
    tm_public_destroy(T.server, 1000);
    assert_int_equal(fake.active, 0);
    tm_keys_destroy(T.keys);
    tm_metrics_destroy(T.metrics);
    fake_reset();
    assert_int_equal(fake_served->refs, 1);
    tm_served_release(fake_served);
    event_base_free(T.base);
    return 0;
}

/* ---- a call ---- */

typedef struct call {
    pthread_mutex_t lock;
    pthread_cond_t go;
    bool hold; /* the client reads no further */
    tm_rpc_stream *stream;
    struct {
        void *data;
        size_t len;
    } got[MESSAGES_MAX];
    int count;
    bool closed;
    tm_status st;
    char text[600];
} call;

static void on_message(void *user, const void *data, size_t len)
{
    call *c = user;
    pthread_mutex_lock(&c->lock);
    while (c->hold)
        pthread_cond_wait(&c->go, &c->lock);
    if (c->count < MESSAGES_MAX) {
        c->got[c->count].data = malloc(len + 1);
        memcpy(c->got[c->count].data, data, len);
        c->got[c->count].len = len;
        c->count++;
    }
    pthread_mutex_unlock(&c->lock);
}

static void on_close(void *user, tm_status st, const char *message)
{
    call *c = user;
    pthread_mutex_lock(&c->lock);
    c->closed = true;
    c->st = st;
    snprintf(c->text, sizeof c->text, "%s", message ? message : "");
    pthread_mutex_unlock(&c->lock);
}

static void open_call(call *c, const char *path, const char *authorization, int64_t deadline_ms)
{
    static const tm_rpc_stream_ops ops = {NULL, on_message, on_close};
    const char *meta[] = {"authorization", authorization, NULL};
    tm_err err = TM_ERR_INIT;
    memset(c, 0, sizeof *c);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->go, NULL);
    if (tm_rpc_stream_open(&c->stream, T.channel, path, authorization ? meta : NULL, deadline_ms,
                           &ops, c, &err) != TM_OK)
        fail_msg("%s", err.msg);
}

static void send_message(call *c, const ProtobufCMessage *m)
{
    size_t len = protobuf_c_message_get_packed_size(m);
    uint8_t *data = malloc(len + 1);
    protobuf_c_message_pack(m, data);
    tm_status st = tm_rpc_stream_send(c->stream, data, len);
    assert_true(st == TM_OK || st == TM_STATUS_CLOSED); /* refused before it had a message */
    free(data);
}

static void call_start(call *c, const char *method, const ProtobufCMessage *m)
{
    char path[100];
    snprintf(path, sizeof path, "%s%s", *method == '/' ? "" : SERVICE, method);
    open_call(c, path, NULL, 0);
    send_message(c, m);
    tm_rpc_stream_half_close(c->stream);
}

static void turn(void)
{
    struct timeval tick = {0, 2000};
    event_base_loopexit(T.base, &tick);
    event_base_loop(T.base, EVLOOP_ONCE);
}

static bool is_closed(call *c)
{
    pthread_mutex_lock(&c->lock);
    bool closed = c->closed;
    pthread_mutex_unlock(&c->lock);
    return closed;
}

static int count_of(call *c)
{
    pthread_mutex_lock(&c->lock);
    int n = c->count;
    pthread_mutex_unlock(&c->lock);
    return n;
}

#define WAIT_FOR(what)                                                                             \
    for (int64_t end_ = tm_clock_ms() + WAIT_MS; !(what);) {                                       \
        turn();                                                                                    \
        if (tm_clock_ms() > end_)                                                                  \
            fail_msg("not within %d ms: %s", WAIT_MS, #what);                                      \
    }

static void call_free(call *c)
{
    if (!is_closed(c))
        tm_rpc_stream_cancel(c->stream);
    WAIT_FOR(is_closed(c));
    tm_rpc_stream_release(c->stream);
    for (int i = 0; i < c->count; i++)
        free(c->got[i].data);
    pthread_cond_destroy(&c->go);
    pthread_mutex_destroy(&c->lock);
}

static void *unpack(const call *c, int i, const ProtobufCMessageDescriptor *d)
{
    assert_true(i < c->count);
    void *m = protobuf_c_message_unpack(d, NULL, c->got[i].len, c->got[i].data);
    assert_non_null(m);
    return m;
}

/* ---- what a generation brought ---- */

typedef struct told {
    tm_buf text;
    int32_t ids[1000];
    float lps[1000];
    int id_count, lp_count, top_count;
    char finish[16], request_id[200];
    int prompt, completion, cached;
} told;

static void told_free(told *t)
{
    tm_buf_deinit(&t->text);
}

static void add_chunk(told *t, const PUB(GenerateChunk) * k, bool first, bool last)
{
    tm_buf_append(&t->text, k->text.data, k->text.len);
    assert_int_equal(k->request_id != NULL, first);
    assert_int_equal(k->finish_reason != NULL, last);
    assert_int_equal(k->usage != NULL, last);
    if (first)
        snprintf(t->request_id, sizeof t->request_id, "%s", k->request_id);
    for (size_t i = 0; i < k->n_token_id; i++)
        t->ids[t->id_count++] = k->token_id[i];
    for (size_t i = 0; i < k->n_logprob; i++)
        t->lps[t->lp_count++] = k->logprob[i];
    if (k->n_logprob > 0)
        assert_int_equal(k->n_top_logprobs, k->n_logprob);
    for (size_t i = 0; i < k->n_top_logprobs; i++) {
        assert_int_equal(k->top_logprobs[i]->n_token_id, fake.top_count);
        for (size_t r = 0; r < k->top_logprobs[i]->n_token_id; r++) {
            assert_int_equal(k->top_logprobs[i]->token_id[r], r + 1);
            assert_true(k->top_logprobs[i]->logprob[r] == -1.0f - (float)r);
            t->top_count++;
        }
    }
    if (last) {
        snprintf(t->finish, sizeof t->finish, "%s", k->finish_reason);
        t->prompt = k->usage->prompt_tokens;
        t->completion = k->usage->completion_tokens;
        t->cached = k->usage->cached_tokens;
    }
}

static void hear(call *c, told *t)
{
    *t = (told){0};
    tm_buf_init(&t->text, 0);
    WAIT_FOR(is_closed(c));
    if (c->st != TM_OK)
        fail_msg("status %s: %s", tm_status_name(c->st), c->text);
    for (int i = 0; i < c->count; i++) {
        PUB(GenerateChunk) *k = unpack(c, i, &turbomesh__v1__generate_chunk__descriptor);
        add_chunk(t, k, i == 0, i == c->count - 1);
        protobuf_c_message_free_unpacked(&k->base, NULL);
    }
}

static void assert_text(const told *t, const char *want)
{
    assert_string_equal(t->text.data ? t->text.data : "", want);
}

/* The generated initialiser of a union of bytes does not compile without warnings. */
static PUB(GenerateRequest) empty_request(void)
{
    PUB(GenerateRequest) r;
    turbomesh__v1__generate_request__init(&r);
    return r;
}

static PUB(GenerateRequest) text_request(const char *text, PUB(SamplingParams) * sampling)
{
    PUB(GenerateRequest) r = empty_request();
    r.prompt_case = TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
    r.sampling = sampling;
    return r;
}

static void expect_error(call *c, tm_status st, const char *part)
{
    WAIT_FOR(is_closed(c));
    if (c->st != st || strstr(c->text, part) == NULL)
        fail_msg("%s: %s; expected %s: %s", tm_status_name(c->st), c->text, tm_status_name(st),
                 part);
    call_free(c);
}

/* ---- tests ---- */

static void generate(void **state)
{
    (void)state;
    call c;
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
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, "Paris, \xc3\xa9t\xc3\xa9 \xf0\x9f\x98\x80!");
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
    call_free(&c);
    /* The default is the completion API's. */
    r = text_request("Tell me.", NULL);
    r.request_id = (char *)(uintptr_t) "not harmless\n";
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_int_equal(fake.gens[1]->max_tokens, 16);
    assert_memory_equal(t.request_id, "req-", 4);
    told_free(&t);
    call_free(&c);
}

static void tokens_and_logprobs(void **state)
{
    (void)state;
    call c;
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
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, "one two three four five");
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
    call_free(&c);
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
    call c;
    told t;
    PUB(ChatMessage)
    m[] = {chat_message("system", "Be brief.", 9), chat_message("user", "a\0b", 3)};
    PUB(ChatMessage) * list[] = {&m[0], &m[1]};
    PUB(ChatRequest) r = TURBOMESH__V1__CHAT_REQUEST__INIT;
    r.model = (char *)(uintptr_t) "demo";
    r.n_message = 2;
    r.message = list;
    fake_answer("Paris.", true);
    call_start(&c, "Chat", &r.base);
    hear(&c, &t);
    assert_text(&t, "Paris.");
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
    call_free(&c);
    /* ... and on the way out. */
    const tm_encode_opts o = {0};
    int32_t *ids;
    size_t count;
    assert_int_equal(tm_tokenizer_encode(fake_served->tokenizer, "x\0y", 3, &o, &ids, &count, NULL),
                     TM_OK);
    memcpy(fake.tokens, ids, count * sizeof *ids);
    fake.count = (int)count;
    free(ids);
    call_start(&c, "Chat", &r.base);
    hear(&c, &t);
    assert_int_equal(t.text.len, 3);
    assert_memory_equal(t.text.data, "x\0y", 3);
    told_free(&t);
    call_free(&c);
}

static void stops(void **state)
{
    (void)state;
    call c;
    told t;
    char *words[] = {(char *)(uintptr_t) "three"};
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_max_tokens = 1;
    s.max_tokens = 500;
    s.n_stop = 1;
    s.stop = words;
    PUB(GenerateRequest) r = text_request("count", &s);
    fake_answer("one two three four five", false);
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, "one two ");
    assert_string_equal(t.finish, "stop");
    assert_int_equal(fake.cancels, 1);
    told_free(&t);
    call_free(&c);
    /* A stop id that did not end it is text after all, one that did is not. */
    int32_t id;
    assert_int_equal(fake_encode(" the", &id, 1), 1);
    s.n_stop = 0;
    s.n_stop_token_id = 1;
    s.stop_token_id = &id;
    fake.tokens[0] = fake.tokens[1] = fake.tokens[2] = id;
    fake.count = 3;
    fake.finish = TM_GEN_STOP;
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, " the the");
    assert_int_equal(t.id_count, 3);
    assert_string_equal(t.finish, "stop");
    told_free(&t);
    call_free(&c);
    fake.finish = TM_GEN_LENGTH;
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, " the the the");
    assert_string_equal(t.finish, "length");
    told_free(&t);
    call_free(&c);
}

static void bad_requests(void **state)
{
    (void)state;
    call c;
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    PUB(GenerateRequest) r = text_request("x", &s);
    r.model = (char *)(uintptr_t) "other";
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_NOT_FOUND, "other");
    r.model = NULL;
    s.has_top_p = 1;
    static const struct {
        float v;
        const char *part;
    } values[] = {{1.5f, "1.5"}, {-1, "top_p"}, {0.0f / 0.0f, "finite"}, {1e38f * 10, "finite"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(values); i++) {
        s.top_p = values[i].v;
        call_start(&c, "Generate", &r.base);
        expect_error(&c, TM_STATUS_INVALID, values[i].part);
    }
    s.has_top_p = 0;
    s.has_logprobs = 1;
    s.logprobs = 21;
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_INVALID, "[0, 20]");
    s.has_logprobs = 0;
    r = text_request("bad \xff utf-8", NULL);
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_INVALID, "UTF-8");
    r = text_request("", NULL);
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_INVALID, "empty");
    PUB(GenerateRequest) none = empty_request();
    call_start(&c, "Generate", &none.base);
    expect_error(&c, TM_STATUS_INVALID, "prompt");
    PUB(ChatRequest) chat_none = TURBOMESH__V1__CHAT_REQUEST__INIT;
    call_start(&c, "Chat", &chat_none.base);
    expect_error(&c, TM_STATUS_INVALID, "messages");
    int32_t outside = fake_served->vocab;
    PUB(TokenList) list = TURBOMESH__V1__TOKEN_LIST__INIT;
    list.n_id = 1;
    list.id = &outside;
    none.prompt_case = TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    none.tokens = &list;
    call_start(&c, "Generate", &none.base);
    expect_error(&c, TM_STATUS_INVALID, "vocabulary");
    /* Longer than the context: both numbers. */
    int32_t *many = calloc(5000, sizeof *many);
    list.n_id = 5000;
    list.id = many;
    call_start(&c, "Generate", &none.base);
    expect_error(&c, TM_STATUS_INVALID, "5000");
    free(many);
    assert_int_equal(fake.gen_count, 0);
}

static void bad_calls(void **state)
{
    (void)state;
    call c;
    open_call(&c, SERVICE "Generate", NULL, 0);
    assert_int_equal(tm_rpc_stream_send(c.stream, "\xff\xff\xff", 3), TM_OK);
    expect_error(&c, TM_STATUS_INVALID, "parse");
    open_call(&c, SERVICE "Chat", NULL, 0);
    tm_rpc_stream_half_close(c.stream);
    expect_error(&c, TM_STATUS_INVALID, "no request message");
    open_call(&c, SERVICE "Nothing", NULL, 0);
    expect_error(&c, TM_STATUS_UNSUPPORTED, "");
    fake.manual = true;
    PUB(GenerateRequest) r = text_request("x", NULL);
    open_call(&c, SERVICE "Generate", NULL, 0);
    send_message(&c, &r.base);
    send_message(&c, &r.base);
    expect_error(&c, TM_STATUS_INVALID, "one request message");
    char *big = malloc(9 << 20);
    memset(big, 'x', 9 << 20);
    big[(9 << 20) - 1] = '\0';
    r = text_request(big, NULL);
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_BUSY, "large"); /* one code on the wire */
    free(big);
    WAIT_FOR(fake.active == 0);
}

static void dispatch_errors(void **state)
{
    (void)state;
    call c;
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
        call_start(&c, "Generate", &r.base);
        WAIT_FOR(is_closed(&c));
        assert_int_equal(tm_status_grpc(c.st), tm_status_grpc(starts[i].want));
        assert_non_null(strstr(c.text, starts[i].part));
        call_free(&c);
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
        call_start(&c, "Generate", &r.base);
        WAIT_FOR(is_closed(&c));
        assert_int_equal(tm_status_grpc(c.st), ends[i].code);
        assert_int_equal(c.count, 2); /* what came before went out */
        call_free(&c);
    }
    fake.error_after = -1;
    fake.served_count = 0;
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_UNAVAILABLE, "ready");
}

static void client_leaves(void **state)
{
    (void)state;
    call c;
    fake.manual = true;
    PUB(GenerateRequest) r = text_request("x", NULL);
    call_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    assert_int_equal(tm_public_active(T.server), 1);
    fake_admit(fake.gens[0]);
    int32_t ids[] = {17, 18};
    fake_tokens(fake.gens[0], ids, 2);
    WAIT_FOR(count_of(&c) == 1);
    tm_rpc_stream_cancel(c.stream);
    WAIT_FOR(fake.cancels == 1);
    assert_int_equal(tm_public_active(T.server), 0);
    call_free(&c);
    /* The deadline of the call is the request's, and ends it. */
    open_call(&c, SERVICE "Generate", NULL, 300);
    send_message(&c, &r.base);
    tm_rpc_stream_half_close(c.stream);
    WAIT_FOR(fake.gen_count == 2);
    assert_in_range(fake.gens[1]->deadline_ms, 1, 301);
    WAIT_FOR(fake.cancels == 2);
    expect_error(&c, TM_STATUS_TIMEOUT, "");
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
        call c[4];
        for (size_t i = 0; i < TM_ARRAY_LEN(c); i++) {
            PUB(GenerateRequest) r = text_request(random() % 2 ? text + 19990 : text, NULL);
            call_start(&c[i], "Generate", &r.base);
        }
        for (long n = random() % 12; n > 0; n--)
            turn();
        for (size_t i = 0; i < TM_ARRAY_LEN(c); i++)
            call_free(&c[i]);
    }
    free(text);
    WAIT_FOR(fake.active == 0 && tm_public_active(T.server) == 0);
}

static void long_prompts(void **state)
{
    (void)state;
    call c;
    told t;
    char text[9001];
    for (int i = 0; i < 9000; i++)
        text[i] = i % 9 ? 'a' : ' ';
    text[9000] = '\0';
    fake_served->max_context = 20000;
    fake_answer("ok", true);
    PUB(GenerateRequest) r = text_request(text, NULL);
    call_start(&c, "Generate", &r.base);
    hear(&c, &t);
    assert_text(&t, "ok");
    told_free(&t);
    call_free(&c);
}

static void hold(call *c, bool on)
{
    pthread_mutex_lock(&c->lock);
    c->hold = on;
    pthread_cond_broadcast(&c->go);
    pthread_mutex_unlock(&c->lock);
}

/* `count` chunks of 64 tokens with 20 best ones each: 7 KB a chunk. */
static void pour(tm_gen *g, int count)
{
    int32_t ids[64];
    for (int i = 0; i < 64; i++)
        ids[i] = 300 + i;
    fake.top_count = 20;
    for (int i = 0; i < count && !g->over; i++)
        fake_tokens(g, ids, 64);
}

static void call_held(call *c, int n)
{
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_logprobs = 1;
    s.logprobs = 20;
    PUB(GenerateRequest) r = text_request("x", &s);
    call_start(c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == n);
    fake_admit(fake.gens[n - 1]);
    hold(c, true);
}

static void clients_that_do_not_read(void **state)
{
    (void)state;
    const tm_public_opts o = {.write_timeout_ms = 400, .text_inline_bytes = 8192};
    start_with(NULL, &o, (tm_limit_opts){0});
    call c;
    fake.manual = true;
    /* Whatever the transport takes at first: in the end something waits, and is cut after the time. */
    call_held(&c, 1);
    for (int i = 0; i < 3000 && !fake.gens[0]->over; i++) {
        pour(fake.gens[0], 5);
        for (int k = 0; k < 5; k++)
            turn();
    }
    WAIT_FOR(fake.cancels == 1);
    hold(&c, false);
    expect_error(&c, TM_STATUS_TIMEOUT, "");
    WAIT_FOR(tm_public_active(T.server) == 0);
    /* More at once than queue and transport hold together. */
    call_held(&c, 2);
    pour(fake.gens[1], 8000);
    assert_true(fake.gens[1]->over);
    hold(&c, false);
    expect_error(&c, TM_STATUS_BUSY, "");
    /* One that reads is left alone, however long it takes. */
    PUB(GenerateRequest) r = text_request("x", NULL);
    call_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 3);
    fake_admit(fake.gens[2]);
    pour(fake.gens[2], 10);
    for (int64_t end = tm_clock_ms() + 1500; tm_clock_ms() < end;)
        turn();
    fake_end(fake.gens[2], TM_GEN_LENGTH);
    WAIT_FOR(is_closed(&c));
    assert_int_equal(c.st, TM_OK);
    call_free(&c);
    stop(NULL);
}

/* ---- keys ---- */

static void keys_and_limits(void **state)
{
    (void)state;
    char path[] = "/tmp/tm_grpc_test_XXXXXX", hex[65];
    uint8_t hash[32];
    int fd = mkstemp(path);
    tm_sha256("secret", 6, hash);
    tm_hex(hash, 32, hex);
    assert_true(dprintf(fd, "alice:%s\n", hex) > 0);
    close(fd);
    start_with(path, NULL, (tm_limit_opts){.concurrent = 1});
    unlink(path);
    call c, d;
    PUB(GenerateRequest) r = text_request("x", NULL);
    static const char *const wrong[] = {NULL, "secret", "Bearer ", "Bearer secre", "Basic secret"};
    for (size_t i = 0; i < TM_ARRAY_LEN(wrong); i++) {
        open_call(&c, SERVICE "Generate", wrong[i], 0);
        send_message(&c, &r.base);
        expect_error(&c, TM_STATUS_DENIED, "key");
        PUB(ListModelsRequest) q = TURBOMESH__V1__LIST_MODELS_REQUEST__INIT;
        open_call(&c, SERVICE "ListModels", wrong[i], 0);
        send_message(&c, &q.base);
        expect_error(&c, TM_STATUS_DENIED, "key");
    }
    assert_int_equal(fake.gen_count, 0);
    fake.manual = true;
    for (int round = 0; round < 2; round++) {
        open_call(&c, SERVICE "Generate", "Bearer secret", 0);
        send_message(&c, &r.base);
        WAIT_FOR(fake.gen_count == round + 1);
        open_call(&d, SERVICE "Generate", "bearer  secret", 0);
        send_message(&d, &r.base);
        expect_error(&d, TM_STATUS_BUSY, "retry after");
        fake_admit(fake.gens[round]);
        fake_end(fake.gens[round], TM_GEN_STOP);
        WAIT_FOR(is_closed(&c));
        assert_int_equal(c.st, TM_OK);
        call_free(&c);
        WAIT_FOR(tm_public_active(T.server) == 0);
    }
    /* Health needs no key. */
    Grpc__Health__V1__HealthCheckRequest h = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    call_start(&c, "/grpc.health.v1.Health/Check", &h.base);
    WAIT_FOR(is_closed(&c));
    assert_int_equal(c.st, TM_OK);
    call_free(&c);
    stop(NULL);
}

static void too_many_calls(void **state)
{
    (void)state;
    const tm_public_opts o = {.calls_max = 2, .text_inline_bytes = 8192};
    start_with(NULL, &o, (tm_limit_opts){0});
    call c[3];
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    call_start(&c[0], "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    open_call(&c[1], SERVICE "Generate", NULL, 0); /* says nothing, and counts */
    call_start(&c[2], "Generate", &r.base);
    expect_error(&c[2], TM_STATUS_BUSY, "too many");
    tm_rpc_stream_cancel(c[1].stream);
    call_free(&c[1]);
    for (int n = 0; n < 50 && fake.gen_count < 2; n++) {
        call_start(&c[1], "Generate", &r.base);
        WAIT_FOR(is_closed(&c[1]) || fake.gen_count == 2);
        if (fake.gen_count < 2)
            call_free(&c[1]);
    }
    assert_int_equal(fake.gen_count, 2);
    call_free(&c[0]);
    call_free(&c[1]);
    WAIT_FOR(fake.active == 0);
    stop(NULL);
}

/* ---- health, reflection, models ---- */

static int health_of(const call *c, int i)
{
    Grpc__Health__V1__HealthCheckResponse *h =
        unpack(c, i, &grpc__health__v1__health_check_response__descriptor);
    int status = (int)h->status;
    protobuf_c_message_free_unpacked(&h->base, NULL);
    return status;
}

static void health(void **state)
{
    (void)state;
    call c, w, g;
    Grpc__Health__V1__HealthCheckRequest h = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    static const char *const names[] = {NULL, "", "turbomesh.v1.TurboMesh"};
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        h.service = (char *)(uintptr_t)names[i];
        call_start(&c, "/grpc.health.v1.Health/Check", &h.base);
        WAIT_FOR(is_closed(&c));
        assert_int_equal(c.count, 1);
        assert_int_equal(health_of(&c, 0), 1);
        call_free(&c);
    }
    h.service = (char *)(uintptr_t) "nothing";
    call_start(&c, "/grpc.health.v1.Health/Check", &h.base);
    expect_error(&c, TM_STATUS_NOT_FOUND, "");
    h.service = NULL;
    call_start(&w, "/grpc.health.v1.Health/Watch", &h.base);
    WAIT_FOR(count_of(&w) == 1);
    assert_int_equal(health_of(&w, 0), 1);
    fake.groups_ready = 0;
    WAIT_FOR(count_of(&w) == 2);
    assert_int_equal(health_of(&w, 1), 2);
    fake.groups_ready = 1;
    WAIT_FOR(count_of(&w) == 3);
    assert_int_equal(health_of(&w, 2), 1);
    /* Draining: what runs goes on, what is new is refused, the watcher is told. */
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    call_start(&g, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    tm_public_set_serving(T.server, false);
    WAIT_FOR(count_of(&w) == 4);
    assert_int_equal(health_of(&w, 3), 2);
    call_start(&c, "Generate", &r.base);
    expect_error(&c, TM_STATUS_UNAVAILABLE, "shutting down");
    fake_admit(fake.gens[0]);
    fake_end(fake.gens[0], TM_GEN_STOP);
    WAIT_FOR(is_closed(&g));
    assert_int_equal(g.st, TM_OK);
    call_free(&g);
    call_free(&w);
}

/* A server that goes away ends what runs with UNAVAILABLE. */
static void destroy_ends_all(void **state)
{
    (void)state;
    start(NULL);
    call c;
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    call_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    tm_public_destroy(T.server, 2000);
    T.server = NULL;
    assert_int_equal(fake.active, 0);
    expect_error(&c, TM_STATUS_UNAVAILABLE, "stops");
    stop(NULL);
}

static void models(void **state)
{
    (void)state;
    call c;
    PUB(ListModelsRequest) q = TURBOMESH__V1__LIST_MODELS_REQUEST__INIT;
    call_start(&c, "ListModels", &q.base);
    WAIT_FOR(is_closed(&c));
    assert_int_equal(c.st, TM_OK);
    PUB(ListModelsReply) *m = unpack(&c, 0, &turbomesh__v1__list_models_reply__descriptor);
    assert_int_equal(m->n_model, 1);
    assert_string_equal(m->model[0]->id, "demo");
    assert_int_equal(m->model[0]->max_context, fake_served->max_context);
    assert_int_equal(m->model[0]->groups, 1);
    protobuf_c_message_free_unpacked(&m->base, NULL);
    call_free(&c);
}

typedef Grpc__Reflection__V1__ServerReflectionRequest reflect_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflect_response;

static reflect_response *ask(call *c, const reflect_request *q)
{
    int n = count_of(c);
    send_message(c, &q->base);
    WAIT_FOR(count_of(c) == n + 1);
    return unpack(c, n, &grpc__reflection__v1__server_reflection_response__descriptor);
}

/* The file descriptor that answers, or an empty one when the answer is an error. */
static void ask_file(call *c, bool by_symbol, const char *name, const char *want)
{
    reflect_request q = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    q.message_request_case =
        by_symbol
            ? GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL
            : GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    q.file_by_filename = (char *)(uintptr_t)name; /* one union */
    reflect_response *r = ask(c, &q);
    if (want) {
        assert_int_equal(
            r->message_response_case,
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
        const ProtobufCBinaryData *f = &r->file_descriptor_response->file_descriptor_proto[0];
        assert_int_equal(r->file_descriptor_response->n_file_descriptor_proto, 1);
        assert_non_null(memmem(f->data, TM_MIN(f->len, (size_t)64), want, strlen(want)));
    } else {
        assert_int_equal(
            r->message_response_case,
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE);
        assert_int_equal(r->error_response->error_code, 5);
    }
    protobuf_c_message_free_unpacked(&r->base, NULL);
}

static void reflection(void **state)
{
    (void)state;
    static const char *const versions[] = {"v1", "v1alpha"};
    for (size_t v = 0; v < TM_ARRAY_LEN(versions); v++) {
        call c;
        char path[100];
        snprintf(path, sizeof path, "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo",
                 versions[v]);
        open_call(&c, path, NULL, 0);
        reflect_request q = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
        q.message_request_case =
            GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
        q.list_services = (char *)(uintptr_t) "*";
        reflect_response *r = ask(&c, &q);
        assert_int_equal(r->list_services_response->n_service, 4);
        assert_string_equal(r->original_request->list_services, "*");
        protobuf_c_message_free_unpacked(&r->base, NULL);
        ask_file(&c, false, "turbomesh.proto", "turbomesh.v1");
        ask_file(&c, false, "health.proto", "grpc.health.v1");
        ask_file(&c, false, "nothing.proto", NULL);
        ask_file(&c, true, "turbomesh.v1.TurboMesh", "turbomesh.proto");
        ask_file(&c, true, "turbomesh.v1.TurboMesh.Chat", "turbomesh.proto");
        ask_file(&c, true, "turbomesh.v1.GenerateChunk.text", "turbomesh.proto");
        ask_file(&c, true, "grpc.health.v1.HealthCheckResponse.ServingStatus", "health.proto");
        ask_file(&c, true, "grpc.reflection.v1alpha.ServerReflection", "v1alpha");
        ask_file(&c, true, "turbomesh.v1.Nothing", NULL);
        ask_file(&c, true, "turbomesh.v1.Turbo", NULL);
        ask_file(&c, true, "turbomesh", NULL);
        ask_file(&c, true, "", NULL);
        tm_rpc_stream_half_close(c.stream);
        WAIT_FOR(is_closed(&c));
        assert_int_equal(c.st, TM_OK);
        call_free(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(generate, start, stop),
        cmocka_unit_test_setup_teardown(tokens_and_logprobs, start, stop),
        cmocka_unit_test_setup_teardown(chat, start, stop),
        cmocka_unit_test_setup_teardown(stops, start, stop),
        cmocka_unit_test_setup_teardown(bad_requests, start, stop),
        cmocka_unit_test_setup_teardown(bad_calls, start, stop),
        cmocka_unit_test_setup_teardown(dispatch_errors, start, stop),
        cmocka_unit_test_setup_teardown(client_leaves, start, stop),
        cmocka_unit_test_setup_teardown(leaving_at_any_time, start, stop),
        cmocka_unit_test_setup_teardown(long_prompts, start, stop),
        cmocka_unit_test(clients_that_do_not_read),
        cmocka_unit_test(keys_and_limits),
        cmocka_unit_test(too_many_calls),
        cmocka_unit_test(destroy_ends_all),
        cmocka_unit_test_setup_teardown(health, start, stop),
        cmocka_unit_test_setup_teardown(models, start, stop),
        cmocka_unit_test_setup_teardown(reflection, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
