/* Inside of the engine, for the files of this folder.
 *
 * Threads of rank 0: the engine thread owns scheduler, model, communicator, samplers and the batch of events
 * being built. Submitting and reading threads share two places with it, each with its own lock:
 *   inbox   new requests, cancel marks, the id table, statistics   (engine.c, requests.c)
 *   outbox  finished batches of events                               (events.c)
 * The watchdog has a lock of its own and touches nothing else.
 *
 * Steps whose tokens the device chooses run ahead: the next one is planned, sent and enqueued while the device still
 * computes the one before (steps.c). */
#ifndef TM_ENGINE_ENGINE_IMPL_H
#define TM_ENGINE_ENGINE_IMPL_H

#include <pthread.h>

#include "engine/engine.h"
#include "engine/events.h"
#include "engine/sample/sampler.h"
#include "engine/sched/plan.h"
#include "engine/sched/sched.h"
#include "engine/watchdog.h"

/* A request from submit to FINISHED. */
typedef struct tm_live {
    uint64_t id;
    tm_seq *seq;
    tm_sampler *sampler;
    int32_t logprobs, prompt_logprobs, logits_last;
    bool cancel;                 /* inbox lock */
    struct tm_live *chain;       /* bucket of the id table */
    struct tm_live *prev, *next; /* all live requests */
    struct tm_live *inbox_next;
} tm_live;

typedef struct tm_inbox {
    pthread_mutex_t lock;
    pthread_cond_t work; /* engine thread: something came */
    tm_live **buckets;
    uint64_t mask;
    tm_live *all;
    tm_live *first, *last; /* submitted, not yet taken */
    int count;             /* of those */
    int waiting;           /* in the scheduler's queue, as of the last step */
    bool cancels;          /* some request is marked */
    bool stop, lost;
    tm_engine_stats stats;
    int64_t progress_ms; /* end of the last step, or the end of idleness; 0 while idle */
} tm_inbox;

/* Who chooses the tokens of a step. */
typedef enum tm_choice {
    TM_CHOICE_HOST,  /* here, from its logits */
    TM_CHOICE_BEST,  /* the device: the largest logits */
    TM_CHOICE_DRAWN, /* the device, by the parameters in e->draws */
    TM_CHOICE_LATER  /* the device, but they depend on tokens of the step in flight */
} tm_choice;

/* A step from its plan to its end. */
typedef struct tm_work {
    tm_step step;
    uint64_t number;
    int64_t planned_ns;
    tm_choice choice;
} tm_work;

struct tm_engine {
    tm_engine_opts opts;
    tm_engine_info info;
    tm_comm *comm;
    tm_model *model;
    tm_plan_buf plan;
    uint64_t step; /* the last that was planned */
    /* rank 0 only */
    tm_plan_buf signal;              /* plans without a step */
    tm_work works[TM_MODEL_FLIGHTS]; /* by number */
    int in_flight;                   /* of those, begun and not ended */
    int64_t ended_ns;                /* the last step's end */
    tm_seq_limits limits;
    tm_sched *sched;
    tm_sample_space *space;
    float *logits;              /* [max_logits, vocab] */
    int32_t *sampled;           /* [max_batch_size] */
    int32_t *picked;            /* [max_logits] the token of each row, where the device chose it */
    tm_sample_row *draw_rows;   /* [max_batch_size] */
    tm_sample_edit *draw_edits; /* [tm_model_edits_max] */
    tm_sample_set draws;        /* those of the step that begins next */
    tm_status *failures;        /* [max_batch_size] why a sequence of this step failed */
    tm_events events;
    tm_inbox inbox;
    tm_outbox outbox;
    tm_watchdog *watchdog;
    pthread_t thread;
    bool thread_runs;
};

/* requests.c */
tm_status tm_inbox_init(tm_inbox *in, int live_max, tm_err *err);
void tm_inbox_deinit(tm_inbox *in);
tm_live *tm_inbox_find(const tm_inbox *in, uint64_t id); /* under the lock */
void tm_inbox_insert(tm_inbox *in, tm_live *live);       /* under the lock */
void tm_inbox_remove(tm_inbox *in, tm_live *live);       /* under the lock */
tm_status tm_live_create(const tm_engine *e, const tm_request *r, tm_live **out, tm_err *err);
void tm_live_destroy(tm_live *live);

/* open.c */
tm_status tm_engine_build(tm_engine *e, tm_err *err);
void tm_engine_unbuild(tm_engine *e);

/* loop.c */
void *tm_engine_main(void *engine);
/* The request is told its end and forgotten. */
void tm_engine_finish(tm_engine *e, tm_live *l, tm_finish finish, tm_status status);
void tm_engine_copy_stats(tm_engine *e); /* of the scheduler, under the inbox lock */

/* steps.c */
/* Begins what can be begun and ends one step. Nothing is done, and nothing is in flight, when the scheduler holds
 * nothing. */
tm_status tm_engine_turn(tm_engine *e, tm_err *err);
/* Waits for what is in flight; its results are dropped. */
tm_status tm_engine_collect(tm_engine *e);

/* sampling.c: the sample phase of a step, whose tokens are in e->picked (picks) or whose rows are in e->logits. */
void tm_engine_sample(tm_engine *e, const tm_step *step, bool picks);
/* Fills e->draws where it says DRAWN. LATER only with a step in flight; what the device chooses now runs ahead. */
tm_choice tm_engine_choice(tm_engine *e, const tm_step *step);

#endif
