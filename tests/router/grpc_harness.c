/* Rig and client of the gRPC tests. */
#include "tests/router/grpc_harness.h"

#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

grpc_rig grig;

void grig_start(const char *key_file, const tm_public_opts *over, tm_limit_opts limit)
{
    tm_err err = TM_ERR_INIT;
    char address[32];
    tm_log_init("grpc_test", getenv("TM_TEST_LOG") ? TM_LOG_DEBUG : TM_LOG_ERROR, TM_LOG_TEXT);
    grig.base = fake_base = event_base_new();
    grig.metrics = tm_metrics_create();
    fake_load_served();
    fake_reset();
    assert_int_equal(tm_keys_create(&grig.keys, key_file, &err), TM_OK);
    grig.access = (tm_access){grig.keys, limit, grig.metrics};
    tm_public_opts o = over ? *over : (tm_public_opts){.text_inline_bytes = 8192};
    o.base = grig.base;
    o.metrics = grig.metrics;
    o.address = "127.0.0.1:0";
    o.access = tm_access_for_grpc(&grig.access);
    o.limits = tm_api_limits_default();
    if (tm_public_create(&grig.server, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    snprintf(address, sizeof address, "127.0.0.1:%d", tm_public_port(grig.server));
    assert_int_equal(tm_rpc_channel_create(&grig.channel, address, &err), TM_OK);
}

int grig_setup(void **state)
{
    (void)state;
    grig_start(NULL, NULL, (tm_limit_opts){0});
    return 0;
}

int grig_teardown(void **state)
{
    (void)state;
    tm_rpc_channel_destroy(grig.channel);
    tm_public_destroy(grig.server, 1000);
    assert_int_equal(fake.active, 0);
    tm_keys_destroy(grig.keys);
    tm_metrics_destroy(grig.metrics);
    fake_reset();
    assert_int_equal(fake_served->refs, 1);
    tm_served_release(fake_served);
    event_base_free(grig.base);
    return 0;
}

/* ---- a call ---- */

static void on_message(void *user, const void *data, size_t len)
{
    gcall *c = user;
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
    gcall *c = user;
    pthread_mutex_lock(&c->lock);
    c->closed = true;
    c->st = st;
    snprintf(c->text, sizeof c->text, "%s", message ? message : "");
    pthread_mutex_unlock(&c->lock);
}

void gcall_open(gcall *c, const char *path, const char *authorization, int64_t deadline_ms)
{
    static const tm_rpc_stream_ops ops = {NULL, on_message, on_close};
    const char *meta[] = {"authorization", authorization, NULL};
    tm_err err = TM_ERR_INIT;
    memset(c, 0, sizeof *c);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->go, NULL);
    if (tm_rpc_stream_open(&c->stream, grig.channel, path, authorization ? meta : NULL, deadline_ms,
                           &ops, c, &err) != TM_OK)
        fail_msg("%s", err.msg);
}

void gcall_send(gcall *c, const ProtobufCMessage *m)
{
    size_t len = protobuf_c_message_get_packed_size(m);
    uint8_t *data = malloc(len + 1);
    protobuf_c_message_pack(m, data);
    tm_status st = tm_rpc_stream_send(c->stream, data, len);
    assert_true(st == TM_OK || st == TM_STATUS_CLOSED); /* refused before it had a message */
    free(data);
}

void gcall_start(gcall *c, const char *method, const ProtobufCMessage *m)
{
    char path[100];
    snprintf(path, sizeof path, "%s%s", *method == '/' ? "" : SERVICE, method);
    gcall_open(c, path, NULL, 0);
    gcall_send(c, m);
    tm_rpc_stream_half_close(c->stream);
}

void grig_turn(void)
{
    struct timeval tick = {0, 2000};
    event_base_loopexit(grig.base, &tick);
    event_base_loop(grig.base, EVLOOP_ONCE);
}

bool gcall_closed(gcall *c)
{
    pthread_mutex_lock(&c->lock);
    bool closed = c->closed;
    pthread_mutex_unlock(&c->lock);
    return closed;
}

int gcall_count(gcall *c)
{
    pthread_mutex_lock(&c->lock);
    int n = c->count;
    pthread_mutex_unlock(&c->lock);
    return n;
}

void gcall_free(gcall *c)
{
    if (!gcall_closed(c))
        tm_rpc_stream_cancel(c->stream);
    WAIT_FOR(gcall_closed(c));
    tm_rpc_stream_release(c->stream);
    for (int i = 0; i < c->count; i++)
        free(c->got[i].data);
    pthread_cond_destroy(&c->go);
    pthread_mutex_destroy(&c->lock);
}

void *gcall_unpack(const gcall *c, int i, const ProtobufCMessageDescriptor *d)
{
    assert_true(i < c->count);
    void *m = protobuf_c_message_unpack(d, NULL, c->got[i].len, c->got[i].data);
    assert_non_null(m);
    return m;
}

/* ---- what a generation brought ---- */

void told_free(told *t)
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

void gcall_hear(gcall *c, told *t)
{
    *t = (told){0};
    tm_buf_init(&t->text, 0);
    WAIT_FOR(gcall_closed(c));
    if (c->st != TM_OK)
        fail_msg("status %s: %s", tm_status_name(c->st), c->text);
    for (int i = 0; i < c->count; i++) {
        PUB(GenerateChunk) *k = gcall_unpack(c, i, &turbomesh__v1__generate_chunk__descriptor);
        add_chunk(t, k, i == 0, i == c->count - 1);
        protobuf_c_message_free_unpacked(&k->base, NULL);
    }
}

void assert_told(const told *t, const char *want)
{
    assert_string_equal(t->text.data ? t->text.data : "", want);
}

/* The generated initialiser of a union of bytes does not compile without warnings. */
PUB(GenerateRequest) empty_request(void)
{
    PUB(GenerateRequest) r;
    turbomesh__v1__generate_request__init(&r);
    return r;
}

PUB(GenerateRequest) text_request(const char *text, PUB(SamplingParams) * sampling)
{
    PUB(GenerateRequest) r = empty_request();
    r.prompt_case = TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = (ProtobufCBinaryData){strlen(text), (uint8_t *)(uintptr_t)text};
    r.sampling = sampling;
    return r;
}

void gcall_expect(gcall *c, tm_status st, const char *part)
{
    WAIT_FOR(gcall_closed(c));
    if (c->st != st || strstr(c->text, part) == NULL)
        fail_msg("%s: %s; expected %s: %s", tm_status_name(c->st), c->text, tm_status_name(st),
                 part);
    gcall_free(c);
}
