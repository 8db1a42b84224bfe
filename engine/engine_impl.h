/* Inside of the engine, for the files of this folder.
 *
 * Threads of rank 0: the engine thread owns scheduler, model, communicator, samplers and the batch of events
 * being built. Submitting and reading threads share two places with it, each with its own lock:
 *   inbox   new requests, cancel marks, the id table, statistics   (engine.c, requests.c)
 *   outbox  finished batches of events                               (events.c)
 * The watchdog has a lock of its own and touches nothing else. */
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

struct tm_engine {
    tm_engine_opts opts;
    tm_engine_info info;
    tm_comm *comm;
    tm_model *model;
    tm_plan_buf plan;
    uint64_t step;
    /* rank 0 only */
    tm_seq_limits limits;
    tm_sched *sched;
    tm_sample_space *space;
    float *logits;       /* [max_logits, vocab] */
    int32_t *sampled;    /* [max_batch_size] */
    int32_t *picked;     /* [max_logits] the largest logit of each row, where the device chose it */
    bool picks;          /* this step's rows are in picked, not in logits */
    tm_status *failures; /* [max_batch_size] why a sequence of this step failed */
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
/* sampling.c: the sample phase of a step. */
void tm_engine_sample(tm_engine *e, const tm_step *step);
/* True when nothing of the step's logits is needed but the largest of each row. */
bool tm_engine_takes_best(const tm_engine *e, const tm_step *step);

#endif
