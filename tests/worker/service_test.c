/* The worker's service over the fake engine, seen from a router: what comes on the Attach stream, in which
 * order, and what happens to requests when either side goes. Steps happen by hand, so nothing here depends on
 * speed except where a test says so. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "proto/health.pb-c.h"
#include "tests/worker/fake_engine.h"
#include "tests/worker/router_end.h"
#include "worker/service.h"

#define SERVING(x) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##x

/* ---- fixture ---- */

typedef struct fixture {
    tm_engine *engine;
    tm_worker_service *service;
    tm_rpc_channel *channel;
    int lost, drains;
    int64_t drain_ms;
} fixture;

static void on_lost(void *user)
{
    fixture *f = user;
    __atomic_add_fetch(&f->lost, 1, __ATOMIC_SEQ_CST);
}

static void on_drain(void *user, int64_t deadline_ms)
{
    fixture *f = user;
    f->drain_ms = deadline_ms;
    __atomic_add_fetch(&f->drains, 1, __ATOMIC_SEQ_CST);
}

static fixture *start(const tm_fake_opts *fo, size_t queue_max)
{
    fixture *f = calloc(1, sizeof(*f));
    tm_err err = TM_ERR_INIT;
    char address[64];
    assert_non_null(f);
    assert_int_equal(tm_fake_open(&f->engine, fo, &err), TM_OK);
    tm_worker_service_opts o = {.engine = f->engine,
                                .address = "127.0.0.1:0",
                                .group = "g1",
                                .model_name = "demo",
                                .model_dir = MODEL,
                                .epoch = 1000,
                                .stream_queue_max = queue_max,
                                .on_lost = on_lost,
                                .on_drain = on_drain,
                                .user = f};
    if (tm_worker_service_create(&f->service, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    snprintf(address, sizeof(address), "127.0.0.1:%d", tm_worker_service_port(f->service));
    assert_int_equal(tm_rpc_channel_create(&f->channel, address, &err), TM_OK);
    return f;
}

static tm_fake_opts by_hand(void)
{
    tm_fake_opts o = tm_fake_opts_default();
    o.model_dir = MODEL;
    o.step_us = -1;
    o.max_batch_size = 64;
    o.queue_max = 32;
    o.max_context = 256;
    return o;
}

static int setup(void **state)
{
    tm_fake_opts o = by_hand();
    *state = start(&o, 0);
    return 0;
}

static void stop(fixture *f)
{
    tm_rpc_channel_destroy(f->channel);
    tm_worker_service_destroy(f->service, 2000);
    tm_engine_close(f->engine);
    free(f);
}

static int teardown(void **state)
{
    stop(*state);
    return 0;
}

static void wait_live(fixture *f, int n)
{
    int64_t until = tm_clock_ms() + WAIT_MS;
    while (tm_fake_live(f->engine) != n && tm_clock_ms() < until)
        tm_sleep_ms(1);
    assert_int_equal(tm_fake_live(f->engine), n);
}

static void assert_script(const told *t, int from, int count)
{
    assert_int_equal(t->tokens, count);
    assert_int_equal(t->first_pos, count ? from : -1);
    assert_false(t->broken);
    for (int i = 0; i < count; i++)
        assert_int_equal(t->token[i], tm_fake_token(PROMPT, TM_ARRAY_LEN(PROMPT), from + i, VOCAB));
}

/* ---- tests ---- */

static void test_hello_first(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    assert_int_equal(r->msg[0]->m_case, TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO);
    assert_int_equal(r->msg[1]->m_case, TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD);
    const PB(Hello) *h = r->msg[0]->hello;
    assert_int_equal(r->msg[0]->epoch, 1000);
    assert_int_equal(h->epoch, 1000);
    assert_string_equal(h->group, "g1");
    assert_string_equal(h->model, "demo");
    assert_int_equal(strlen(h->digest), 64);
    assert_int_equal(h->max_context, 256);
    assert_int_equal(h->max_batch_size, 64);
    assert_int_equal(h->vocab, tm_engine_info_get(f->engine)->model.vocab);
    assert_int_equal(h->n_stop_id, tm_engine_info_get(f->engine)->model.stop_count);
    assert_int_equal(r->msg[1]->load->state, STATE(READY));
    detach(r);
}

static void test_submit(void **state)
{
    enum { N = 5 };
    fixture *f = *state;
    router *r = attach(f->channel);
    for (int i = 0; i < N; i++)
        send_plain(r, 100 + (uint64_t)i, 1 + i);
    wait_live(f, N);
    for (int i = 0; i < N; i++)
        tm_fake_step(f->engine);
    assert_true(wait_router(r, has_events, N * (N + 1) / 2));
    for (int i = 0; i < N; i++) {
        told t = tell(r, 100 + (uint64_t)i);
        assert_int_equal(t.admitted, 1);
        assert_int_equal(t.prompt_tokens, TM_ARRAY_LEN(PROMPT));
        assert_int_equal(t.finishes, 1);
        assert_int_equal(t.finish, FINISH(LENGTH));
        assert_script(&t, 0, 1 + i);
    }
    /* All requests of a step share one message. */
    int steps = 0;
    for (int i = 0; i < r->count; i++)
        if (r->msg[i]->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP)
            assert_int_equal(r->msg[i]->step->n_event, N - steps++);
    assert_int_equal(steps, N);
    assert_int_equal(tm_worker_service_live(f->service), 0);
    send_plain(r, 100, 1); /* a finished id may be used again */
    wait_live(f, 1);
    detach(r);
}

static void test_two_routers(void **state)
{
    fixture *f = *state;
    router *a = attach(f->channel), *b = attach(f->channel);
    send_plain(a, 7, 3);
    wait_live(f, 1);
    send_plain(b, 7, 2);
    wait_live(f, 2);
    for (int i = 0; i < 3; i++)
        tm_fake_step(f->engine);
    assert_true(wait_router(a, has_events, 3) && wait_router(b, has_events, 2));
    told ta = tell(a, 7), tb = tell(b, 7);
    assert_script(&ta, 0, 3);
    assert_script(&tb, 0, 2);
    assert_int_equal(ta.finishes + tb.finishes, 2);
    detach(a);
    detach(b);
}

static void test_continuation_positions(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    int32_t done[4];
    for (int i = 0; i < 4; i++)
        done[i] = tm_fake_token(PROMPT, TM_ARRAY_LEN(PROMPT), i, VOCAB);
    PB(Submit) s = plain(1, 6);
    s.generated = done;
    s.n_generated = 4;
    send_submit(r, &s);
    wait_live(f, 1);
    for (int i = 0; i < 2; i++)
        tm_fake_step(f->engine);
    assert_true(wait_router(r, has_events, 2));
    told t = tell(r, 1);
    assert_script(&t, 4, 2);
    assert_int_equal(t.finish, FINISH(LENGTH));
    detach(r);
}

static void test_logprobs(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    PB(Submit) s = plain(1, 2);
    PB(Sampling) p = TURBOMESH__WORKER__V1__SAMPLING__INIT;
    p.has_logprobs = p.has_prompt_logprobs = 1;
    p.logprobs = 3;
    p.prompt_logprobs = 1;
    s.sampling = &p;
    send_submit(r, &s);
    send_plain(r, 2, 2);
    wait_live(f, 2);
    tm_fake_step(f->engine);
    assert_true(wait_router(r, has_events, 2));
    const PB(RequestEvent) *one = NULL, *two = NULL;
    for (int i = 0; i < r->count; i++)
        if (r->msg[i]->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP) {
            one = r->msg[i]->step->event[0];
            two = r->msg[i]->step->event[1];
        }
    assert_true(one && two && one->id == 1 && two->id == 2);
    assert_int_equal(one->n_token, 1);
    assert_int_equal(one->n_logprob, 1);
    assert_int_equal(one->logprob[0]->n_top, 3);
    assert_int_equal(one->logprob[0]->top[0]->token, one->token[0]);
    assert_true(one->logprob[0]->logprob == -0.5f);
    assert_int_equal(one->first_prompt_pos, 1);
    assert_int_equal(one->n_prompt_token, TM_ARRAY_LEN(PROMPT) - 1);
    assert_int_equal(one->n_prompt_logprob, TM_ARRAY_LEN(PROMPT) - 1);
    for (size_t i = 0; i < one->n_prompt_token; i++) {
        assert_int_equal(one->prompt_token[i], PROMPT[i + 1]);
        assert_int_equal(one->prompt_logprob[i]->n_top, 1);
        assert_int_equal(one->prompt_logprob[i]->top[0]->token, PROMPT[i + 1]);
    }
    assert_int_equal(two->n_token, 1);
    assert_int_equal(two->n_logprob + two->n_prompt_token, 0);
    detach(r);
}

static void test_cancel(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    send_plain(r, 1, 100);
    send_plain(r, 2, 100);
    wait_live(f, 2);
    tm_fake_step(f->engine);
    send_cancel(r, 999); /* unknown: nothing happens */
    send_cancel(r, 1);
    while (tm_fake_cancels(f->engine) < 1)
        tm_sleep_ms(1);
    tm_fake_step(f->engine);
    assert_true(wait_router(r, has_events, 4));
    told t = tell(r, 1), u = tell(r, 2);
    assert_int_equal(t.finish, FINISH(CANCELLED));
    assert_script(&t, 0, 1);
    assert_int_equal(u.finishes, 0);
    assert_script(&u, 0, 2);
    assert_int_equal(tm_worker_service_live(f->service), 1);
    detach(r);
}

static void expect_reject(router *r, PB(Submit) * s, PB(RejectReason) reason, const char *text)
{
    send_submit(r, s);
    told t = tell(r, s->id);
    /* Events of other requests may come between. */
    for (int64_t until = tm_clock_ms() + WAIT_MS; t.rejects == 0 && tm_clock_ms() < until;) {
        tm_sleep_ms(1);
        t = tell(r, s->id);
    }
    assert_int_equal(t.rejects, 1);
    assert_int_equal(t.reject, reason);
    if (!strstr(t.detail, text))
        fail_msg("'%s' does not say '%s'", t.detail, text);
}

static void test_rejects(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    int32_t bad[] = {5, 1 << 20};
    int32_t long_prompt[300] = {0};
    PB(Submit) s = plain(1, 10);
    s.prompt = bad;
    s.n_prompt = 2;
    expect_reject(r, &s, REJECT(INVALID), "1048576");
    s = plain(2, 10);
    s.prompt = long_prompt;
    s.n_prompt = 256;
    expect_reject(r, &s, REJECT(TOO_LONG), "256");
    s = plain(3, 10);
    s.has_expected_epoch = 1;
    s.expected_epoch = 999;
    expect_reject(r, &s, REJECT(STALE_EPOCH), "1000");
    s = plain(4, 10);
    s.n_prompt = 0;
    expect_reject(r, &s, REJECT(INVALID), "empty");
    assert_int_equal(tm_fake_live(f->engine), 0);

    s = plain(5, 10);
    s.prompt = long_prompt; /* 256 tokens fit when nothing is to be generated */
    s.n_prompt = 256;
    s.max_tokens = 0;
    send_submit(r, &s);
    wait_live(f, 1);
    s = plain(5, 10);
    expect_reject(r, &s, REJECT(INVALID), "in use");
    for (uint64_t i = 0; i < 31; i++)
        send_plain(r, 100 + i, 10);
    wait_live(f, 32);
    s = plain(6, 10);
    expect_reject(r, &s, REJECT(BUSY), "full");
    assert_int_equal(tm_worker_service_live(f->service), 32);
    detach(r);
}

static void test_router_leaves(void **state)
{
    fixture *f = *state;
    router *a = attach(f->channel), *b = attach(f->channel);
    send_plain(b, 1, 100);
    for (uint64_t i = 0; i < 10; i++)
        send_plain(a, i, 100);
    wait_live(f, 11);
    tm_fake_step(f->engine);
    detach(a);
    while (tm_fake_cancels(f->engine) < 10)
        tm_sleep_ms(1);
    tm_fake_step(f->engine);
    wait_live(f, 1);
    assert_true(wait_router(b, has_events, 2));
    told t = tell(b, 1);
    assert_script(&t, 0, 2);
    assert_int_equal(tm_worker_service_live(f->service), 1);
    detach(b);
}

static void test_half_close_ends_the_stream(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    send_plain(r, 1, 100);
    wait_live(f, 1);
    tm_rpc_stream_half_close(r->stream);
    assert_true(wait_router(r, is_closed, 0));
    assert_int_equal(r->st, TM_OK);
    assert_int_equal(tm_fake_cancels(f->engine), 1);
    detach(r);
}

static void test_garbage(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel), *other = attach(f->channel);
    assert_int_equal(tm_rpc_stream_send(r->stream, "\x12\xff\xff\xff", 4), TM_OK);
    assert_true(wait_router(r, is_closed, 0));
    assert_int_equal(r->st, TM_STATUS_INVALID);
    detach(r);
    send_plain(other, 1, 1); /* nobody else suffers */
    wait_live(f, 1);
    tm_fake_step(f->engine);
    assert_true(wait_router(other, has_events, 1));
    detach(other);
}

static void test_epochs(void **state)
{
    fixture *f = *state;
    router *old = attach(f->channel);
    tm_worker_service_set_epoch(f->service, 2000);
    router *new = attach(f->channel);
    assert_int_equal(new->msg[0]->hello->epoch, 2000);
    PB(Submit) s = plain(1, 1);
    s.has_expected_epoch = 1;
    s.expected_epoch = 1000;
    send_submit(old, &s); /* of its Hello */
    s.id = 2;
    s.expected_epoch = 2000;
    send_submit(old, &s); /* of the group */
    wait_live(f, 2);
    s.id = 3;
    s.expected_epoch = 1000;
    expect_reject(new, &s, REJECT(STALE_EPOCH), "2000");
    tm_fake_step(f->engine);
    assert_true(wait_router(old, has_events, 2));
    for (int i = 0; i < old->count; i++)
        assert_int_equal(old->msg[i]->epoch, 1000);
    detach(old);
    detach(new);
}

static void test_load_reports(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    send_plain(r, 1, 50);
    send_plain(r, 2, 50);
    wait_live(f, 2);
    int seen = r->loads;
    int64_t t = tm_clock_ms();
    assert_true(wait_router(r, has_loads, seen + 10));
    int64_t took = tm_clock_ms() - t;
    print_message("10 load reports in %lld ms\n", (long long)took);
    assert_true(took >= 450); /* never more often than every 50 ms */
    uint64_t seq = 0;
    const PB(LoadReport) *last = NULL;
    for (int i = 0; i < r->count; i++)
        if (r->msg[i]->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD) {
            last = r->msg[i]->load;
            assert_int_equal(last->seq, ++seq);
        }
    assert_non_null(last);
    assert_int_equal(last->last_submit_seq, 2);
    assert_int_equal(last->waiting, 2);
    detach(r);
}

static void test_drain(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    send_plain(r, 1, 2);
    send_plain(r, 2, 100);
    wait_live(f, 2);
    tm_fake_step(f->engine);
    tm_worker_service_drain(f->service);
    assert_true(wait_router(r, last_load_drains, 0));
    PB(Submit) s = plain(3, 10);
    expect_reject(r, &s, REJECT(DRAINING), "draining");
    tm_fake_step(f->engine); /* 1 ends by itself, 2 goes on */
    assert_true(wait_router(r, has_events, 5));
    told t = tell(r, 1);
    assert_int_equal(t.finish, FINISH(LENGTH));
    assert_int_equal(tm_worker_service_live(f->service), 1);
    tm_worker_service_hand_back(f->service);
    tm_fake_step(f->engine);
    assert_true(wait_router(r, has_events, 6));
    t = tell(r, 2);
    assert_int_equal(t.finish, FINISH(HANDBACK));
    assert_script(&t, 0, 2);
    assert_int_equal(tm_worker_service_live(f->service), 0);
    assert_int_equal(tm_worker_service_handed_back(f->service), 1);
    /* The end: the stream closes after everything queued. */
    tm_worker_service_destroy(f->service, 5000);
    f->service = NULL;
    assert_true(wait_router(r, is_closed, 0));
    assert_int_equal(r->st, TM_STATUS_UNAVAILABLE);
    detach(r);
}

static void test_router_asks_for_drain(void **state)
{
    fixture *f = *state;
    router *r = attach(f->channel);
    PB(RouterMessage) m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    PB(Drain) d = TURBOMESH__WORKER__V1__DRAIN__INIT;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_DRAIN;
    m.drain = &d;
    d.has_deadline_ms = 1;
    d.deadline_ms = 1234;
    send_message(r, &m);
    for (int i = 0; i < 2000 && !__atomic_load_n(&f->drains, __ATOMIC_SEQ_CST); i++)
        tm_sleep_ms(5);
    assert_int_equal(f->drains, 1);
    assert_int_equal(f->drain_ms, 1234);
    detach(r);
}

static void test_engine_lost(void **state)
{
    fixture *f = *state;
    tm_fake_lose(f->engine);
    for (int i = 0; i < 2000 && !__atomic_load_n(&f->lost, __ATOMIC_SEQ_CST); i++)
        tm_sleep_ms(5);
    assert_int_equal(f->lost, 1);
}

/* A router that stops reading is cut at the bound, and only it. */
static void test_slow_router(void **state)
{
    (void)state;
    tm_fake_opts o = by_hand();
    o.queue_max = 512;
    o.max_batch_size = 512;
    o.max_context = 1 << 20;
    fixture *f = start(&o, 256 << 10);
    router *slow = attach(f->channel);
    tm_err err = TM_ERR_INIT;
    tm_rpc_channel *second = NULL; /* a channel has one thread, and that one sleeps */
    char address[64];
    snprintf(address, sizeof(address), "127.0.0.1:%d", tm_worker_service_port(f->service));
    assert_int_equal(tm_rpc_channel_create(&second, address, &err), TM_OK);
    tm_rpc_channel *first = f->channel;
    f->channel = second;
    router *good = attach(f->channel);
    send_plain(good, 1, 100000);
    PB(Sampling) p = TURBOMESH__WORKER__V1__SAMPLING__INIT;
    p.has_logprobs = 1;
    p.logprobs = 20;
    for (uint64_t i = 0; i < 300; i++) {
        PB(Submit) s = plain(i, 100000);
        s.sampling = &p;
        send_submit(slow, &s);
    }
    wait_live(f, 301); /* all sent: from here on its thread may sleep at any message */
    pthread_mutex_lock(&slow->lock);
    slow->paused = true;
    pthread_mutex_unlock(&slow->lock);
    int steps = 0;
    while (tm_fake_cancels(f->engine) < 300 && steps < 3000) {
        tm_fake_step(f->engine);
        assert_true(wait_router(good, has_events, ++steps));
    }
    print_message("cut after %d steps\n", steps);
    assert_int_equal(tm_fake_cancels(f->engine), 300);
    tm_fake_step(f->engine);
    wait_live(f, 1);
    assert_false(good->closed);
    pthread_mutex_lock(&slow->lock);
    slow->paused = false;
    pthread_cond_broadcast(&slow->cond);
    pthread_mutex_unlock(&slow->lock);
    assert_true(wait_router(slow, is_closed, 0));
    detach(good);
    detach(slow);
    tm_rpc_channel_destroy(first);
    stop(f);
}

static void test_assets(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    void *bytes = NULL;
    size_t len = 0;
    assert_int_equal(
        tm_rpc_unary(f->channel, WORKER("GetModelAssets"), "", 0, 10000, &bytes, &len, &err),
        TM_OK);
    PB(AssetsReply) *a = turbomesh__worker__v1__assets_reply__unpack(NULL, len, bytes);
    assert_non_null(a);
    assert_string_equal(a->digest, tm_engine_info_get(f->engine)->model.digest);
    int found = 0;
    for (size_t i = 0; i < a->n_asset; i++)
        if (strcmp(a->asset[i]->name, "tokenizer.json") == 0 ||
            strcmp(a->asset[i]->name, "config.json") == 0)
            found += a->asset[i]->data.len > 100;
    assert_int_equal(found, 2);
    turbomesh__worker__v1__assets_reply__free_unpacked(a, NULL);
    free(bytes);
    assert_int_equal(tm_rpc_unary(f->channel, WORKER("GetModelAssets"),
                                  "\x0a\x03"
                                  "abc",
                                  5, 10000, &bytes, &len, &err),
                     TM_STATUS_STALE);
}

static void test_status(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    void *bytes = NULL;
    size_t len = 0;
    assert_int_equal(
        tm_rpc_unary(f->channel, WORKER("GetStatus"), "", 0, 10000, &bytes, &len, &err), TM_OK);
    PB(StatusReply) *s = turbomesh__worker__v1__status_reply__unpack(NULL, len, bytes);
    assert_true(s && s->hello && s->load);
    assert_string_equal(s->hello->group, "g1");
    assert_int_equal(s->load->state, STATE(READY));
    turbomesh__worker__v1__status_reply__free_unpacked(s, NULL);
    free(bytes);
}

static int check_health(fixture *f, const char *service, tm_status *st)
{
    Grpc__Health__V1__HealthCheckRequest q = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    char name[64];
    uint8_t request[80];
    void *bytes = NULL;
    size_t len = 0;
    tm_err err = TM_ERR_INIT;
    snprintf(name, sizeof(name), "%s", service);
    q.service = name;
    size_t n = grpc__health__v1__health_check_request__pack(&q, request);
    *st = tm_rpc_unary(f->channel, "/grpc.health.v1.Health/Check", request, n, 10000, &bytes, &len,
                       &err);
    if (*st != TM_OK)
        return -1;
    Grpc__Health__V1__HealthCheckResponse *r =
        grpc__health__v1__health_check_response__unpack(NULL, len, bytes);
    assert_non_null(r);
    int status = (int)r->status;
    grpc__health__v1__health_check_response__free_unpacked(r, NULL);
    free(bytes);
    return status;
}

typedef struct watching {
    int seen, last;
} watching;

static void watch_message(void *user, const void *data, size_t len)
{
    watching *w = user;
    Grpc__Health__V1__HealthCheckResponse *r =
        grpc__health__v1__health_check_response__unpack(NULL, len, data);
    assert_non_null(r);
    __atomic_store_n(&w->last, (int)r->status, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&w->seen, 1, __ATOMIC_SEQ_CST);
    grpc__health__v1__health_check_response__free_unpacked(r, NULL);
}

static void wait_watch(watching *w, int seen, int status)
{
    for (int i = 0; i < 2000 && __atomic_load_n(&w->seen, __ATOMIC_SEQ_CST) < seen; i++)
        tm_sleep_ms(5);
    assert_int_equal(w->seen, seen);
    assert_int_equal(w->last, status);
}

static void test_health(void **state)
{
    static const tm_rpc_stream_ops ops = {NULL, watch_message, NULL};
    fixture *f = *state;
    tm_status st;
    tm_err err = TM_ERR_INIT;
    watching w = {0, -1};
    tm_rpc_stream *s = NULL;
    assert_int_equal(check_health(f, "", &st), SERVING(SERVING));
    assert_int_equal(check_health(f, "turbomesh.worker.v1.Worker", &st), SERVING(SERVING));
    check_health(f, "nobody", &st);
    assert_int_equal(st, TM_STATUS_NOT_FOUND);
    assert_int_equal(
        tm_rpc_stream_open(&s, f->channel, "/grpc.health.v1.Health/Watch", NULL, 0, &ops, &w, &err),
        TM_OK);
    tm_rpc_stream_send(s, "", 0);
    wait_watch(&w, 1, SERVING(SERVING));
    tm_worker_service_drain(f->service);
    wait_watch(&w, 2, SERVING(NOT_SERVING));
    assert_int_equal(check_health(f, "", &st), SERVING(NOT_SERVING));
    tm_rpc_channel_destroy(f->channel);
    f->channel = NULL;
    tm_rpc_stream_release(s);
}

#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    tm_log_init("worker_service_test", TM_LOG_ERROR, TM_LOG_TEXT);
    const struct CMUnitTest tests[] = {
        CASE(test_hello_first),
        CASE(test_submit),
        CASE(test_two_routers),
        CASE(test_continuation_positions),
        CASE(test_logprobs),
        CASE(test_cancel),
        CASE(test_rejects),
        CASE(test_router_leaves),
        CASE(test_half_close_ends_the_stream),
        CASE(test_garbage),
        CASE(test_epochs),
        CASE(test_load_reports),
        CASE(test_drain),
        CASE(test_router_asks_for_drain),
        CASE(test_engine_lost),
        cmocka_unit_test(test_slow_router),
        CASE(test_assets),
        CASE(test_status),
        CASE(test_health),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
