/* The service's life, its unary methods, load reports and the pump thread (service.h, internal.h). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/internal.h"

#define LOAD_EVERY_MS      90 /* idle; routers count on 100 */
#define LOAD_DIRTY_MS      50 /* when something changed */
#define STREAM_QUEUE_BYTES ((size_t)16 << 20)

/* ---- packing and sending ---- */

tm_status worker_pack(tm_worker_service *s, const ProtobufCMessage *m)
{
    size_t size = protobuf_c_message_get_packed_size(m);
    tm_buf_clear(&s->pack);
    if (!tm_buf_reserve(&s->pack, size))
        return TM_STATUS_NO_MEMORY;
    s->pack.len = protobuf_c_message_pack(m, (uint8_t *)s->pack.data);
    return TM_OK;
}

void worker_session_send(worker_session *n, PB(WorkerMessage) * m)
{
    tm_worker_service *s = n->service;
    if (n->dead)
        return;
    m->epoch = n->epoch;
    tm_status st = worker_pack(s, &m->base);
    if (st == TM_OK)
        st = tm_rpc_call_send(n->call, s->pack.data, s->pack.len);
    if (st == TM_STATUS_BUSY)
        worker_session_abort(n, st, "the router does not read its stream");
    else if (st != TM_OK && st != TM_STATUS_CLOSED) /* CLOSED: on_close is on its way */
        worker_session_abort(n, st, tm_status_name(st));
}

void worker_fill_hello(tm_worker_service *s, uint64_t epoch, PB(Hello) * h)
{
    static char version[] = TM_VERSION;
    const tm_engine_info *info = s->info;
    h->epoch = epoch;
    h->group = s->group;
    h->model = s->model;
    h->digest = s->digest;
    h->version = version;
#define PUT(field, value)                                                                          \
    do {                                                                                           \
        h->has_##field = 1;                                                                        \
        h->field = (uint32_t)(value);                                                              \
    } while (0)
    PUT(tp, info->model.tp);
    PUT(block_tokens, info->block_tokens);
    PUT(blocks_total, info->blocks_total);
    PUT(max_batch_size, info->max_batch_size);
    PUT(max_context, info->model.max_positions);
    PUT(vocab, info->model.vocab);
    PUT(queue_max, info->queue_max);
#undef PUT
    h->has_weight_bytes = h->has_kv_bytes = 1;
    h->weight_bytes = info->model.weight_bytes;
    h->kv_bytes = info->kv_bytes;
    h->n_stop_id = (size_t)info->model.stop_count;
    h->stop_id = s->stop_ids;
}

void worker_fill_load(const tm_worker_service *s, const tm_engine_stats *stats,
                      PB(LoadReport) * load)
{
    load->has_state = 1;
    load->state = s->draining ? TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__DRAINING
                              : TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__READY;
#define PUT(field, value)                                                                          \
    do {                                                                                           \
        load->has_##field = 1;                                                                     \
        load->field = (value);                                                                     \
    } while (0)
    PUT(running, (uint32_t)stats->running);
    PUT(waiting, (uint32_t)stats->waiting);
    PUT(waiting_tokens, (uint64_t)stats->waiting_tokens);
    PUT(blocks_total, (uint32_t)stats->blocks_total);
    PUT(blocks_used, (uint32_t)stats->blocks_used);
    PUT(blocks_cached, (uint32_t)stats->blocks_cached);
    PUT(prefill_tps, stats->prefill_tps);
    PUT(decode_tps, stats->decode_tps);
    PUT(step_ms, stats->step_ms);
    PUT(step_age_ms, (uint32_t)stats->step_age_ms);
#undef PUT
}

void worker_send_load(worker_session *n, const tm_engine_stats *stats)
{
    PB(LoadReport) load = TURBOMESH__WORKER__V1__LOAD_REPORT__INIT;
    PB(WorkerMessage) m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    worker_fill_load(n->service, stats, &load);
    load.has_last_submit_seq = load.has_seq = 1;
    load.last_submit_seq = n->submit_seq;
    load.seq = ++n->load_seq;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD;
    m.load = &load;
    worker_session_send(n, &m);
}

void worker_send_loads(tm_worker_service *s)
{
    tm_engine_stats stats;
    tm_engine_stats_get(s->engine, &stats);
    for (worker_session *n = s->sessions; n; n = n->next)
        worker_send_load(n, &stats);
    s->last_load_ms = tm_clock_ms();
    s->load_dirty = false;
}

/* ---- unary methods ---- */

static void *unary_open(void *service, tm_rpc_call *call)
{
    (void)call;
    return service;
}

static void unary_half_close(void *user, tm_rpc_call *call)
{
    (void)user;
    /* No effect after an answer: the first end wins. */
    tm_rpc_call_finish(call, TM_STATUS_INVALID, "the call had no request message");
}

static void assets_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    tm_worker_service *s = user;
    PB(AssetsRequest) *q = turbomesh__worker__v1__assets_request__unpack(NULL, len, data);
    if (!q) {
        tm_rpc_call_finish(call, TM_STATUS_INVALID, "the message does not parse");
        return;
    }
    if (q->digest && *q->digest && strcmp(q->digest, s->digest) != 0) {
        tm_rpc_call_finish(call, TM_STATUS_STALE, "this group has another model digest");
    } else {
        tm_status st = tm_rpc_call_send(call, s->assets, s->assets_len);
        tm_rpc_call_finish(call, st, st == TM_OK ? NULL : tm_status_name(st));
    }
    turbomesh__worker__v1__assets_request__free_unpacked(q, NULL);
}

static void status_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    tm_worker_service *s = user;
    PB(StatusReply) reply = TURBOMESH__WORKER__V1__STATUS_REPLY__INIT;
    PB(Hello) hello = TURBOMESH__WORKER__V1__HELLO__INIT;
    PB(LoadReport) load = TURBOMESH__WORKER__V1__LOAD_REPORT__INIT;
    tm_engine_stats stats;
    (void)data; /* an empty message */
    (void)len;
    reply.hello = &hello;
    reply.load = &load;
    pthread_mutex_lock(&s->lock);
    tm_engine_stats_get(s->engine, &stats);
    worker_fill_hello(s, s->epoch, &hello);
    worker_fill_load(s, &stats, &load);
    tm_status st = worker_pack(s, &reply.base);
    if (st == TM_OK)
        st = tm_rpc_call_send(call, s->pack.data, s->pack.len);
    pthread_mutex_unlock(&s->lock);
    tm_rpc_call_finish(call, st, st == TM_OK ? NULL : tm_status_name(st));
}

static const tm_rpc_method METHODS[] = {
    {"/turbomesh.worker.v1.Worker/Attach", worker_attach_open, worker_attach_message,
     worker_attach_half_close, worker_attach_close},
    {"/turbomesh.worker.v1.Worker/GetModelAssets", unary_open, assets_message, unary_half_close,
     NULL},
    {"/turbomesh.worker.v1.Worker/GetStatus", unary_open, status_message, unary_half_close, NULL},
    {"/grpc.health.v1.Health/Check", unary_open, worker_check_message, unary_half_close, NULL},
    {"/grpc.health.v1.Health/Watch", worker_watch_open, worker_watch_message, NULL,
     worker_watch_close},
};

/* ---- the pump ---- */

/* Sends reports when they are due; returns the time until the next one. */
static int64_t report_load(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    int64_t due = s->last_load_ms + (s->load_dirty ? LOAD_DIRTY_MS : LOAD_EVERY_MS);
    if (tm_clock_ms() >= due) {
        worker_send_loads(s);
        due = s->last_load_ms + LOAD_EVERY_MS;
    }
    pthread_mutex_unlock(&s->lock);
    return TM_MAX(due - tm_clock_ms(), 1);
}

static bool stopping(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    bool stop = s->stopping;
    pthread_mutex_unlock(&s->lock);
    return stop;
}

static void *pump_run(void *arg)
{
    tm_worker_service *s = arg;
    while (!stopping(s)) {
        tm_step_events *ev = NULL;
        tm_status st = tm_engine_wait(s->engine, report_load(s), &ev);
        if (st == TM_OK) {
            worker_deliver(s, ev);
            tm_engine_events_free(ev);
        } else if (st != TM_STATUS_TIMEOUT) {
            if (st != TM_STATUS_CLOSED)
                s->on_lost(s->user);
            break;
        }
    }
    return NULL;
}

/* ---- life ---- */

static tm_status service_start(tm_worker_service *s, const tm_worker_service_opts *opts,
                               tm_err *err)
{
    tm_rpc_server_opts ro = {
        .address = opts->address,
        .methods = METHODS,
        .method_count = (int)TM_ARRAY_LEN(METHODS),
        .service = s,
        .queue_max = opts->stream_queue_max ? opts->stream_queue_max : STREAM_QUEUE_BYTES,
    };
    /* A GetModelAssets reply always fits: it is the first message of its call. */
    TM_TRY(worker_assets_load(opts->model_dir, s->digest, &s->assets, &s->assets_len, err));
    TM_TRY(tm_rpc_server_create(&s->server, &ro, err));
    if (pthread_create(&s->pump, NULL, pump_run, s) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start a thread");
    s->pump_started = true;
    return TM_OK;
}

tm_status tm_worker_service_create(tm_worker_service **out, const tm_worker_service_opts *opts,
                                   tm_err *err)
{
    tm_worker_service *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    pthread_mutex_init(&s->lock, NULL);
    tm_buf_init(&s->pack, 0);
    s->engine = opts->engine;
    s->info = tm_engine_info_get(opts->engine);
    s->epoch = opts->epoch;
    s->next_engine_id = 1;
    s->on_lost = opts->on_lost;
    s->on_drain = opts->on_drain;
    s->user = opts->user;
    snprintf(s->group, sizeof(s->group), "%s", opts->group);
    snprintf(s->model, sizeof(s->model), "%s",
             opts->model_name ? opts->model_name : s->info->model.name);
    snprintf(s->digest, sizeof(s->digest), "%s", s->info->model.digest);
    memcpy(s->stop_ids, s->info->model.stop_ids, sizeof(s->stop_ids));
    s->scratch = worker_scratch_create();
    tm_status st = TM_OK;
    if (!s->scratch ||
        !worker_table_init(&s->table, (size_t)(s->info->queue_max + s->info->max_batch_size)))
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (st == TM_OK)
        st = service_start(s, opts, err);
    if (st != TM_OK) {
        tm_worker_service_destroy(s, 0);
        return st;
    }
    *out = s;
    return TM_OK;
}

int tm_worker_service_port(const tm_worker_service *s)
{
    return tm_rpc_server_port(s->server);
}

void tm_worker_service_set_epoch(tm_worker_service *s, uint64_t epoch)
{
    pthread_mutex_lock(&s->lock);
    s->epoch = epoch;
    pthread_mutex_unlock(&s->lock);
}

void tm_worker_service_drain(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    if (!s->draining) {
        s->draining = true;
        worker_send_loads(s);
        worker_watch_notify(s);
    }
    pthread_mutex_unlock(&s->lock);
}

int tm_worker_service_live(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    int n = s->table.count;
    pthread_mutex_unlock(&s->lock);
    return n;
}

void tm_worker_service_hand_back(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    for (worker_session *n = s->sessions; n; n = n->next)
        for (worker_live *l = n->lives; l; l = l->next) {
            l->handback = true;
            tm_engine_cancel(s->engine, l->engine_id);
        }
    pthread_mutex_unlock(&s->lock);
}

int tm_worker_service_handed_back(tm_worker_service *s)
{
    pthread_mutex_lock(&s->lock);
    int n = s->handed_back;
    pthread_mutex_unlock(&s->lock);
    return n;
}

void tm_worker_service_destroy(tm_worker_service *s, int64_t grace_ms)
{
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->stopping = true;
    for (worker_session *n = s->sessions; n; n = n->next)
        if (!n->dead)
            tm_rpc_call_finish(n->call, TM_STATUS_UNAVAILABLE, "the group has drained");
    for (worker_watcher *w = s->watchers; w; w = w->next)
        tm_rpc_call_finish(w->call, TM_STATUS_UNAVAILABLE, "the group has drained");
    pthread_mutex_unlock(&s->lock);
    if (s->pump_started) {
        tm_engine_wake(s->engine);
        pthread_join(s->pump, NULL);
    }
    tm_rpc_server_destroy(s->server, grace_ms);
    worker_table_deinit(&s->table);
    worker_scratch_destroy(s->scratch);
    tm_buf_deinit(&s->pack);
    pthread_mutex_destroy(&s->lock);
    free(s->assets);
    free(s);
}
