/* See router_end.h. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include "tests/worker/router_end.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"

int32_t PROMPT[4] = {300, 301, 302, 303};

static void rt_message(void *user, const void *data, size_t len)
{
    router *r = user;
    PB(WorkerMessage) *m = turbomesh__worker__v1__worker_message__unpack(NULL, len, data);
    assert_non_null(m);
    pthread_mutex_lock(&r->lock);
    while (r->paused)
        pthread_cond_wait(&r->cond, &r->lock);
    if (m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD)
        r->loads++;
    if (m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP)
        r->events += (int)m->step->n_event;
    if (r->count < MSGS_MAX)
        r->msg[r->count++] = m;
    else
        turbomesh__worker__v1__worker_message__free_unpacked(m, NULL);
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static void rt_close(void *user, tm_status st, const char *message)
{
    router *r = user;
    (void)message;
    pthread_mutex_lock(&r->lock);
    r->closed = true;
    r->st = st;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

bool wait_router(router *r, condition is, int n)
{
    int64_t until = tm_clock_ms() + WAIT_MS;
    pthread_mutex_lock(&r->lock);
    while (!is(r, n) && tm_clock_ms() < until) {
        struct timespec ts;
        clock_gettime(CLOCK_REALTIME, &ts);
        ts.tv_sec += (ts.tv_nsec + 50000000) / 1000000000;
        ts.tv_nsec = (ts.tv_nsec + 50000000) % 1000000000;
        pthread_cond_timedwait(&r->cond, &r->lock, &ts);
    }
    bool ok = is(r, n);
    pthread_mutex_unlock(&r->lock);
    return ok;
}

bool has_messages(const router *r, int n)
{
    return r->count >= n;
}

bool has_loads(const router *r, int n)
{
    return r->loads >= n;
}

bool has_events(const router *r, int n)
{
    return r->events >= n;
}

bool is_closed(const router *r, int n)
{
    (void)n;
    return r->closed;
}

bool last_load_drains(const router *r, int n)
{
    (void)n;
    for (int i = r->count - 1; i >= 0; i--)
        if (r->msg[i]->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD)
            return r->msg[i]->load->state == STATE(DRAINING);
    return false;
}

router *attach(tm_rpc_channel *channel)
{
    static const tm_rpc_stream_ops ops = {NULL, rt_message, rt_close};
    tm_err err = TM_ERR_INIT;
    router *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->cond, NULL);
    assert_int_equal(
        tm_rpc_stream_open(&r->stream, channel, WORKER("Attach"), NULL, 0, &ops, r, &err), TM_OK);
    assert_true(wait_router(r, has_messages, 2));
    return r;
}

void detach(router *r)
{
    tm_rpc_stream_cancel(r->stream);
    assert_true(wait_router(r, is_closed, 0));
    tm_rpc_stream_release(r->stream);
    for (int i = 0; i < r->count; i++)
        turbomesh__worker__v1__worker_message__free_unpacked(r->msg[i], NULL);
    free(r);
}

void send_message(router *r, const PB(RouterMessage) * m)
{
    size_t n = turbomesh__worker__v1__router_message__get_packed_size(m);
    uint8_t *bytes = malloc(n ? n : 1);
    assert_non_null(bytes);
    turbomesh__worker__v1__router_message__pack(m, bytes);
    assert_int_equal(tm_rpc_stream_send(r->stream, bytes, n), TM_OK);
    free(bytes);
}

void send_submit(router *r, PB(Submit) * s)
{
    PB(RouterMessage) m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT;
    m.submit = s;
    send_message(r, &m);
}

PB(Submit) plain(uint64_t id, int max_tokens)
{
    PB(Submit) s = TURBOMESH__WORKER__V1__SUBMIT__INIT;
    s.id = id;
    s.prompt = PROMPT;
    s.n_prompt = TM_ARRAY_LEN(PROMPT);
    s.has_max_tokens = 1;
    s.max_tokens = max_tokens;
    return s;
}

void send_plain(router *r, uint64_t id, int max_tokens)
{
    PB(Submit) s = plain(id, max_tokens);
    send_submit(r, &s);
}

void send_cancel(router *r, uint64_t id)
{
    PB(RouterMessage) m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    PB(Cancel) c = TURBOMESH__WORKER__V1__CANCEL__INIT;
    c.id = id;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_CANCEL;
    m.cancel = &c;
    send_message(r, &m);
}

static void add_told(told *t, const PB(RequestEvent) * e)
{
    t->messages++;
    t->admitted += e->has_admitted;
    if (e->has_prompt_tokens)
        t->prompt_tokens = e->prompt_tokens;
    if (e->n_token) {
        if (t->first_pos < 0)
            t->first_pos = t->next_pos = (int)e->first_pos;
        t->broken = t->broken || (int)e->first_pos != t->next_pos;
        for (size_t i = 0; i < e->n_token; i++)
            t->token[t->tokens++] = e->token[i];
        t->next_pos += (int)e->n_token;
    }
    if (e->has_finish) {
        t->finishes++;
        t->finish = e->finish;
    }
    if (e->has_reject) {
        t->rejects++;
        t->reject = e->reject;
        snprintf(t->detail, sizeof(t->detail), "%s", e->detail ? e->detail : "");
    }
}

told tell(router *r, uint64_t id)
{
    told t;
    memset(&t, 0, sizeof(t));
    t.first_pos = t.next_pos = -1;
    pthread_mutex_lock(&r->lock);
    for (int i = 0; i < r->count; i++) {
        if (r->msg[i]->m_case != TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP)
            continue;
        for (size_t k = 0; k < r->msg[i]->step->n_event; k++)
            if (r->msg[i]->step->event[k]->id == id)
                add_told(&t, r->msg[i]->step->event[k]);
    }
    pthread_mutex_unlock(&r->lock);
    return t;
}
