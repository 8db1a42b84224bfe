/* The face's life: server, mailbox, timer; and ListModels. */
#include "router/grpc/public.h"

#include <event2/event.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "router/grpc/call.h"

#define NOTES_MAX           ((size_t)16384)
#define NOTE_BYTES_MAX      ((size_t)256 << 20)
#define STREAM_BYTES_MAX    ((size_t)4 << 20) /* not yet read by a client; beyond it the call is cut */
#define CALLS_MAX_DEFAULT   4096
#define MESSAGE_MAX_DEFAULT ((size_t)8 << 20)
#define TEXT_QUEUE_DEFAULT  256
#define HEALTH_TICK_MS      100
#define WATCH_TICKS         5
#define WRITE_TIMEOUT_MS    60000
#define MODELS_MAX          256

static void on_mail(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    tm_public *p = arg;
    tm_mailbox_drain(p->mailbox, p);
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    tm_public *p = arg;
    tm_public_health_tick(p);
    if (++p->ticks % WATCH_TICKS == 0)
        tm_pcalls_watch(p, tm_clock_ns());
}

static tm_status start_loop(tm_public *p, tm_err *err)
{
    static const struct timeval EVERY = {0, HEALTH_TICK_MS * 1000};
    p->mail = event_new(p->opts.base, tm_mailbox_fd(p->mailbox), EV_READ | EV_PERSIST, on_mail, p);
    p->timer = event_new(p->opts.base, -1, EV_PERSIST, on_timer, p);
    if (p->mail == NULL || p->timer == NULL || event_add(p->mail, NULL) != 0 ||
        event_add(p->timer, &EVERY) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "the loop takes no more events");
    return TM_OK;
}

static tm_status start_server(tm_public *p, const char *address, tm_err *err)
{
    tm_rpc_method rows[TM_PUBLIC_METHODS];
    tm_pcall_rpc_methods(rows);
    tm_rpc_server_opts o = {.address = address,
                            .methods = rows,
                            .method_count = TM_PUBLIC_METHODS,
                            .service = p,
                            .queue_max = STREAM_BYTES_MAX};
    return tm_rpc_server_create(&p->server, &o, err);
}

static void set_defaults(tm_public_opts *o)
{
    o->calls_max = o->calls_max > 0 ? o->calls_max : CALLS_MAX_DEFAULT;
    o->message_max = o->message_max > 0 ? o->message_max : MESSAGE_MAX_DEFAULT;
    o->write_timeout_ms = o->write_timeout_ms > 0 ? o->write_timeout_ms : WRITE_TIMEOUT_MS;
    o->text_threads = o->text_threads > 0 ? o->text_threads : 1;
    o->text_queue = o->text_queue > 0 ? o->text_queue : TEXT_QUEUE_DEFAULT;
}

static void each_buf(tm_public *p, void (*fn)(tm_buf *b))
{
    tm_buf *const bufs[] = {&p->pack, &p->text,   &p->ids_out, &p->lps,
                            &p->tops, &p->top_at, &p->top_rows};
    for (size_t i = 0; i < TM_ARRAY_LEN(bufs); i++)
        fn(bufs[i]);
}

static void init_buf(tm_buf *b)
{
    tm_buf_init(b, 0);
}

tm_status tm_public_create(tm_public **out, const tm_public_opts *opts, tm_err *err)
{
    tm_public *p = calloc(1, sizeof(*p));
    if (p == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the gRPC face");
    p->opts = *opts;
    uint8_t salt[8];
    p->opts.address = NULL; /* the caller's */
    set_defaults(&p->opts);
    p->serving = true;
    tm_random_bytes(salt, sizeof(salt));
    tm_hex(salt, sizeof(salt), p->salt);
    each_buf(p, init_buf);
    tm_status st;
    TM_TRY_GOTO(tm_mailbox_create(&p->mailbox, NOTES_MAX, NOTE_BYTES_MAX, err), err_destroy);
    TM_TRY_GOTO(
        tm_prep_pool_create(&p->pool, p->opts.base, p->opts.text_threads, p->opts.text_queue, err),
        err_destroy);
    TM_TRY_GOTO(start_loop(p, err), err_destroy);
    TM_TRY_GOTO(start_server(p, opts->address, err), err_destroy);
    *out = p;
    return TM_OK;

err_destroy:
    tm_public_destroy(p, 0);
    return st;
}

int tm_public_port(const tm_public *p)
{
    return tm_rpc_server_port(p->server);
}

void tm_public_set_serving(tm_public *p, bool serving)
{
    p->serving = serving;
    tm_public_health_tick(p);
}

int tm_public_active(const tm_public *p)
{
    return p->active;
}

void tm_public_destroy(tm_public *p, int64_t grace_ms)
{
    if (p == NULL)
        return;
    p->closing = true;
    for (tm_pcall *c = p->calls; c != NULL; c = c->next) {
        tm_pcall_finish(c, TM_STATUS_UNAVAILABLE, "the router stops");
        tm_pstream_drop(c, TM_STATUS_UNAVAILABLE);
    }
    if (p->server != NULL)
        tm_rpc_server_destroy(p->server, grace_ms);
    tm_prep_pool_destroy(p->pool);
    if (p->mailbox != NULL)
        tm_mailbox_drain(p->mailbox, p); /* the ends of all calls */
    TM_ASSERT(p->calls == NULL && p->active == 0);
    if (p->mail != NULL)
        event_free(p->mail);
    if (p->timer != NULL)
        event_free(p->timer);
    tm_mailbox_destroy(p->mailbox);
    each_buf(p, tm_buf_deinit);
    free(p);
}

void tm_public_list_models(tm_pcall *c, ProtobufCMessage **m)
{
    (void)m;
    const tm_dispatch *d = c->owner->opts.dispatch;
    PUB(ListModelsReply) reply = TURBOMESH__V1__LIST_MODELS_REPLY__INIT;
    PUB(Model) rows[MODELS_MAX], *list[MODELS_MAX];
    int n = TM_MIN(tm_dispatch_served_count(d), MODELS_MAX);
    for (int i = 0; i < n; i++) {
        tm_served *s = tm_dispatch_served_at(d, i);
        turbomesh__v1__model__init(&rows[i]);
        rows[i].id = s->name;
        rows[i].has_max_context = rows[i].has_groups = 1;
        rows[i].max_context = s->max_context;
        rows[i].groups = tm_dispatch_groups_ready(d, s->name);
        list[i] = &rows[i];
    }
    reply.n_model = (size_t)n;
    reply.model = list;
    tm_pcall_send(c, &reply.base);
    tm_pcall_finish(c, TM_OK, "%s", "");
}
