/* Dispatch in the router's process: the pool on libevent's loop.
 *
 * The pool (router/pool) has the logic and no idea of threads; here it gets the clock, the links, the etcd
 * watch, and the loop: one event for the mailbox, one timer. Destroying goes against the stream: first
 * whoever posts notes, the mailbox last. */
#include "router/dispatch.h"

#include <event2/event.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "common/log.h"
#include "net/etcd/etcd.h"
#include "router/pool/link.h"
#include "router/pool/mailbox.h"
#include "router/pool/pool.h"

#define NOTES_MAX      ((size_t)65536)
#define NOTE_BYTES_MAX ((size_t)512 << 20)
#define PREFIX_DEFAULT "/turbomesh/v1/groups/default/"
#define RECONCILE_MS   60000

struct tm_dispatch {
    tm_pool *pool;
    tm_mailbox *mailbox;
    tm_links *links;
    tm_etcd_watch *watch;
    struct event *mail, *timer;
    tm_series *relists, *revision;
    uint64_t relists_seen;
};

static const tm_metric_desc REVISION = {.name = "turbomesh_etcd_revision",
                                        .help = "Revision of the last member list.",
                                        .kind = TM_METRIC_GAUGE};
static const tm_metric_desc RELISTS = {.name = "turbomesh_etcd_relist_total",
                                       .help = "Complete listings of the members.",
                                       .kind = TM_METRIC_COUNTER};

/* ---- etcd's thread ---- */

typedef struct members_note {
    tm_note note;
    tm_series *revision_seen;
    int64_t revision;
    tm_member_list list;
} members_note;

typedef struct state_note {
    tm_note note;
    bool connected;
} state_note;

static void act_members(void *pool, tm_note *n)
{
    members_note *m = (members_note *)(void *)n;
    tm_series_set(m->revision_seen, (double)m->revision);
    tm_pool_on_members(pool, &m->list);
}

static void drop_members(tm_note *n)
{
    tm_member_list_deinit(&((members_note *)(void *)n)->list);
    free(n);
}

static void on_list(void *user, const tm_etcd_kv *kvs, int count, int64_t revision)
{
    tm_dispatch *d = user;
    members_note *n = calloc(1, sizeof(*n));
    if (n == NULL || tm_members_from_etcd(kvs, count, &n->list) != TM_OK) {
        free(n);
        tm_log(TM_LOG_ERROR, "members", "no memory for the list of revision %lld",
               (long long)revision);
        return; /* the next reconciliation brings it again */
    }
    if (n->list.ignored > 0)
        tm_log(TM_LOG_WARN, "members", "%d of %d registrations cannot be used", n->list.ignored,
               count);
    n->revision_seen = d->revision;
    n->revision = revision;
    n->note = (tm_note){.bytes = sizeof(*n), .act = act_members, .drop = drop_members};
    (void)tm_mailbox_post(d->mailbox, &n->note, true);
}

static void act_state(void *pool, tm_note *n)
{
    tm_pool_on_etcd(pool, ((state_note *)(void *)n)->connected);
}

static void drop_state(tm_note *n)
{
    free(n);
}

static void on_state(void *user, bool connected, const char *why)
{
    (void)why;
    tm_dispatch *d = user;
    state_note *n = calloc(1, sizeof(*n));
    if (n == NULL)
        return;
    n->note = (tm_note){.bytes = sizeof(*n), .act = act_state, .drop = drop_state};
    n->connected = connected;
    (void)tm_mailbox_post(d->mailbox, &n->note, true);
}

/* ---- the loop ---- */

static void on_mail(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    tm_dispatch *d = arg;
    tm_mailbox_drain(d->mailbox, d->pool);
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    tm_dispatch *d = arg;
    /* What has come must be known before silence is judged. */
    tm_mailbox_drain(d->mailbox, d->pool);
    tm_pool_tick(d->pool);
    if (d->watch != NULL) {
        uint64_t n = tm_etcd_watch_relists(d->watch);
        tm_series_add(d->relists, (double)(n - d->relists_seen));
        d->relists_seen = n;
    }
}

static tm_status start_loop(tm_dispatch *d, struct event_base *base, tm_err *err)
{
    static const struct timeval EVERY = {0, TM_POOL_TICK_MS * 1000};
    d->mail = event_new(base, tm_mailbox_fd(d->mailbox), EV_READ | EV_PERSIST, on_mail, d);
    d->timer = event_new(base, -1, EV_PERSIST, on_timer, d);
    if (d->mail == NULL || d->timer == NULL || event_add(d->mail, NULL) != 0 ||
        event_add(d->timer, &EVERY) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "the loop takes no more events");
    return TM_OK;
}

static tm_status start_members(tm_dispatch *d, const tm_dispatch_opts *o, tm_err *err)
{
    if ((o->etcd == NULL) == (o->workers == NULL))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "name either etcd endpoints or a static list of workers");
    if (o->workers != NULL) {
        tm_member_list list;
        TM_TRY(tm_members_from_static(o->workers, &list, err));
        tm_pool_on_members(d->pool, &list);
        tm_member_list_deinit(&list);
        return TM_OK;
    }
    tm_etcd_watch_opts w = {.endpoints = o->etcd,
                            .prefix = o->prefix != NULL ? o->prefix : PREFIX_DEFAULT,
                            .on_list = on_list,
                            .on_state = on_state,
                            .user = d,
                            .reconcile_ms = RECONCILE_MS};
    return tm_etcd_watch_create(&d->watch, &w, err);
}

static tm_pool_opts pool_opts(const tm_dispatch *d, const tm_dispatch_opts *o)
{
    uint64_t seed;
    tm_random_bytes(&seed, sizeof(seed));
    return (tm_pool_opts){.transport = tm_links_transport(d->links),
                          .metrics = o->metrics,
                          .policy = o->policy,
                          .queue_max = o->queue_max,
                          .queue_wait_ms = o->queue_wait_ms,
                          .dead_ms = o->dead_ms,
                          .suspect_ms = o->suspect_ms,
                          .moves_max = o->moves_max,
                          .router_id = o->router_id,
                          .seed = seed};
}

tm_status tm_dispatch_create(tm_dispatch **out, const tm_dispatch_opts *o, tm_err *err)
{
    if (o->suspect_ms < 1 || o->dead_ms <= o->suspect_ms || o->queue_max < 0 ||
        o->queue_wait_ms < 0 || o->moves_max < 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "dispatch: 0 < suspect < dead, and no negative bounds");
    tm_dispatch *d = calloc(1, sizeof(*d));
    if (d == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for dispatch");
    tm_status st;
    d->relists = tm_metrics_series(o->metrics, &RELISTS, NULL);
    d->revision = tm_metrics_series(o->metrics, &REVISION, NULL);
    TM_TRY_GOTO(tm_mailbox_create(&d->mailbox, NOTES_MAX, NOTE_BYTES_MAX, err), err_destroy);
    TM_TRY_GOTO(tm_links_create(&d->links, d->mailbox, &o->served, err), err_destroy);
    tm_pool_opts po = pool_opts(d, o);
    TM_TRY_GOTO(tm_pool_create(&d->pool, &po, err), err_destroy);
    TM_TRY_GOTO(start_loop(d, o->base, err), err_destroy);
    TM_TRY_GOTO(start_members(d, o, err), err_destroy);
    *out = d;
    return TM_OK;

err_destroy:
    tm_dispatch_destroy(d);
    return st;
}

void tm_dispatch_destroy(tm_dispatch *d)
{
    if (d == NULL)
        return;
    if (d->timer != NULL)
        event_free(d->timer);
    if (d->mail != NULL)
        event_free(d->mail);
    if (d->watch != NULL)
        tm_etcd_watch_destroy(d->watch);
    tm_pool_destroy(d->pool);
    tm_links_destroy(d->links);
    tm_mailbox_destroy(d->mailbox);
    free(d);
}

/* ---- the pool's answers ---- */

tm_status tm_dispatch_start(tm_dispatch *d, const tm_gen_args *args, const tm_gen_ops *ops,
                            void *user, tm_gen **out, int64_t *retry_after_ms)
{
    return tm_pool_start(d->pool, args, ops, user, out, retry_after_ms);
}

int tm_dispatch_served_count(const tm_dispatch *d)
{
    return tm_pool_served_count(d->pool);
}

tm_served *tm_dispatch_served_at(const tm_dispatch *d, int i)
{
    return tm_pool_served_at(d->pool, i);
}

tm_served *tm_dispatch_served_find(const tm_dispatch *d, const char *name)
{
    return tm_pool_served_find(d->pool, name);
}

int tm_dispatch_groups_ready(const tm_dispatch *d, const char *model)
{
    return tm_pool_groups_ready(d->pool, model);
}

int tm_dispatch_active(const tm_dispatch *d)
{
    return tm_pool_active(d->pool);
}

bool tm_dispatch_members_stale(const tm_dispatch *d)
{
    return tm_pool_members_stale(d->pool);
}

void tm_dispatch_describe(const tm_dispatch *d, tm_buf *json)
{
    tm_pool_describe(d->pool, json);
}

void tm_dispatch_describe_groups(const tm_dispatch *d, tm_jw *w, bool addresses)
{
    tm_pool_describe_groups(d->pool, w, addresses);
}

int tm_dispatch_waiting(const tm_dispatch *d)
{
    return tm_pool_waiting(d->pool);
}
