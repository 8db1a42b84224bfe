/* Calls between the gRPC thread and the loop thread: see call.h. */
#include "router/grpc/call.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"

#define TURBOMESH  "/turbomesh.v1.TurboMesh/"
#define HEALTH     "/grpc.health.v1.Health/"
#define REFLECTION "ServerReflection/ServerReflectionInfo"
#define NS_PER_MS  1000000

static const tm_pmethod METHODS[TM_PUBLIC_METHODS] = {
    {.path = TURBOMESH "Generate",
     .label = "grpc_generate",
     .request = &turbomesh__v1__generate_request__descriptor,
     .generates = true,
     .handle = tm_public_generate},
    {.path = TURBOMESH "Chat",
     .label = "grpc_chat",
     .request = &turbomesh__v1__chat_request__descriptor,
     .generates = true,
     .handle = tm_public_chat},
    {.path = TURBOMESH "ListModels",
     .request = &turbomesh__v1__list_models_request__descriptor,
     .handle = tm_public_list_models},
    {.path = HEALTH "Check",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .open = true,
     .handle = tm_public_health_check},
    {.path = HEALTH "Watch",
     .request = &grpc__health__v1__health_check_request__descriptor,
     .open = true,
     .handle = tm_public_health_watch},
    {.path = "/grpc.reflection.v1." REFLECTION,
     .request = &grpc__reflection__v1__server_reflection_request__descriptor,
     .many = true,
     .handle = tm_public_reflect},
    {.path = "/grpc.reflection.v1alpha." REFLECTION,
     .request = &grpc__reflection__v1__server_reflection_request__descriptor,
     .many = true,
     .handle = tm_public_reflect},
};

typedef enum note_kind { NOTE_MESSAGE, NOTE_LAST, NOTE_CLOSED } note_kind;

typedef struct call_note {
    tm_note note;
    note_kind kind; /* LAST: the client sends no more */
    tm_pcall *call; /* holds a reference */
    ProtobufCMessage *message;
} call_note;

/* ---- references ---- */

void tm_pcall_acquire(tm_pcall *c)
{
    atomic_fetch_add(&c->refs, 1);
}

void tm_pcall_release(tm_pcall *c)
{
    if (atomic_fetch_sub(&c->refs, 1) != 1)
        return;
    pthread_mutex_destroy(&c->lock);
    free(c->authorization);
    free(c);
}

/* ---- loop thread: in ---- */

static void list_call(tm_pcall *c)
{
    tm_public *p = c->owner;
    tm_pcall_acquire(c);
    c->listed = true;
    c->next = p->calls;
    if (p->calls != NULL)
        p->calls->prev = c;
    p->calls = c;
    p->active += c->method->generates;
}

static void unlist_call(tm_pcall *c)
{
    tm_public *p = c->owner;
    if (!c->listed)
        return;
    c->listed = false;
    if (c->prev != NULL)
        c->prev->next = c->next;
    else
        p->calls = c->next;
    if (c->next != NULL)
        c->next->prev = c->prev;
    p->active -= c->method->generates;
    if (c->entered && c->method->generates && p->opts.access.leave != NULL)
        p->opts.access.leave(p->opts.access.user, c->ticket);
    tm_pcall_release(c);
}

/* A call that is turned away before it has a stream. */
static bool refuse(tm_pcall *c, tm_status st, const char *why, int64_t retry_after_ms)
{
    tm_observed o = {.start_ns = c->start_ns, .error = tm_status_name(st)};
    const tm_observe_end end = {.route = c->method->label, .status = tm_status_http(st)};
    if (retry_after_ms > 0)
        tm_pcall_finish(c, st, "%s; retry after %lld ms", why, (long long)retry_after_ms);
    else
        tm_pcall_finish(c, st, "%s", why);
    if (c->method->label != NULL)
        tm_observe_done(c->owner->opts.metrics, &o, &end);
    return false;
}

static bool enter(tm_pcall *c)
{
    const tm_public_access *a = &c->owner->opts.access;
    tm_public_entry entry = {0};
    if (c->entered || c->method->open)
        return true;
    tm_status st = TM_OK;
    if (a->enter != NULL)
        st = a->enter(a->user, c->authorization, c->method->generates, &entry);
    if (st != TM_OK)
        return refuse(c, st, entry.text != NULL ? entry.text : "refused", entry.retry_after_ms);
    c->entered = true;
    c->ticket = entry.ticket;
    c->key = entry.key;
    return true;
}

static bool admit(tm_pcall *c)
{
    tm_public *p = c->owner;
    if (p->closing || (!p->serving && c->method->generates))
        return refuse(c, TM_STATUS_UNAVAILABLE, "this server is shutting down, try again", 0);
    return enter(c);
}

static void act_note(void *owner, tm_note *n)
{
    (void)owner;
    call_note *cn = (call_note *)(void *)n;
    tm_pcall *c = cn->call;
    if (cn->kind == NOTE_CLOSED) {
        c->closed = true;
        tm_pstream_drop(c, TM_STATUS_CANCELLED);
        unlist_call(c);
    }
    if (cn->kind == NOTE_LAST)
        tm_pcall_finish(c, TM_OK, "%s", "");
    if (cn->kind != NOTE_MESSAGE || c->closed || c->finished)
        return;
    if (!c->listed)
        list_call(c);
    if (admit(c))
        c->method->handle(c, &cn->message);
}

static void drop_note(tm_note *n)
{
    call_note *cn = (call_note *)(void *)n;
    if (cn->message != NULL)
        protobuf_c_message_free_unpacked(cn->message, NULL);
    tm_pcall_release(cn->call);
    free(cn);
}

/* ---- loop thread: out ---- */

tm_status tm_pcall_send(tm_pcall *c, const ProtobufCMessage *m)
{
    tm_buf *b = &c->owner->pack;
    size_t size = protobuf_c_message_get_packed_size(m);
    tm_buf_clear(b);
    if (!tm_buf_reserve(b, TM_MAX(size, (size_t)1)))
        return TM_STATUS_NO_MEMORY;
    protobuf_c_message_pack(m, (uint8_t *)b->data);
    if (c->finished)
        return TM_STATUS_CLOSED;
    pthread_mutex_lock(&c->lock);
    tm_status st = c->rpc != NULL ? tm_rpc_call_send(c->rpc, b->data, size) : TM_STATUS_CLOSED;
    pthread_mutex_unlock(&c->lock);
    c->sent_bytes += st == TM_OK ? size : 0;
    return st;
}

static void watch(tm_pcall *c, int64_t now_ns)
{
    pthread_mutex_lock(&c->lock);
    size_t queued = c->rpc != NULL ? tm_rpc_call_queued(c->rpc) : 0;
    pthread_mutex_unlock(&c->lock);
    uint64_t taken = c->sent_bytes - queued;
    if (queued == 0 || taken != c->taken_bytes || c->stalled_ns == 0) {
        c->taken_bytes = taken;
        c->stalled_ns = now_ns;
        return;
    }
    if (now_ns - c->stalled_ns < c->owner->opts.write_timeout_ms * NS_PER_MS)
        return;
    tm_pstream_drop(c, TM_STATUS_TIMEOUT);
    c->finished = true; /* or was: what the end waits for is dropped */
    pthread_mutex_lock(&c->lock);
    if (c->rpc != NULL)
        tm_rpc_call_abort(c->rpc, TM_STATUS_TIMEOUT, "the client does not read");
    pthread_mutex_unlock(&c->lock);
}

void tm_pcalls_watch(tm_public *p, int64_t now_ns)
{
    for (tm_pcall *c = p->calls; c != NULL; c = c->next)
        watch(c, now_ns);
}

void tm_pcall_finish(tm_pcall *c, tm_status st, const char *fmt, ...)
{
    char text[512];
    va_list args;
    if (c->finished)
        return;
    c->finished = true;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    pthread_mutex_lock(&c->lock);
    if (c->rpc != NULL)
        tm_rpc_call_finish(c->rpc, st, text);
    pthread_mutex_unlock(&c->lock);
}

void tm_pcall_abort(tm_pcall *c, tm_status st, const char *message)
{
    if (c->finished)
        return;
    c->finished = true;
    pthread_mutex_lock(&c->lock);
    if (c->rpc != NULL)
        tm_rpc_call_abort(c->rpc, st, message);
    pthread_mutex_unlock(&c->lock);
}

/* ---- gRPC thread ---- */

static bool post(tm_pcall *c, note_kind kind, ProtobufCMessage *m, size_t bytes)
{
    call_note *n = calloc(1, sizeof(*n));
    TM_ASSERT(n != NULL ||
              m != NULL); /* an end that is not told would leave the generation running */
    if (n == NULL)
        return false;
    n->kind = kind;
    n->note = (tm_note){.bytes = bytes + sizeof(*n), .act = act_note, .drop = drop_note};
    n->call = c;
    n->message = m;
    tm_pcall_acquire(c);
    if (tm_mailbox_post(c->owner->mailbox, &n->note, m == NULL) == TM_OK)
        return true;
    n->message = NULL; /* stays the caller's */
    drop_note(&n->note);
    return false;
}

static void *open_call(const tm_pmethod *method, void *service, tm_rpc_call *rpc)
{
    tm_public *p = service;
    if (atomic_fetch_add(&p->open_calls, 1) >= p->opts.calls_max) {
        atomic_fetch_sub(&p->open_calls, 1);
        tm_observe_shed(p->opts.metrics, "grpc_calls");
        tm_rpc_call_abort(rpc, TM_STATUS_BUSY, "too many calls at once, try again later");
        return NULL;
    }
    tm_pcall *c = calloc(1, sizeof(*c));
    if (c == NULL) {
        atomic_fetch_sub(&p->open_calls, 1);
        tm_rpc_call_abort(rpc, TM_STATUS_NO_MEMORY, "out of memory");
        return NULL;
    }
    const char *authorization = tm_rpc_call_metadata(rpc, "authorization");
    c->owner = p;
    c->method = method;
    atomic_init(&c->refs, 1);
    pthread_mutex_init(&c->lock, NULL);
    c->rpc = rpc;
    c->authorization = authorization != NULL ? strdup(authorization) : NULL;
    c->deadline_ms = tm_rpc_call_deadline_ms(rpc);
    c->start_ns = tm_clock_ns();
    c->watched = -1;
    return c;
}

static void on_message(void *user, tm_rpc_call *rpc, const void *data, size_t len)
{
    tm_pcall *c = user;
    if (c == NULL)
        return;
    if (c->got_message && !c->method->many) {
        tm_rpc_call_finish(rpc, TM_STATUS_INVALID, "one request message was expected");
        return;
    }
    c->got_message = true;
    if (len > c->owner->opts.message_max) {
        tm_rpc_call_finish(rpc, TM_STATUS_TOO_LARGE, "the request is too large");
        return;
    }
    ProtobufCMessage *m = protobuf_c_message_unpack(c->method->request, NULL, len, data);
    if (m == NULL) {
        tm_rpc_call_finish(rpc, TM_STATUS_INVALID, "the message does not parse");
    } else if (!post(c, NOTE_MESSAGE, m, len)) {
        protobuf_c_message_free_unpacked(m, NULL);
        tm_rpc_call_abort(rpc, TM_STATUS_BUSY, "too much is waiting");
    }
}

static void on_half_close(void *user, tm_rpc_call *rpc)
{
    tm_pcall *c = user;
    if (c == NULL)
        return;
    if (!c->got_message)
        tm_rpc_call_finish(rpc, c->method->many ? TM_OK : TM_STATUS_INVALID,
                           "the call had no request message");
    else if (c->method->many)
        post(c, NOTE_LAST, NULL, 0);
}

static void on_close(void *user, tm_rpc_call *rpc, bool cancelled)
{
    tm_pcall *c = user;
    (void)rpc;
    (void)cancelled;
    if (c == NULL)
        return;
    pthread_mutex_lock(&c->lock);
    c->rpc = NULL;
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_sub(&c->owner->open_calls, 1);
    post(c, NOTE_CLOSED, NULL, 0);
    tm_pcall_release(c);
}

/* One on_open per method, because the rpc server does not tell which method was called. */
#define OPENER(i)                                                                                  \
    static void *open_##i(void *service, tm_rpc_call *rpc)                                         \
    {                                                                                              \
        return open_call(&METHODS[i], service, rpc);                                               \
    }
OPENER(0)
OPENER(1)
OPENER(2)
OPENER(3)
OPENER(4)
OPENER(5)
OPENER(6)

void tm_pcall_rpc_methods(tm_rpc_method rows[TM_PUBLIC_METHODS])
{
    static void *(*const OPEN[TM_PUBLIC_METHODS])(void *, tm_rpc_call *) = {
        open_0, open_1, open_2, open_3, open_4, open_5, open_6};
    for (int i = 0; i < TM_PUBLIC_METHODS; i++)
        rows[i] = (tm_rpc_method){METHODS[i].path, OPEN[i], on_message, on_half_close, on_close};
}
