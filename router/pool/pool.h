/* The pool: groups, their links, the waiting queue and every running generation. Pure state driven by
 * events and a clock, without threads, sockets or an event loop: dispatch.c gives it those, tests give it
 * scripts.
 *
 * A generation is in one of three places: waiting in its model's queue, on a group, or (while a group's
 * loss is worked through) orphaned. It enters a group in one function and leaves it in one function, so
 * the in-flight counts are right on every path; they are zero when nothing runs. */
#ifndef TM_ROUTER_POOL_POOL_H
#define TM_ROUTER_POOL_POOL_H

#include "router/dispatch.h"
#include "router/pool/members.h"
#include "router/pool/transport.h"
#include "router/pool/wire.h"

typedef struct tm_pool tm_pool;

typedef struct tm_pool_opts {
    tm_transport transport;
    tm_metrics *metrics;
    int policy; /* tm_policy_kind */
    int queue_max;
    int64_t queue_wait_ms, dead_ms, suspect_ms;
    int moves_max;
    const char *router_id;
    uint64_t seed; /* picks and jitter */
} tm_pool_opts;

tm_status tm_pool_create(tm_pool **out, const tm_pool_opts *opts, tm_err *err);
/* Every generation ends with NO_WORKER, links are closed. */
void tm_pool_destroy(tm_pool *p);

/* The contracts of tm_dispatch_start, tm_gen_cancel and the queries in router/dispatch.h. */
tm_status tm_pool_start(tm_pool *p, const tm_gen_args *args, const tm_gen_ops *ops, void *user,
                        tm_gen **out, int64_t *retry_after_ms);
int tm_pool_served_count(const tm_pool *p);
tm_served *tm_pool_served_at(const tm_pool *p, int i);
tm_served *tm_pool_served_find(const tm_pool *p, const char *name);
int tm_pool_groups_ready(const tm_pool *p, const char *model);
int tm_pool_active(const tm_pool *p);
int tm_pool_waiting(const tm_pool *p);
/* Sum over the groups; equals what is active and not waiting. */
int tm_pool_in_flight(const tm_pool *p);
void tm_pool_describe(const tm_pool *p, tm_buf *json);
void tm_pool_describe_groups(const tm_pool *p, tm_jw *w, bool addresses);

/* Events, each on the loop thread. */
void tm_pool_on_members(tm_pool *p, const tm_member_list *list);
void tm_pool_on_etcd(tm_pool *p, bool connected);
bool tm_pool_members_stale(const tm_pool *p);
/* The message is only read. received_ns: when it came off the wire, by the transport's clock. */
void tm_pool_on_message(tm_pool *p, uint64_t link_id, const tm_wire_worker_message *m,
                        int64_t received_ns);
void tm_pool_on_closed(tm_pool *p, uint64_t link_id, const char *why);
/* Takes over the reference; NULL = the fetch failed (it is tried again). */
void tm_pool_on_served(tm_pool *p, const char *model, const char *digest, tm_served *served);
/* Timers: connecting, liveness, deadlines, rates. Every TM_POOL_TICK_MS or so. */
#define TM_POOL_TICK_MS 25
void tm_pool_tick(tm_pool *p);

#endif
