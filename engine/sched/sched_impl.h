/* Inside of the scheduler, for sched.c, sched_plan.c and the test that checks every invariant. */
#ifndef TM_ENGINE_SCHED_SCHED_IMPL_H
#define TM_ENGINE_SCHED_SCHED_IMPL_H

#include "engine/cache/prefix_tree.h"
#include "engine/sched/sched.h"

#define TM_SCHED_FLIGHTS 2

/* A step that was planned and not retired. */
typedef struct tm_sched_flight {
    tm_step_seq *seqs;
    int n_seqs;
    bool advanced;
} tm_sched_flight;

struct tm_sched {
    tm_sched_opts opts;
    tm_block_pool *pool;
    tm_prefix_tree *tree;
    tm_seq **running; /* [n_running], best rank first */
    int n_running;
    tm_seq *wait_first, *wait_last; /* best rank first */
    int n_waiting, n_preempted;     /* preempted ones are among the waiting */
    int64_t pending;                /* sum over all of n_tokens - n_computed */
    uint64_t steps, arrivals, preemptions;
    tm_step_seq *step_seqs[TM_SCHED_FLIGHTS]; /* each [max_seqs], taken in turn */
    int next_seqs;
    tm_sched_flight flights[TM_SCHED_FLIGHTS]; /* oldest first */
    int in_flight;
};

/* True when a stands before b. */
static inline bool tm_sched_before(const tm_seq *a, const tm_seq *b)
{
    return a->rank != b->rank ? a->rank > b->rank : a->order < b->order;
}

/* Gives all blocks back, the last one first. */
void tm_sched_drop_blocks(tm_sched *s, tm_seq *seq);
/* Running -> waiting, with its old rank. */
void tm_sched_preempt(tm_sched *s, tm_seq *seq);
/* Waiting -> running; blocks must have been taken. */
void tm_sched_start(tm_sched *s, tm_seq *seq);

#endif
