/* The engine's face: open, submit, cancel, wait, statistics, stop, and the followers' loop.
 *
 * Submitting threads do their own checking and hashing (requests.c), then hold the inbox lock for a few
 * pointer writes; the engine thread (loop.c) never waits for them. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "engine/engine_impl.h"

tm_engine_opts tm_engine_opts_default(void)
{
    return (tm_engine_opts){
        .model = {.dtype = "auto", .backend = "cpu", .device = {.isa = "auto"}, .block_tokens = 64},
        .max_batch_size = 128,
        .queue_max = 1024,
        .cache_max_entry_count = 0.8,
        .cache_bytes_max = (int64_t)1 << 30,
        .enable_prefix_caching = true,
    };
}

tm_status tm_engine_open(tm_engine **out, const tm_engine_opts *opts, tm_comm *comm, tm_err *err)
{
    tm_engine *e = calloc(1, sizeof(*e));
    if (!e)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for an engine");
    e->opts = *opts;
    e->comm = comm;
    tm_status st = tm_engine_build(e, err);
    if (st == TM_OK && tm_comm_rank(comm) == 0) {
        if (pthread_create(&e->thread, NULL, tm_engine_main, e) == 0)
            e->thread_runs = true;
        else
            st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start the engine thread");
    }
    if (st != TM_OK) {
        tm_engine_close(e);
        return st;
    }
    *out = e;
    return TM_OK;
}

void tm_engine_stop(tm_engine *e)
{
    if (!e->thread_runs)
        return;
    pthread_mutex_lock(&e->inbox.lock);
    e->inbox.stop = true;
    pthread_cond_signal(&e->inbox.work);
    pthread_mutex_unlock(&e->inbox.lock);
    tm_outbox_unbound(&e->outbox);
    pthread_join(e->thread, NULL);
    e->thread_runs = false;
}

void tm_engine_close(tm_engine *e)
{
    if (!e)
        return;
    tm_engine_stop(e);
    if (e->watchdog) /* the last part of rank 0 to be opened: the outbox exists */
        tm_outbox_deinit(&e->outbox);
    tm_engine_unbuild(e);
    free(e);
}

const tm_engine_info *tm_engine_info_get(const tm_engine *e)
{
    return &e->info;
}

static tm_status end_all(tm_engine *e)
{
    while (tm_model_in_flight(e->model) > 0)
        TM_TRY(tm_model_end(e->model, NULL));
    return TM_OK;
}

/* What rank 0 does with the same plan, in the same order: the next step is enqueued before the one in front has ended. */
static tm_status follow_plan(tm_engine *e, tm_plan_kind kind, const tm_batch *batch)
{
    if (kind == TM_PLAN_STEP)
        return tm_model_forward(e->model, batch, NULL);
    if (kind != TM_PLAN_PICK && kind != TM_PLAN_SAMPLE)
        return end_all(e);
    TM_TRY(kind == TM_PLAN_PICK ? tm_model_begin(e->model, batch)
                                : tm_model_begin_sample(e->model, batch, NULL));
    return tm_model_in_flight(e->model) == TM_MODEL_FLIGHTS ? tm_model_end(e->model, NULL) : TM_OK;
}

tm_status tm_engine_follow(tm_engine *e, tm_err *err)
{
    for (;;) {
        size_t len = 0;
        tm_status st = tm_comm_bcast(e->comm, e->plan.data, &len, e->plan.cap);
        if (st != TM_OK)
            return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "rank %d: no plan from rank 0 (%s)",
                           tm_comm_rank(e->comm), tm_status_name(st));
        tm_plan_kind kind;
        uint64_t step;
        tm_batch batch;
        TM_TRY(tm_plan_parse(&e->plan, len, &kind, &step, &batch, err));
        if (step != e->step + (kind != TM_PLAN_DRAIN))
            return TM_FAIL(err, TM_STATUS_INTERNAL, "rank %d: plan %llu came after step %llu",
                           tm_comm_rank(e->comm), (unsigned long long)step,
                           (unsigned long long)e->step);
        e->step = step;
        st = follow_plan(e, kind, &batch);
        if (st == TM_OK && kind == TM_PLAN_STOP)
            return TM_OK;
        if (st != TM_OK)
            return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "rank %d: step %llu failed (%s)",
                           tm_comm_rank(e->comm), (unsigned long long)step, tm_status_name(st));
    }
}

/* Under the inbox lock. */
static tm_status may_enter(const tm_engine *e, uint64_t id, tm_err *err)
{
    const tm_inbox *in = &e->inbox;
    if (in->stop)
        return TM_FAIL(err, TM_STATUS_CLOSED, "the engine is closed");
    if (in->lost)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the group is lost");
    if (in->count + in->waiting >= e->info.queue_max)
        return TM_FAIL(err, TM_STATUS_BUSY, "%d requests are waiting already", e->info.queue_max);
    if (tm_inbox_find(in, id))
        return TM_FAIL(err, TM_STATUS_INVALID, "request id %llu is in use", (unsigned long long)id);
    return TM_OK;
}

tm_status tm_engine_submit(tm_engine *e, const tm_request *r, tm_err *err)
{
    tm_inbox *in = &e->inbox;
    tm_live *l = NULL;
    /* First without the work: a full engine refuses quickly. */
    pthread_mutex_lock(&in->lock);
    tm_status st = may_enter(e, r->id, err);
    pthread_mutex_unlock(&in->lock);
    if (st == TM_OK)
        st = tm_live_create(e, r, &l, err);
    if (st != TM_OK)
        return st;
    pthread_mutex_lock(&in->lock);
    st = may_enter(e, r->id, err);
    if (st == TM_OK) {
        tm_inbox_insert(in, l);
        pthread_cond_signal(&in->work);
    }
    pthread_mutex_unlock(&in->lock);
    if (st != TM_OK)
        tm_live_destroy(l);
    return st;
}

void tm_engine_cancel(tm_engine *e, uint64_t id)
{
    tm_inbox *in = &e->inbox;
    pthread_mutex_lock(&in->lock);
    tm_live *l = tm_inbox_find(in, id);
    if (l) {
        l->cancel = true;
        in->cancels = true;
        pthread_cond_signal(&in->work);
    }
    pthread_mutex_unlock(&in->lock);
}

tm_status tm_engine_wait(tm_engine *e, int64_t timeout_ms, tm_step_events **out)
{
    return tm_outbox_take(&e->outbox, timeout_ms, out);
}

void tm_engine_wake(tm_engine *e)
{
    tm_outbox_wake(&e->outbox);
}

void tm_engine_stats_get(tm_engine *e, tm_engine_stats *out)
{
    pthread_mutex_lock(&e->inbox.lock);
    *out = e->inbox.stats;
    out->waiting += e->inbox.count;
    int64_t since = e->inbox.progress_ms;
    pthread_mutex_unlock(&e->inbox.lock);
    int64_t age = since ? tm_clock_ms() - since : 0;
    out->step_age_ms = age > 0 ? age : 0;
}

tm_status tm_engine_profile(tm_engine *e, tm_profile_row *rows, int max, int *count)
{
    return tm_model_profile(e->model, rows, max, count);
}
