/* The Attach stream: what routers send. Every Submit is answered by events: admission and tokens from the
 * engine's steps, or one reject event from here. Nothing a router sends can end more than its stream. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "worker/internal.h"

static void send_reject(worker_session *n, uint64_t id, PB(RejectReason) reason, const char *detail)
{
    PB(RequestEvent) ev = TURBOMESH__WORKER__V1__REQUEST_EVENT__INIT;
    PB(StepEvents) step = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    PB(RequestEvent) *one = &ev;
    char text[480];
    snprintf(text, sizeof(text), "%s", detail);
    ev.id = id;
    ev.has_reject = 1;
    ev.reject = reason;
    ev.detail = text;
    step.n_event = 1;
    step.event = &one;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    m.step = &step;
    worker_session_send(n, &m);
}

void *worker_attach_open(void *service, tm_rpc_call *call)
{
    tm_worker_service *s = service;
    worker_session *n = calloc(1, sizeof(*n));
    if (!n) {
        tm_rpc_call_finish(call, TM_STATUS_BUSY, "out of memory");
        return NULL;
    }
    n->service = s;
    n->call = call;
    n->slot_head = n->slot_tail = -1;
    snprintf(n->router, sizeof(n->router), "unnamed");
    PB(Hello) hello = TURBOMESH__WORKER__V1__HELLO__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    tm_engine_stats stats;
    pthread_mutex_lock(&s->lock);
    n->epoch = s->epoch;
    n->next = s->sessions;
    if (n->next)
        n->next->prev = n;
    s->sessions = n;
    worker_fill_hello(s, n->epoch, &hello);
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO;
    m.hello = &hello;
    worker_session_send(n, &m);
    tm_engine_stats_get(s->engine, &stats);
    worker_send_load(n, &stats);
    pthread_mutex_unlock(&s->lock);
    return n;
}

static void session_cancel_all(worker_session *n)
{
    while (n->lives) {
        worker_live *l = n->lives;
        uint64_t engine_id = l->engine_id;
        worker_table_orphan(&n->service->table, l);
        tm_engine_cancel(n->service->engine, engine_id);
    }
}

void worker_session_abort(worker_session *n, tm_status st, const char *why)
{
    if (n->dead)
        return;
    n->dead = true;
    tm_log(TM_LOG_WARN, "router_cut", "%s: %s", n->router, why);
    session_cancel_all(n);
    tm_rpc_call_abort(n->call, st, why);
}

void worker_attach_close(void *user, tm_rpc_call *call, bool cancelled)
{
    worker_session *n = user;
    (void)call;
    if (!n)
        return;
    tm_worker_service *s = n->service;
    pthread_mutex_lock(&s->lock);
    session_cancel_all(n);
    if (n->prev)
        n->prev->next = n->next;
    else
        s->sessions = n->next;
    if (n->next)
        n->next->prev = n->prev;
    pthread_mutex_unlock(&s->lock);
    tm_log(TM_LOG_INFO, "router_left", "%s%s", n->router, cancelled ? " (stream cut)" : "");
    free(n);
}

void worker_attach_half_close(void *user, tm_rpc_call *call)
{
    worker_session *n = user;
    if (!n)
        return;
    /* A router that will send no more has no use for the stream: it would have no way to cancel. */
    pthread_mutex_lock(&n->service->lock);
    session_cancel_all(n);
    pthread_mutex_unlock(&n->service->lock);
    tm_rpc_call_finish(call, TM_OK, NULL);
}

static PB(RejectReason) reject_reason(tm_status st)
{
    static const struct {
        tm_status st;
        PB(RejectReason) reason;
    } rows[] = {
        {TM_STATUS_BUSY, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY},
        {TM_STATUS_NO_MEMORY, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_BUSY},
        {TM_STATUS_TOO_LARGE, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_TOO_LONG},
        {TM_STATUS_UNAVAILABLE, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_DRAINING},
        {TM_STATUS_CLOSED, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_DRAINING},
        {TM_STATUS_STALE, TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_STALE_EPOCH},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        if (rows[i].st == st)
            return rows[i].reason;
    return TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_INVALID;
}

#define TAKE(field)                                                                                \
    if (in->has_##field)                                                                           \
    out->field = in->field

static void take_sampling(tm_sampling *out, const PB(Sampling) * in)
{
    *out = tm_sampling_default();
    if (!in)
        return;
    TAKE(temperature);
    TAKE(top_k);
    TAKE(top_p);
    TAKE(min_p);
    TAKE(repetition_penalty);
    TAKE(presence_penalty);
    TAKE(frequency_penalty);
    TAKE(seed);
    TAKE(choice);
    TAKE(logprobs);
    TAKE(prompt_logprobs);
    TAKE(min_tokens);
    TAKE(ignore_eos);
}

/* The whole prompt with what was generated must leave room for one more token, unless none is wanted. */
static tm_status check_length(const tm_worker_service *s, const tm_request *r, tm_err *err)
{
    size_t have = r->prompt_len + r->generated_len;
    size_t room = (size_t)s->info->model.max_positions;
    size_t need = have + (r->max_tokens > 0 && (size_t)r->max_tokens > r->generated_len ? 1 : 0);
    if (need > room)
        return TM_FAIL(
            err, TM_STATUS_TOO_LARGE,
            "the prompt has %zu tokens (%zu of them generated before), the context limit "
            "is %zu",
            have, r->generated_len, room);
    return TM_OK;
}

/* Under the lock, so that the id is known before the first event can come. */
static tm_status submit_locked(worker_session *n, const PB(Submit) * in, tm_request *r, tm_err *err)
{
    tm_worker_service *s = n->service;
    n->submit_seq++;
    if (s->draining)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the group is draining");
    if (in->has_expected_epoch && in->expected_epoch != n->epoch && in->expected_epoch != s->epoch)
        return TM_FAIL(err, TM_STATUS_STALE, "epoch %llu was expected, the group has %llu",
                       (unsigned long long)in->expected_epoch, (unsigned long long)s->epoch);
    if (worker_table_id(&s->table, n, in->id))
        return TM_FAIL(err, TM_STATUS_INVALID, "id %llu is in use on this stream",
                       (unsigned long long)in->id);
    TM_TRY(check_length(s, r, err));
    worker_live *l = calloc(1, sizeof(*l));
    if (!l)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    l->engine_id = r->id = s->next_engine_id++;
    l->id = in->id;
    l->session = n;
    l->logprobs = r->sampling.logprobs >= 0;
    l->prompt_logprobs = r->sampling.prompt_logprobs >= 0;
    worker_table_add(&s->table, l);
    tm_status st = tm_engine_submit(s->engine, r, err);
    if (st != TM_OK)
        worker_table_remove(&s->table, l);
    s->load_dirty = true;
    return st;
}

static void on_submit(worker_session *n, const PB(Submit) * in)
{
    tm_worker_service *s = n->service;
    tm_err err = TM_ERR_INIT;
    tm_request r = {
        .prompt = in->prompt,
        .prompt_len = in->n_prompt,
        .generated = in->generated,
        .generated_len = in->n_generated,
        .stop_ids = in->stop_id,
        .stop_count = in->n_stop_id,
        .priority = in->has_priority ? in->priority : 0,
        .cache_salt = in->has_cache_salt ? in->cache_salt : 0,
        .max_tokens = in->has_max_tokens ? in->max_tokens : s->info->model.max_positions,
    };
    take_sampling(&r.sampling, in->sampling);
    size_t biases = in->sampling ? in->sampling->n_logit_bias : 0;
    tm_logit_bias *bias = calloc(biases ? biases : 1, sizeof(*bias));
    for (size_t i = 0; bias && i < biases; i++) {
        bias[i].token = in->sampling->logit_bias[i]->token;
        bias[i].bias = in->sampling->logit_bias[i]->bias;
    }
    r.sampling.logit_bias = bias;
    r.sampling.logit_bias_count = biases;
    pthread_mutex_lock(&s->lock);
    if (!n->dead) {
        tm_status st = bias ? submit_locked(n, in, &r, &err)
                            : TM_FAIL(&err, TM_STATUS_NO_MEMORY, "out of memory");
        if (st != TM_OK)
            send_reject(n, in->id, reject_reason(st), err.msg);
    }
    pthread_mutex_unlock(&s->lock);
    free(bias);
}

static void on_cancel(worker_session *n, uint64_t id)
{
    tm_worker_service *s = n->service;
    pthread_mutex_lock(&s->lock);
    worker_live *l = worker_table_id(&s->table, n, id);
    if (l) /* else it has finished: the events are on their way */
        tm_engine_cancel(s->engine, l->engine_id);
    pthread_mutex_unlock(&s->lock);
}

static void on_hello(worker_session *n, const PB(RouterHello) * in)
{
    if (in->router_id) {
        pthread_mutex_lock(&n->service->lock);
        snprintf(n->router, sizeof(n->router), "%s", in->router_id);
        pthread_mutex_unlock(&n->service->lock);
    }
    tm_log(TM_LOG_INFO, "router_attached", "%s, version %s", n->router,
           in->version ? in->version : "unknown");
}

void worker_attach_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    worker_session *n = user;
    if (!n)
        return;
    PB(RouterMessage) *m = turbomesh__worker__v1__router_message__unpack(NULL, len, data);
    if (!m) {
        tm_log(TM_LOG_WARN, "router_cut", "%s: a message of %zu bytes does not parse", n->router,
               len);
        tm_rpc_call_finish(call, TM_STATUS_INVALID, "the message does not parse");
        return;
    }
    switch (m->m_case) {
    case TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_HELLO:
        on_hello(n, m->hello);
        break;
    case TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT:
        on_submit(n, m->submit);
        break;
    case TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_CANCEL:
        on_cancel(n, m->cancel->id);
        break;
    case TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_DRAIN:
        if (n->service->on_drain)
            n->service->on_drain(n->service->user,
                                 m->drain->has_deadline_ms ? (int64_t)m->drain->deadline_ms : -1);
        break;
    default: /* a newer router's message: it must not expect an answer from this version */
        break;
    }
    turbomesh__worker__v1__router_message__free_unpacked(m, NULL);
}
