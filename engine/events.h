/* Batches of events: built by the engine thread during a step, then handed over through a bounded queue. */
#ifndef TM_ENGINE_EVENTS_H
#define TM_ENGINE_EVENTS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>

#include "engine/engine.h"

/* Undelivered batches, by number and by size, before the engine pauses. */
#define TM_OUTBOX_BATCHES_MAX 64
#define TM_OUTBOX_BYTES_MAX   ((size_t)256 << 20)

/* The batch of the step in progress. Grows to the largest step and stays. Running out of memory here ends the
 * process: an event that cannot be delivered must not be lost silently. */
typedef struct tm_events {
    tm_event *events;
    tm_top_logprob *tops;
    float *logits;
    size_t count, events_cap, tops_count, tops_cap, logits_count, logits_cap;
} tm_events;

void tm_events_deinit(tm_events *ev);
tm_event *tm_events_add(tm_events *ev, tm_event_kind kind,
                        uint64_t request); /* valid until the next add */
/* Appends and returns the index. */
int32_t tm_events_add_top(tm_events *ev, int32_t token, float logprob);
size_t tm_events_add_logits(tm_events *ev, const float *row, int n);

typedef struct tm_batch_node tm_batch_node;

typedef struct tm_outbox {
    pthread_mutex_t lock;
    pthread_cond_t readable, writable, left;
    tm_batch_node *first, *last;
    int count;
    size_t bytes;
    int readers;    /* threads inside tm_outbox_take */
    bool wake;      /* the next reader without a batch returns */
    bool unbounded; /* stopping: nobody may be reading any more */
    tm_status end;  /* TM_OK while open, else what readers get after the last batch */
} tm_outbox;

tm_status tm_outbox_init(tm_outbox *o, tm_err *err);
void tm_outbox_deinit(tm_outbox *o); /* waits for readers to leave; ended before */
/* Takes what is in ev (when anything is) as one batch and empties ev. Sleeps while the queue is full. */
void tm_outbox_put(tm_outbox *o, tm_events *ev, uint64_t step);
tm_status tm_outbox_take(tm_outbox *o, int64_t timeout_ms, tm_step_events **out);
void tm_outbox_wake(tm_outbox *o);
void tm_outbox_unbound(tm_outbox *o);
void tm_outbox_end(tm_outbox *o, tm_status end);

#endif
