/* Dispatch: one generation of one sequence, on whatever group is best, to its end.
 *
 * This is the seam between the API faces (HTTP, public gRPC), which know text, and the groups, which know
 * tokens. Behind it: membership, links, balancing policies, the bounded waiting queue, cancel and
 * continuation. When a group dies, stalls or drains, its generations are resubmitted elsewhere with the
 * tokens already delivered; the owner only sees on_tokens go on at the next position. Tokens are delivered
 * exactly once and in order.
 *
 * Thread: everything on the router's loop thread. Callbacks never run inside tm_dispatch_start. After
 * on_end, or after tm_gen_cancel returns, the handle is invalid and no callback follows. */
#ifndef TM_ROUTER_DISPATCH_H
#define TM_ROUTER_DISPATCH_H

#include "common/json.h"
#include "common/metrics.h"
#include "common/sampling.h"
#include "common/status.h"
#include "router/served.h"

struct event_base;
typedef struct tm_dispatch tm_dispatch;
typedef struct tm_gen tm_gen;

typedef struct tm_top {
    int32_t token;
    float logprob;
} tm_top;

typedef struct tm_gen_token {
    int32_t token;
    float logprob;     /* meaningful when logprobs were asked for */
    const tm_top *top; /* top_count best, valid during the callback */
    int top_count;
} tm_gen_token;

typedef enum tm_gen_finish { TM_GEN_STOP, TM_GEN_LENGTH } tm_gen_finish;

typedef enum tm_gen_error {
    TM_GEN_ERR_INVALID,   /* the worker refused the request: 400 */
    TM_GEN_ERR_TOO_LONG,  /* 400 context_length_exceeded */
    TM_GEN_ERR_BUSY,      /* every queue is full: 429 */
    TM_GEN_ERR_NO_WORKER, /* no group could take it within the wait bound: 503 */
    TM_GEN_ERR_POISON,    /* present at two group deaths: 500, x-should-retry: false */
    TM_GEN_ERR_TIMEOUT,   /* waited past its deadline: 408 */
    TM_GEN_ERR_INTERNAL   /* 500 */
} tm_gen_error;

typedef struct tm_gen_ops {
    /* A group took it. May come again after a move (then cached_tokens of the first stays valid). */
    void (*on_admitted)(void *user, int32_t prompt_tokens, int32_t cached_tokens);
    /* Prompt log-probabilities when asked for: positions first_pos.. of the prompt. May be NULL. */
    void (*on_prompt)(void *user, int32_t first_pos, const tm_gen_token *tokens, int count);
    void (*on_tokens)(void *user, int32_t first_pos, const tm_gen_token *tokens, int count);
    void (*on_end)(void *user, tm_gen_finish finish);
    /* The other end: nothing follows. retry_after_ms 0 = no advice. */
    void (*on_error)(void *user, tm_gen_error error, int64_t retry_after_ms);
} tm_gen_ops;

typedef struct tm_gen_args {
    tm_served *served;     /* dispatch takes its own reference */
    const int32_t *prompt; /* copied */
    size_t prompt_len;
    int32_t max_tokens; /* >= 0; prompt_len + max_tokens <= max_context */
    const int32_t *stop_ids;
    size_t stop_count;
    tm_sampling sampling;   /* seed always set; logit_bias copied */
    const char *session;    /* affinity key or NULL */
    const char *request_id; /* for logs */
    int32_t priority;
    uint64_t cache_salt;
    int64_t deadline_ms; /* from now, 0 = the queue bound only */
} tm_gen_args;

/* BUSY (queue bound reached), UNAVAILABLE (no group is up and none is expected), else TM_OK: exactly one of
 * on_end / on_error will follow unless cancelled. *retry_after_ms is set with BUSY and UNAVAILABLE. */
tm_status tm_dispatch_start(tm_dispatch *d, const tm_gen_args *args, const tm_gen_ops *ops,
                            void *user, tm_gen **out, int64_t *retry_after_ms);
/* The client left, or a stop string matched: the engine is told within its step. */
void tm_gen_cancel(tm_gen *g);
const char *tm_gen_group(const tm_gen *g); /* name of the group serving it now, "" = queued */

typedef enum tm_policy_kind {
    TM_POLICY_COST,
    TM_POLICY_SESSION,
    TM_POLICY_LEAST_LOAD,
    TM_POLICY_ROUND_ROBIN
} tm_policy_kind;

typedef struct tm_dispatch_opts {
    struct event_base *base;
    tm_metrics *metrics;
    const char *etcd;      /* endpoints, or NULL */
    const char *prefix;    /* "/turbomesh/v1/groups/default/" */
    const char *workers;   /* static member list "host:port,host:port", or NULL */
    tm_served_opts served; /* of every model; the strings must outlive dispatch */
    int policy;            /* tm_policy_kind */
    int queue_max;         /* generations waiting in the router for a group */
    int64_t queue_wait_ms; /* longest wait for a group before 503 */
    int64_t dead_ms;       /* no message from a group for this long: dead (2 s) */
    int64_t suspect_ms;    /* not picked any more (0.5 s) */
    int moves_max;         /* continuations per generation (3) */
    const char *router_id;
} tm_dispatch_opts;

tm_status tm_dispatch_create(tm_dispatch **out, const tm_dispatch_opts *opts, tm_err *err);
/* Ends every generation with NO_WORKER, closes links, joins helper threads. */
void tm_dispatch_destroy(tm_dispatch *d);

/* Served models, in order of name; entry valid until the loop turns. NULL name = the only or first one. */
int tm_dispatch_served_count(const tm_dispatch *d);
tm_served *tm_dispatch_served_at(const tm_dispatch *d, int i);
tm_served *tm_dispatch_served_find(const tm_dispatch *d, const char *name);
int tm_dispatch_groups_ready(const tm_dispatch *d, const char *model); /* NULL = all */
int tm_dispatch_active(const tm_dispatch *d);         /* generations not yet ended */
bool tm_dispatch_members_stale(const tm_dispatch *d); /* etcd is away: last known members in use */
/* Group table as JSON for /health details and the tests. */
void tm_dispatch_describe(const tm_dispatch *d, tm_buf *json);
/* The array of groups alone, as a value: {name, address, state, epoch, listed, model, in_flight, capacity} and,
 * once a group has reported, {running, waiting, waiting_tokens, prefill_tps, step_ms, kv_use}. state is "down",
 * "connecting", "starting", "ready", "suspect" or "draining". */
void tm_dispatch_describe_groups(const tm_dispatch *d, tm_jw *w, bool addresses);
int tm_dispatch_waiting(const tm_dispatch *d); /* of the active ones: in the router's queue */

#endif
