/* A link is one channel (connection, thread) and one Attach stream on it, made anew for every attempt so
 * that nothing of a broken connection is kept. Messages are unpacked on the channel's thread into an arena
 * of their own; the loop thread only reads them.
 *
 * Closing joins the channel's thread, which a helper does. From tm_pool's close on, nothing of the link
 * reaches the pool: `closed` stops new notes, and notes already in the mailbox carry a link_id that the
 * pool no longer knows. */
#include "router/pool/link.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arena.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "net/rpc/rpc.h"
#include "router/pool/assets.h"
#include "router/pool/jobs.h"

#define ATTACH_PATH       "/turbomesh.worker.v1.Worker/Attach"
#define UNPACK_BYTES_MAX  ((size_t)256 << 20) /* structs of one message */
#define CLOSERS_QUEUE_MAX 65536
#define FETCH_QUEUE_MAX   256

struct tm_links {
    tm_mailbox *mailbox;
    tm_jobs *closers, *fetchers;
    tm_served_opts opts;
};

typedef struct tm_link {
    tm_links *owner;
    uint64_t id;
    tm_rpc_channel *channel;
    tm_rpc_stream *stream;
    atomic_bool closed; /* by the router, or because it cannot be believed any more */
} tm_link;

typedef struct message_note {
    tm_note note;
    tm_arena *arena; /* holds this struct too */
    uint64_t link_id;
    int64_t received_ns;
    tm_wire_worker_message *message;
} message_note;

typedef struct closed_note {
    tm_note note;
    uint64_t link_id;
    char why[160];
} closed_note;

/* ---- notes ---- */

static void act_message(void *pool, tm_note *n)
{
    message_note *m = (message_note *)(void *)n;
    tm_pool_on_message(pool, m->link_id, m->message, m->received_ns);
}

static void drop_message(tm_note *n)
{
    tm_arena_destroy(((message_note *)(void *)n)->arena);
}

static void act_closed(void *pool, tm_note *n)
{
    closed_note *c = (closed_note *)(void *)n;
    tm_pool_on_closed(pool, c->link_id, c->why);
}

static void drop_closed(tm_note *n)
{
    free(n);
}

/* Tells the pool once that this link is over. */
static void post_closed(tm_link *l, const char *why)
{
    if (atomic_exchange(&l->closed, true))
        return;
    closed_note *c = calloc(1, sizeof(*c));
    TM_ASSERT(c != NULL); /* a link that ends unnoticed would hold its streams for ever */
    c->note = (tm_note){.bytes = sizeof(*c), .act = act_closed, .drop = drop_closed};
    c->link_id = l->id;
    memcpy(c->why, why, TM_MIN(strlen(why), sizeof(c->why) - 1));
    (void)tm_mailbox_post(l->owner->mailbox, &c->note, true);
}

/* ---- the channel's thread ---- */

static void *arena_alloc(void *arena, size_t size)
{
    return tm_arena_alloc(arena, size);
}

static void arena_free(void *arena, void *pointer)
{
    (void)arena;
    (void)pointer; /* goes with the arena */
}

static message_note *unpack(const tm_link *l, const void *data, size_t len)
{
    tm_arena *arena = tm_arena_create(UNPACK_BYTES_MAX);
    if (arena == NULL)
        return NULL;
    message_note *m = tm_arena_alloc(arena, sizeof(*m));
    ProtobufCAllocator a = {arena_alloc, arena_free, arena};
    if (m != NULL)
        m->message = turbomesh__worker__v1__worker_message__unpack(&a, len, data);
    if (m == NULL || m->message == NULL) {
        tm_arena_destroy(arena);
        return NULL;
    }
    m->note = (tm_note){.bytes = tm_arena_used(arena), .act = act_message, .drop = drop_message};
    m->arena = arena;
    m->link_id = l->id;
    return m;
}

static void on_message(void *user, const void *data, size_t len)
{
    tm_link *l = user;
    if (atomic_load(&l->closed))
        return;
    int64_t received_ns = tm_clock_ns();
    message_note *m = unpack(l, data, len);
    if (m == NULL) {
        post_closed(l, "a message does not parse");
        return;
    }
    m->received_ns = received_ns;
    if (tm_mailbox_post(l->owner->mailbox, &m->note, false) != TM_OK) {
        m->note.drop(&m->note);
        post_closed(l, "the router does not keep up");
    }
}

static void on_close(void *user, tm_status st, const char *message)
{
    char why[160];
    snprintf(why, sizeof(why), "%s: %.100s", tm_status_name(st), message != NULL ? message : "");
    post_closed(user, why);
}

/* ---- the transport ---- */

static int64_t now_ns(void *ctx)
{
    (void)ctx;
    return tm_clock_ns();
}

static tm_status open_link(void *ctx, uint64_t link_id, const char *address, void **out)
{
    static const tm_rpc_stream_ops OPS = {.on_message = on_message, .on_close = on_close};
    tm_link *l = calloc(1, sizeof(*l));
    if (l == NULL)
        return TM_STATUS_NO_MEMORY;
    l->owner = ctx;
    l->id = link_id;
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_rpc_channel_create(&l->channel, address, &err);
    if (st == TM_OK)
        st = tm_rpc_stream_open(&l->stream, l->channel, ATTACH_PATH, NULL, 0, &OPS, l, &err);
    if (st != TM_OK) {
        tm_log(TM_LOG_WARN, "link", "%s: %s", address, err.msg);
        tm_rpc_channel_destroy(l->channel);
        free(l);
        return st;
    }
    *out = l;
    return TM_OK;
}

static tm_status send_link(void *ctx, void *handle, const void *data, size_t len)
{
    (void)ctx;
    tm_status st = tm_rpc_stream_send(((tm_link *)handle)->stream, data, len);
    /* The stream has ended and its note is on the way: what was sent is lost with it. */
    return st == TM_STATUS_CLOSED ? TM_OK : st;
}

static void run_close(void *arg)
{
    tm_link *l = arg;
    tm_rpc_stream_release(l->stream);
    tm_rpc_channel_destroy(l->channel);
    free(l);
}

static void close_link(void *ctx, void *handle)
{
    tm_link *l = handle;
    tm_links *owner = ctx;
    atomic_store(&l->closed, true);
    tm_rpc_stream_cancel(l->stream);
    /* Links end at most at the rate of the backoff; should the helper be that far behind, join here. */
    if (tm_jobs_add(owner->closers, run_close, l) != TM_OK)
        run_close(l);
}

static tm_status fetch(void *ctx, const char *address, const char *model, const char *digest)
{
    tm_links *l = ctx;
    return tm_assets_fetch(l->fetchers, l->mailbox, address, model, digest, &l->opts);
}

tm_transport tm_links_transport(tm_links *l)
{
    return (tm_transport){l, now_ns, open_link, send_link, close_link, fetch};
}

tm_status tm_links_create(tm_links **out, tm_mailbox *mailbox, const tm_served_opts *opts,
                          tm_err *err)
{
    tm_links *l = calloc(1, sizeof(*l));
    if (l == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the links");
    tm_status st = TM_OK;
    l->mailbox = mailbox;
    l->opts = *opts;
    TM_TRY_GOTO(tm_jobs_create(&l->closers, CLOSERS_QUEUE_MAX, err), err_destroy);
    TM_TRY_GOTO(tm_jobs_create(&l->fetchers, FETCH_QUEUE_MAX, err), err_destroy);
    *out = l;
    return TM_OK;

err_destroy:
    tm_links_destroy(l);
    return st;
}

void tm_links_destroy(tm_links *l)
{
    if (l == NULL)
        return;
    tm_jobs_destroy(l->fetchers);
    tm_jobs_destroy(l->closers);
    free(l);
}
