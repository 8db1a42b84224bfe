/* Server side: one completion queue, one thread, a table of methods looked up by path.
 *
 * Calls are requested unregistered, so that unknown paths are answered UNSUPPORTED by the same code. A
 * call lives until its close event came and nothing is outstanding; on_close runs then, on the queue's
 * thread, and the memory goes after it. All receiving state belongs to that thread; sending goes
 * through the sender's lock. */
#include "net/rpc/internal.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"

#define SERVER_SLOTS 64 /* calls requested ahead from the completion queue */
#define METHODS_MAX  32

typedef struct server_slot {
    rpc_tag tag;
    tm_rpc_server *server;
    grpc_call *call;
    grpc_call_details details;
    grpc_metadata_array metadata;
} server_slot;

struct tm_rpc_server {
    grpc_server *grpc;
    grpc_completion_queue *cq;
    pthread_t thread;
    int port;
    size_t queue_max;
    void *service;
    int method_count;
    tm_rpc_method methods[METHODS_MAX];
    char *paths[METHODS_MAX];
    server_slot slots[SERVER_SLOTS];
    rpc_tag stopped_tag;
    pthread_mutex_t lock; /* guards stopped */
    pthread_cond_t cond;
    bool stopped;
};

struct tm_rpc_call {
    const tm_rpc_method *method; /* NULL: unknown path */
    grpc_call *call;
    void *user;
    rpc_sender sender;
    rpc_tag close_tag, recv_tag;
    grpc_byte_buffer *received;
    int64_t deadline_at_ms; /* monotonic; INT64_MAX = none */
    int cancelled;          /* written by gRPC */
    bool closed, receiving;
    size_t pair_count;
    char *text; /* copies of the request metadata, key NUL value NUL ... */
};

static void request_call(server_slot *slot);

/* Runs after every completion: ends the call's life when its last batch is through. */
static void call_settle(tm_rpc_call *c)
{
    if (!c->closed || c->receiving || rpc_sender_close(&c->sender))
        return;
    if (c->method && c->method->on_close)
        c->method->on_close(c->user, c, c->cancelled != 0);
    grpc_call_unref(c->call);
    rpc_sender_deinit(&c->sender);
    free(c->text);
    free(c);
}

static void call_receive(tm_rpc_call *c)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &c->received;
    c->received = NULL;
    c->receiving = true;
    rpc_batch(c->call, &op, 1, &c->recv_tag);
}

static void give_message(void *call, const void *data, size_t len)
{
    tm_rpc_call *c = call;
    if (c->method->on_message)
        c->method->on_message(c->user, c, data, len);
}

static void call_received(void *call, bool ok)
{
    tm_rpc_call *c = call;
    c->receiving = false;
    if (ok && c->received) {
        bool given = rpc_with_bytes(c->received, give_message, c);
        grpc_byte_buffer_destroy(c->received);
        if (!given)
            rpc_sender_cancel(&c->sender, GRPC_STATUS_INTERNAL, "message could not be decoded");
        if (!c->closed)
            call_receive(c);
    } else if (!c->closed && c->method->on_half_close) {
        c->method->on_half_close(c->user, c);
    }
    call_settle(c);
}

static void call_closed(void *call, bool ok)
{
    tm_rpc_call *c = call;
    (void)ok; /* the event always succeeds; `cancelled` tells what happened */
    c->closed = true;
    call_settle(c);
}

static void call_sent(void *call, bool ok)
{
    tm_rpc_call *c = call;
    rpc_sender_done(&c->sender, ok);
    call_settle(c);
}

static const tm_rpc_method *find_method(const tm_rpc_server *s, grpc_slice path)
{
    for (int i = 0; i < s->method_count; i++)
        if (grpc_slice_str_cmp(path, s->methods[i].path) == 0)
            return &s->methods[i];
    return NULL;
}

static char *put_slice(char *at, grpc_slice part)
{
    size_t n = GRPC_SLICE_LENGTH(part);
    memcpy(at, GRPC_SLICE_START_PTR(part), n);
    at[n] = '\0';
    return at + n + 1;
}

/* Copies keys and values as C strings, because the service wants them without knowing slices. Binary
 * values that hold a NUL have no place there and are left out. */
static bool copy_metadata(tm_rpc_call *c, const grpc_metadata_array *md)
{
    size_t total = 1;
    for (size_t i = 0; i < md->count; i++)
        total +=
            GRPC_SLICE_LENGTH(md->metadata[i].key) + GRPC_SLICE_LENGTH(md->metadata[i].value) + 2;
    c->text = malloc(total);
    if (!c->text)
        return false;
    char *at = c->text;
    for (size_t i = 0; i < md->count; i++) {
        grpc_slice value = md->metadata[i].value;
        if (memchr(GRPC_SLICE_START_PTR(value), 0, GRPC_SLICE_LENGTH(value)))
            continue;
        at = put_slice(put_slice(at, md->metadata[i].key), value);
        c->pair_count++;
    }
    return true;
}

static int64_t deadline_at(gpr_timespec deadline)
{
    if (gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type)) == 0)
        return INT64_MAX;
    gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
    return tm_clock_ms() + (int64_t)gpr_timespec_to_micros(left) / 1000;
}

static void call_open(tm_rpc_server *s, server_slot *slot)
{
    tm_rpc_call *c = calloc(1, sizeof(*c));
    if (!c || !copy_metadata(c, &slot->metadata)) {
        free(c);
        grpc_call_cancel_with_status(slot->call, GRPC_STATUS_RESOURCE_EXHAUSTED, "out of memory",
                                     NULL);
        grpc_call_unref(slot->call);
        return;
    }
    c->method = find_method(s, slot->details.method);
    c->call = slot->call;
    c->deadline_at_ms = deadline_at(slot->details.deadline);
    c->close_tag = (rpc_tag){call_closed, c};
    c->recv_tag = (rpc_tag){call_received, c};
    rpc_sender_init(&c->sender, c->call, s->queue_max, call_sent, c);

    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_RECV_CLOSE_ON_SERVER;
    op.data.recv_close_on_server.cancelled = &c->cancelled;
    rpc_batch(c->call, &op, 1, &c->close_tag);
    rpc_sender_begin(&c->sender, NULL, 0);
    if (!c->method) {
        tm_rpc_call_finish(c, TM_STATUS_UNSUPPORTED, "no such method");
        return;
    }
    if (c->method->on_open)
        c->user = c->method->on_open(s->service, c);
    call_receive(c);
}

static void call_requested(void *owner, bool ok)
{
    server_slot *slot = owner;
    if (ok)
        call_open(slot->server, slot);
    grpc_call_details_destroy(&slot->details);
    grpc_metadata_array_destroy(&slot->metadata);
    if (ok)
        request_call(slot);
}

static void request_call(server_slot *slot)
{
    tm_rpc_server *s = slot->server;
    grpc_call_details_init(&slot->details);
    grpc_metadata_array_init(&slot->metadata);
    grpc_call_error e = grpc_server_request_call(s->grpc, &slot->call, &slot->details,
                                                 &slot->metadata, s->cq, s->cq, &slot->tag);
    if (e != GRPC_CALL_OK) { /* the queue is shutting down: the slot rests */
        grpc_call_details_destroy(&slot->details);
        grpc_metadata_array_destroy(&slot->metadata);
    }
}

static void server_stopped(void *owner, bool ok)
{
    tm_rpc_server *s = owner;
    (void)ok;
    pthread_mutex_lock(&s->lock);
    s->stopped = true;
    pthread_cond_signal(&s->cond);
    pthread_mutex_unlock(&s->lock);
}

static grpc_server *new_grpc_server(void)
{
    static const rpc_arg rows[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)RPC_MESSAGE_MAX},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)RPC_MESSAGE_MAX},
        {GRPC_ARG_MAX_METADATA_SIZE, RPC_METADATA_MAX},
        {GRPC_ARG_MAX_CONCURRENT_STREAMS, 16384},
        {GRPC_ARG_ALLOW_REUSEPORT, 0},
        /* Clients ping every second, also without calls: never answer with too_many_pings. */
        {GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1},
        {GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 100},
        {GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0},
        {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0},
        /* Finds a client whose host vanished. */
        {GRPC_ARG_KEEPALIVE_TIME_MS, 2000},
        {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 3000},
    };
    grpc_arg args[RPC_ARGS_MAX];
    rpc_args_fill(args, rows, TM_ARRAY_LEN(rows));
    grpc_channel_args list = {TM_ARRAY_LEN(rows), args};
    return grpc_server_create(&list, NULL);
}

static void server_free(tm_rpc_server *s)
{
    for (int i = 0; i < s->method_count; i++)
        free(s->paths[i]);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->cond);
    free(s);
    rpc_library_release();
}

static tm_rpc_server *server_alloc(const tm_rpc_server_opts *opts)
{
    tm_rpc_server *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    rpc_library_acquire();
    pthread_mutex_init(&s->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&s->cond, &attr);
    pthread_condattr_destroy(&attr);
    s->service = opts->service;
    s->queue_max = opts->queue_max ? opts->queue_max : RPC_QUEUE_MAX;
    s->stopped_tag = (rpc_tag){server_stopped, s};
    for (int i = 0; i < opts->method_count; i++) {
        s->methods[i] = opts->methods[i];
        s->paths[i] = strdup(opts->methods[i].path);
        s->method_count++;
        if (!s->paths[i]) {
            server_free(s);
            return NULL;
        }
        s->methods[i].path = s->paths[i];
    }
    return s;
}

/* Waits for the shutdown event until at_ms (monotonic); negative = as long as it takes. */
static bool wait_stopped(tm_rpc_server *s, int64_t at_ms)
{
    struct timespec ts = {at_ms / 1000, (at_ms % 1000) * 1000000};
    int rc = 0;
    pthread_mutex_lock(&s->lock);
    while (!s->stopped && rc == 0)
        rc = at_ms < 0 ? pthread_cond_wait(&s->cond, &s->lock)
                       : pthread_cond_timedwait(&s->cond, &s->lock, &ts);
    bool stopped = s->stopped;
    pthread_mutex_unlock(&s->lock);
    return stopped;
}

static void queue_destroy(grpc_completion_queue *cq)
{
    grpc_completion_queue_shutdown(cq);
    rpc_queue_run(cq);
    grpc_completion_queue_destroy(cq);
}

tm_status tm_rpc_server_create(tm_rpc_server **out, const tm_rpc_server_opts *opts, tm_err *err)
{
    if (!opts->address || opts->method_count < 1 || opts->method_count > METHODS_MAX)
        return TM_FAIL(err, TM_STATUS_INVALID, "rpc server: no address, or not 1..%d methods",
                       METHODS_MAX);
    tm_rpc_server *s = server_alloc(opts);
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "rpc server: out of memory");
    s->grpc = new_grpc_server();
    s->cq = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(s->grpc, s->cq, NULL);
    grpc_server_credentials *creds = grpc_insecure_server_credentials_create();
    s->port = grpc_server_add_http2_port(s->grpc, opts->address, creds);
    grpc_server_credentials_release(creds);
    tm_status st = TM_OK;
    if (s->port <= 0)
        st = TM_FAIL(err, TM_STATUS_IO, "cannot listen on %s: address in use or not of this host",
                     opts->address);
    grpc_server_start(s->grpc);
    for (int i = 0; st == TM_OK && i < SERVER_SLOTS; i++) {
        s->slots[i].server = s;
        s->slots[i].tag = (rpc_tag){call_requested, &s->slots[i]};
        request_call(&s->slots[i]);
    }
    if (st == TM_OK && pthread_create(&s->thread, NULL, rpc_queue_run, s->cq) != 0)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "rpc server: cannot start a thread");
    if (st != TM_OK) {
        grpc_server_shutdown_and_notify(s->grpc, s->cq, &s->stopped_tag);
        grpc_server_cancel_all_calls(s->grpc);
        queue_destroy(s->cq);
        grpc_server_destroy(s->grpc);
        server_free(s);
        return st;
    }
    *out = s;
    return TM_OK;
}

int tm_rpc_server_port(const tm_rpc_server *s)
{
    return s->port;
}

void tm_rpc_server_destroy(tm_rpc_server *s, int64_t grace_ms)
{
    if (!s)
        return;
    grpc_server_shutdown_and_notify(s->grpc, s->cq, &s->stopped_tag);
    if (!wait_stopped(s, tm_clock_ms() + TM_MAX(grace_ms, 0))) {
        grpc_server_cancel_all_calls(s->grpc);
        wait_stopped(s, -1);
    }
    grpc_completion_queue_shutdown(s->cq);
    pthread_join(s->thread, NULL);
    grpc_completion_queue_destroy(s->cq);
    grpc_server_destroy(s->grpc);
    server_free(s);
}

tm_status tm_rpc_call_send(tm_rpc_call *c, const void *data, size_t len)
{
    return rpc_sender_push(&c->sender, data, len);
}

void tm_rpc_call_finish(tm_rpc_call *c, tm_status st, const char *message)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    op.data.send_status_from_server.status = (grpc_status_code)tm_status_grpc(st);
    rpc_sender_end(&c->sender, &op, message ? message : "");
}

void tm_rpc_call_abort(tm_rpc_call *c, tm_status st, const char *message)
{
    rpc_sender_cancel(&c->sender, (grpc_status_code)tm_status_grpc(st), message ? message : "");
}

const char *tm_rpc_call_metadata(tm_rpc_call *c, const char *key)
{
    const char *at = c->text;
    for (size_t i = 0; i < c->pair_count; i++) {
        const char *value = at + strlen(at) + 1;
        if (strcmp(at, key) == 0)
            return value;
        at = value + strlen(value) + 1;
    }
    return NULL;
}

int64_t tm_rpc_call_deadline_ms(const tm_rpc_call *c)
{
    if (c->deadline_at_ms == INT64_MAX)
        return INT64_MAX;
    return TM_MAX(c->deadline_at_ms - tm_clock_ms(), 0);
}

size_t tm_rpc_call_queued(const tm_rpc_call *c)
{
    return rpc_sender_queued((rpc_sender *)&c->sender);
}
