/* Balancing policies: which of the groups that could take a generation should have it.
 *
 * A policy is a row of a table: a name, `pick`, and `complete` (told when a generation left its group). It
 * sees candidates as plain numbers, so it runs in tests with a virtual clock and invented clusters. It
 * never sees a group that must not be picked (suspect, draining, full): the pool filters those before.
 *
 * One tm_balancer belongs to one loop thread. */
#ifndef TM_ROUTER_POLICY_POLICY_H
#define TM_ROUTER_POLICY_POLICY_H

#include <stdbool.h>
#include <stdint.h>

/* One group. Telemetry is meaningful only when `known`; unknown is never taken for zero. */
typedef struct tm_candidate {
    uint64_t key;          /* stable hash of the group's name */
    int in_flight;         /* generations of this router on the group */
    int capacity;          /* how many it may hold */
    bool known;            /* a load report with rates has come on this link */
    int running, waiting;  /* reported */
    int unacked;           /* sent since the numbers were taken */
    double waiting_tokens; /* reported prompt tokens not yet computed */
    double unacked_tokens; /* prompt tokens sent since the numbers were taken */
    double prefill_tps;    /* tokens per second */
    double step_s;         /* seconds of a step = time between two tokens of a sequence */
    double kv_use;         /* 0..1 of the blocks that sequences refer to */
} tm_candidate;

typedef struct tm_pick_request {
    int64_t prompt_tokens; /* prompt and continued tokens, all to be computed */
    int64_t max_tokens;    /* still to be generated at most */
    const char *session;   /* NULL = none */
} tm_pick_request;

typedef struct tm_pick {
    int index;          /* of the candidate */
    const char *reason; /* label of pick_total; static string */
} tm_pick;

typedef struct tm_balancer tm_balancer;

typedef struct tm_policy {
    const char *name;
    tm_pick (*pick)(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c, int count);
    /* A generation with this many generated tokens left its group for good. May be NULL. */
    void (*complete)(tm_balancer *b, int64_t generated);
} tm_policy;

struct tm_balancer {
    const tm_policy *policy;
    uint64_t rng;
    uint64_t turn;       /* round_robin */
    double expected_out; /* moving mean of generated tokens */
};

extern const tm_policy TM_POLICY_COST_ROW, TM_POLICY_SESSION_ROW, TM_POLICY_LEAST_LOAD_ROW,
    TM_POLICY_ROUND_ROBIN_ROW;

/* kind: tm_policy_kind of router/dispatch.h. */
const tm_policy *tm_policy_at(int kind);
void tm_balancer_init(tm_balancer *b, const tm_policy *policy, uint64_t seed);
/* count >= 1. */
tm_pick tm_balancer_pick(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c,
                         int count);
void tm_balancer_complete(tm_balancer *b, int64_t generated);

/* For the rows. */
uint64_t tm_balancer_random(tm_balancer *b);
/* The less loaded of two random ones by in_flight; count >= 2. */
int tm_pick_power_of_two(tm_balancer *b, const tm_candidate *c, int count);
double tm_policy_cost_score(const tm_balancer *b, const tm_pick_request *r, const tm_candidate *c);

#endif
