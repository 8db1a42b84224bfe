/* The event batch under construction and the queue of finished ones.
 *
 * A batch is copied once into a single block of exactly its size: the reader frees it with one call, the
 * engine keeps its own arrays, and a step costs one allocation however many events it has. */
#include "engine/events.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"

struct tm_batch_node {
    tm_step_events batch; /* first: a reader's pointer is the node's */
    tm_batch_node *next;
    size_t bytes;
};

void tm_events_deinit(tm_events *ev)
{
    free(ev->events);
    free(ev->tops);
    free(ev->logits);
    *ev = (tm_events){0};
}

/* Room for `more` elements behind `count` of them. */
static void *grow(void *data, size_t count, size_t more, size_t *cap, size_t size)
{
    if (count + more <= *cap)
        return data;
    size_t want = TM_MAX(TM_MAX((size_t)64, 2 * *cap), count + more);
    TM_ASSERT(want <= SIZE_MAX / size);
    data = realloc(data, want * size);
    TM_ASSERT(data != NULL);
    *cap = want;
    return data;
}

tm_event *tm_events_add(tm_events *ev, tm_event_kind kind, uint64_t request)
{
    ev->events = grow(ev->events, ev->count, 1, &ev->events_cap, sizeof(*ev->events));
    tm_event *e = &ev->events[ev->count++];
    *e = (tm_event){.kind = kind, .request = request};
    return e;
}

int32_t tm_events_add_top(tm_events *ev, int32_t token, float logprob)
{
    ev->tops = grow(ev->tops, ev->tops_count, 1, &ev->tops_cap, sizeof(*ev->tops));
    ev->tops[ev->tops_count] = (tm_top_logprob){token, logprob};
    return (int32_t)ev->tops_count++;
}

size_t tm_events_add_logits(tm_events *ev, const float *row, int n)
{
    size_t at = ev->logits_count;
    ev->logits = grow(ev->logits, at, (size_t)n, &ev->logits_cap, sizeof(*ev->logits));
    memcpy(ev->logits + at, row, (size_t)n * sizeof(*row));
    ev->logits_count += (size_t)n;
    return at;
}

/* One block: node, events, tops, logits. Each part's size is a multiple of four and the first two are of eight. */
static tm_batch_node *make_node(const tm_events *ev, uint64_t step)
{
    size_t events = ev->count * sizeof(*ev->events), tops = ev->tops_count * sizeof(*ev->tops);
    size_t logits = ev->logits_count * sizeof(*ev->logits);
    size_t bytes = sizeof(tm_batch_node) + events + tops + logits;
    tm_batch_node *n = malloc(bytes);
    TM_ASSERT(n != NULL);
    char *at = (char *)(n + 1);
    *n = (tm_batch_node){.bytes = bytes};
    n->batch = (tm_step_events){.step = step,
                                .count = (int)ev->count,
                                .events = (tm_event *)at,
                                .tops = (tm_top_logprob *)(at + events),
                                .logits = (float *)(at + events + tops)};
    memcpy(at, ev->events, events);
    if (tops)
        memcpy(at + events, ev->tops, tops);
    if (logits)
        memcpy(at + events + tops, ev->logits, logits);
    return n;
}

void tm_engine_events_free(tm_step_events *ev)
{
    free(ev);
}

tm_status tm_outbox_init(tm_outbox *o, tm_err *err)
{
    *o = (tm_outbox){0};
    pthread_condattr_t attr;
    if (pthread_mutex_init(&o->lock, NULL) != 0 || pthread_condattr_init(&attr) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a lock");
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    bool ok = pthread_cond_init(&o->readable, &attr) == 0 &&
              pthread_cond_init(&o->writable, NULL) == 0 && pthread_cond_init(&o->left, NULL) == 0;
    pthread_condattr_destroy(&attr);
    return ok ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a condition variable");
}

void tm_outbox_deinit(tm_outbox *o)
{
    pthread_mutex_lock(&o->lock);
    while (o->readers > 0)
        pthread_cond_wait(&o->left, &o->lock);
    pthread_mutex_unlock(&o->lock);
    while (o->first) {
        tm_batch_node *n = o->first;
        o->first = n->next;
        free(n);
    }
    pthread_cond_destroy(&o->readable);
    pthread_cond_destroy(&o->writable);
    pthread_cond_destroy(&o->left);
    pthread_mutex_destroy(&o->lock);
}

static bool is_full(const tm_outbox *o)
{
    return !o->unbounded && o->count > 0 &&
           (o->count >= TM_OUTBOX_BATCHES_MAX || o->bytes >= TM_OUTBOX_BYTES_MAX);
}

void tm_outbox_put(tm_outbox *o, tm_events *ev, uint64_t step)
{
    if (ev->count == 0)
        return;
    tm_batch_node *n = make_node(ev, step);
    ev->count = ev->tops_count = ev->logits_count = 0;
    pthread_mutex_lock(&o->lock);
    while (is_full(o))
        pthread_cond_wait(&o->writable, &o->lock);
    if (o->last)
        o->last->next = n;
    else
        o->first = n;
    o->last = n;
    o->count++;
    o->bytes += n->bytes;
    pthread_cond_signal(&o->readable);
    pthread_mutex_unlock(&o->lock);
}

static tm_step_events *pop(tm_outbox *o)
{
    tm_batch_node *n = o->first;
    o->first = n->next;
    if (!o->first)
        o->last = NULL;
    o->count--;
    o->bytes -= n->bytes;
    pthread_cond_signal(&o->writable);
    return &n->batch;
}

/* False when the time is up. */
static bool sleep_until(tm_outbox *o, int64_t deadline_ms)
{
    if (deadline_ms < 0)
        return pthread_cond_wait(&o->readable, &o->lock) == 0;
    if (tm_clock_ms() >= deadline_ms)
        return false;
    struct timespec ts = {.tv_sec = deadline_ms / 1000, .tv_nsec = deadline_ms % 1000 * 1000000};
    return pthread_cond_timedwait(&o->readable, &o->lock, &ts) == 0;
}

tm_status tm_outbox_take(tm_outbox *o, int64_t timeout_ms, tm_step_events **out)
{
    int64_t now = timeout_ms > 0 ? tm_clock_ms() : 0;
    int64_t deadline = timeout_ms < 0 ? -1 : timeout_ms > INT64_MAX - now ? -1 : now + timeout_ms;
    tm_status st = TM_STATUS_TIMEOUT;
    pthread_mutex_lock(&o->lock);
    o->readers++;
    while (!o->first && o->end == TM_OK && !o->wake && sleep_until(o, deadline))
        ;
    if (o->first) {
        *out = pop(o);
        st = TM_OK;
    } else if (o->end != TM_OK) {
        st = o->end;
    }
    o->wake = false;
    if (--o->readers == 0)
        pthread_cond_signal(&o->left);
    pthread_mutex_unlock(&o->lock);
    return st;
}

void tm_outbox_wake(tm_outbox *o)
{
    pthread_mutex_lock(&o->lock);
    o->wake = true;
    pthread_cond_broadcast(&o->readable);
    pthread_mutex_unlock(&o->lock);
}

void tm_outbox_unbound(tm_outbox *o)
{
    pthread_mutex_lock(&o->lock);
    o->unbounded = true;
    pthread_cond_broadcast(&o->writable);
    pthread_mutex_unlock(&o->lock);
}

void tm_outbox_end(tm_outbox *o, tm_status end)
{
    pthread_mutex_lock(&o->lock);
    if (o->end == TM_OK)
        o->end = end;
    pthread_cond_broadcast(&o->readable);
    pthread_mutex_unlock(&o->lock);
}
