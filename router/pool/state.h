/* The structs of the pool, for the files of router/pool only.
 *
 *   tm_pool --- groups[slot] --- slots[] ---> tm_gen      a running generation
 *          \--- models[] --- queue (heap) ---> tm_gen      a waiting one
 *          \--- orphans ---> tm_gen                        its group was just lost
 *
 * A group is known by its slot and, while it has a link, by link_id = attempt << 32 | slot. A submitted
 * generation is known on its link by id = use << 32 | index of its slot: finding it is an array access,
 * and an event for an id that was cancelled or has ended does not match. */
#ifndef TM_ROUTER_POOL_STATE_H
#define TM_ROUTER_POOL_STATE_H

#include "common/buf.h"
#include "router/policy/policy.h"
#include "router/pool/heap.h"
#include "router/pool/pool.h"

#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S  INT64_C(1000000000)

/* Values of the group_state gauge. */
typedef enum tm_group_state {
    TM_GROUP_DOWN,       /* no link */
    TM_GROUP_CONNECTING, /* a link without Hello */
    TM_GROUP_STARTING,   /* says so itself, or its text files are not here yet */
    TM_GROUP_READY,
    TM_GROUP_SUSPECT, /* silent for suspect_ms */
    TM_GROUP_DRAINING
} tm_group_state;

/* Why a generation was taken from its place before its end: moves (labels of migrations_total), then the
 * two that end it. */
typedef enum tm_move_kind {
    TM_MOVE_DEATH,    /* the link ended or went silent */
    TM_MOVE_STALL,    /* the group lives, but no token came */
    TM_MOVE_ERROR,    /* the engine could not go on with it */
    TM_MOVE_GAP,      /* positions or ids that cannot be */
    TM_MOVE_HANDBACK, /* drain: planned, costs no move */
    TM_MOVE_REJECT,   /* never started there: busy, draining, stale epoch */
    TM_MOVE_DEADLINE, /* its own deadline passed: TIMEOUT */
    TM_MOVE_WAITED    /* no group within the wait bound: BUSY or NO_WORKER */
} tm_move_kind;

typedef struct tm_model tm_model;
typedef struct tm_group tm_group;

/* Submits that the group's numbers do not include yet, oldest first, in a ring. */
typedef struct tm_unacked {
    uint64_t seq;
    int64_t tokens;
} tm_unacked;
#define TM_UNACKED_MAX 8192

typedef struct tm_slot {
    uint64_t id; /* of the present or the next use */
    tm_gen *gen; /* NULL = free */
    int32_t next_free;
} tm_slot;

struct tm_group {
    int slot;
    tm_member member;
    uint64_t key;    /* hash of the name */
    char label[256]; /* name in metrics and answers: the group's own, when it is unique */
    bool listed;     /* the last member list has it */
    bool doubted;    /* missing from the list, which is not believed while the link is healthy */
    tm_model *model; /* since Hello */

    void *link; /* NULL = none */
    uint64_t link_id;
    bool hello;
    uint64_t epoch; /* of the link's messages */
    int64_t opened_ns, last_rx_ns, retry_ns;
    int64_t backoff_ms;

    int max_batch, queue_max;
    int32_t max_context, vocab;
    bool starting, draining; /* the group's own word */
    bool suspect;            /* silent */
    bool stuck;              /* talks, but its engine ends no step */
    bool broken;           /* a send failed: lost at the next tick, outside of the owner's calls */
    int64_t busy_until_ns; /* it refused work: wait for its next report */
    int64_t idle_ns; /* since when it reports no work at all, although generations are on it */
    int64_t eject_until_ns; /* it failed a generation: picked only when nobody else lives */

    bool known; /* a report came */
    int running, waiting;
    int64_t waiting_tokens;
    double prefill_tps, step_s, kv_use;
    int64_t step_age_ms;
    uint64_t submit_seq;
    tm_unacked *unacked; /* TM_UNACKED_MAX entries, allocated with the first submit */
    int unacked_head, unacked_count;
    int64_t unacked_tokens;

    tm_slot *slots;
    int slot_count;
    int32_t slot_free; /* -1 = none */
    int in_flight;

    tm_series *series_state, *series_in_flight, *series_running, *series_waiting, *series_kv;
};

struct tm_model {
    char name[128], digest[65];
    tm_served *served; /* NULL until its text files came */
    bool fetching;
    int64_t fetch_ns, fetch_backoff_ms; /* not before */
    tm_group **groups;                  /* with a live link that said so */
    int group_count, group_cap;
    int64_t lost_ns; /* when the last group left */
    tm_heap queue;   /* room for all of gen_count, so a move never fails for memory */
    int gen_count;
    uint64_t ended; /* generations that ended on a group, for the drain rate */
    uint64_t ended_seen;
    double drain_rate; /* per second */
};

typedef enum tm_gen_place {
    TM_GEN_NOWHERE,
    TM_GEN_QUEUED,
    TM_GEN_ON_GROUP,
    TM_GEN_ORPHAN
} tm_gen_place;

struct tm_gen {
    tm_pool *pool;
    tm_model *model;
    tm_served *served;
    tm_gen_ops ops;
    void *user;
    tm_gen *prev, *next; /* all generations */

    int32_t *prompt; /* with stop_ids and logit_bias in one block */
    size_t prompt_len;
    const int32_t *stop_ids;
    size_t stop_count;
    int32_t max_tokens;
    tm_sampling sampling;
    char *session, *request_id;
    int32_t priority;
    uint64_t cache_salt;

    int32_t *out; /* delivered tokens */
    int32_t out_len, out_cap;
    int32_t prompt_next; /* next prompt position of the log-probabilities; -1 = none came yet */

    tm_gen_place place;
    tm_heap_node node;
    tm_gen *orphan_prev, *orphan_next;
    tm_group *group;
    int32_t slot;
    bool admitted; /* by the present group */
    bool moved;    /* goes before new work */
    tm_move_kind move_kind;
    uint64_t avoid_link; /* not there again while it is this link */

    uint64_t arrival;
    int64_t wait_until_ns;     /* of the present wait */
    int64_t deadline_ns;       /* INT64_MAX = none */
    int64_t last_token_ns;     /* on the present group, 0 = none yet */
    int64_t start_ns, sent_ns; /* when it came and when it first went to a group, for the metrics */
    double itl_s;              /* moving mean */
    int moves, handbacks, rejects;
    struct {
        uint64_t key, epoch;
    } deaths[2];
    int death_count;

    int holds;  /* callbacks on the stack that still need the struct */
    bool ended; /* told its end, or cancelled */
};

typedef struct tm_pool_metrics {
    tm_metrics *m;
    tm_series *queue_depth, *active, *stale, *forward_s, *tokens, *queue_s, *prefill_s;
} tm_pool_metrics;

struct tm_pool {
    tm_pool_opts opts;
    char router_id[128];
    tm_balancer balancer;
    tm_pool_metrics metrics;
    tm_group **groups; /* by slot, NULL = free */
    int group_cap;
    uint32_t attempts;
    tm_model **models;
    int model_count, model_cap;
    tm_gen *gens;
    tm_gen *orphans, *orphans_last;
    int active, waiting;
    uint64_t arrivals;
    int64_t tick_ns, rate_ns, scan_ns;
    bool stale, settling, closing;
    tm_buf out; /* the message being packed */
    tm_gen_token *tokens;
    tm_top *tops;
    int tokens_cap, tops_cap;
    tm_candidate *candidates;
    tm_group **candidate_groups;
    int candidate_cap;
};

int64_t tm_pool_now(const tm_pool *p);

/* group.c */
tm_status tm_group_create(tm_pool *p, const tm_member *m, tm_group **out);
void tm_group_remove(tm_pool *p, tm_group *g); /* without link and generations */
tm_group *tm_group_by_link(const tm_pool *p, uint64_t link_id);
tm_group_state tm_group_state_of(const tm_group *g);
const char *tm_group_state_name(tm_group_state s);
void tm_group_publish(tm_group *g);
int tm_group_capacity(const tm_group *g);
bool tm_group_alive(const tm_group *g); /* could be picked now or soon */
bool tm_group_has_room(const tm_group *g, int64_t now_ns);
void tm_group_load(tm_group *g, const tm_wire_load *l, int64_t now_ns);
void tm_group_sent(tm_group *g, int64_t tokens);
void tm_group_forget(tm_group *g); /* what was known of the link's other end */

/* connect.c: a group's link from open to loss */
void tm_group_connect(tm_pool *p, tm_group *g);
/* The link is gone or given up: its generations become orphans of this kind. */
void tm_group_lost(tm_pool *p, tm_group *g, tm_move_kind kind, const char *why);
void tm_group_hello(tm_pool *p, tm_group *g, const tm_wire_hello *h);
void tm_group_tick(tm_pool *p, tm_group *g, int64_t now_ns); /* may free g */

/* model.c */
tm_model *tm_model_get(tm_pool *p, const char *name, const char *digest); /* NULL: no memory */
bool tm_model_attach(tm_pool *p, tm_model *m, tm_group *g);
void tm_model_detach(tm_pool *p, tm_group *g);
void tm_models_tick(tm_pool *p, int64_t now_ns); /* fetches what is missing, drops what is gone */
void tm_model_rates(tm_pool *p, double seconds);
void tm_models_destroy(tm_pool *p);
int64_t tm_model_retry_after(const tm_model *m, int ahead);

/* place.c: who goes where */
tm_group *tm_place_pick(tm_pool *p, const tm_gen *g);
void tm_place_pump(tm_pool *p, tm_model *m);

/* gen.c: one generation's life */
void tm_gen_enter(tm_gen *g, tm_group *group, int32_t slot);
void tm_gen_leave(tm_gen *g);                 /* whatever place it is in; the only way out */
void tm_gen_wait(tm_gen *g, int64_t wait_ms); /* into the queue of its model */
void tm_gen_orphan(tm_gen *g, tm_move_kind kind);
void tm_gen_fail(tm_gen *g, tm_gen_error error, int64_t retry_after_ms);
void tm_gen_finish_with(tm_gen *g, tm_gen_finish finish);
void tm_gen_move(tm_gen *g, tm_move_kind kind); /* after leaving its group */
void tm_gen_hold(tm_gen *g);
void tm_gen_unhold(tm_gen *g); /* may free */
bool tm_gen_complete(const tm_gen *g, tm_gen_finish *finish);
tm_status tm_gen_create(tm_gen **out, tm_pool *p, tm_model *m, const tm_gen_args *args,
                        const tm_gen_ops *ops, void *user);
void tm_gen_free(tm_gen *g);                            /* not placed any more */
void tm_gen_forgive(tm_pool *p, const tm_group *group); /* the death was none */

/* submit.c: what is sent */
tm_status tm_group_greet(tm_pool *p, tm_group *group);
tm_status tm_gen_submit(tm_gen *g, tm_group *group); /* enters the group on TM_OK */
void tm_gen_withdraw(tm_gen *g);                     /* Cancel to the group it is on */

/* events.c */
/* Ends or moves on what lost its group; then new work goes where there is room. */
void tm_pool_settle(tm_pool *p);
void tm_gen_event(tm_pool *p, tm_group *group, const tm_wire_event *e);

/* watch.c: deadlines, waits and stalls of all generations */
void tm_gens_watch(tm_pool *p, int64_t now_ns);

/* meters.c */
void tm_pool_metrics_init(tm_pool_metrics *pm, tm_metrics *m);
void tm_meter_pick(const tm_pool *p, const char *reason);
void tm_meter_group_load(tm_group *g);
void tm_meter_move(const tm_pool *p, tm_move_kind kind, const char *result);
void tm_meter_group_add(const tm_pool *p, tm_group *g);
void tm_meter_group_remove(const tm_pool *p, tm_group *g);
void tm_meter_link(const tm_pool *p, const char *event);

#endif
