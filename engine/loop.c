/* The engine thread: it admits requests, takes a turn of the steps (steps.c), and hands out what happened.
 *
 * Nothing here polls: with no work the thread sleeps on the inbox, with an unread queue of events it sleeps on
 * the outbox. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "engine/engine_impl.h"

static void add_finished(tm_engine *e, uint64_t id, tm_finish finish, tm_status status)
{
    tm_event *ev = tm_events_add(&e->events, TM_EVENT_FINISHED, id);
    ev->finish = finish;
    ev->status = status;
}

/* The request is told its end and forgotten. The id is free again before the reader can see the event. */
void tm_engine_finish(tm_engine *e, tm_live *l, tm_finish finish, tm_status status)
{
    add_finished(e, l->id, finish, status);
    pthread_mutex_lock(&e->inbox.lock);
    tm_inbox_remove(&e->inbox, l);
    e->inbox.stats.finished++;
    pthread_mutex_unlock(&e->inbox.lock);
    tm_live_destroy(l);
}

/* A continued request that was complete already: nothing to compute. */
static bool finish_complete(tm_engine *e, tm_live *l)
{
    tm_seq_end end = tm_seq_ended(l->seq);
    if (end == TM_SEQ_GOES_ON)
        return false;
    tm_event *ev = tm_events_add(&e->events, TM_EVENT_ADMITTED, l->id);
    ev->prompt_tokens = l->seq->n_prompt;
    tm_engine_finish(e, l, end == TM_SEQ_END_STOP ? TM_FINISH_STOP : TM_FINISH_LENGTH, TM_OK);
    return true;
}

void tm_engine_copy_stats(tm_engine *e)
{
    tm_sched_stats s;
    tm_sched_stats_get(e->sched, &s);
    tm_engine_stats *st = &e->inbox.stats;
    st->running = s.running;
    st->waiting = s.waiting;
    st->waiting_tokens = s.waiting_tokens;
    st->blocks_total = s.blocks_total;
    st->blocks_used = s.blocks_used;
    st->blocks_cached = s.blocks_cached;
    st->preemptions = s.preemptions;
    e->inbox.waiting = s.waiting - s.preempted_waiting;
}

/* Sleeps until there is something to do, then takes the new requests. False when the engine stops. */
static bool collect(tm_engine *e, tm_live **arrived, bool *cancels)
{
    tm_inbox *in = &e->inbox;
    bool idle = tm_sched_any(e->sched) == NULL && e->in_flight == 0;
    pthread_mutex_lock(&in->lock);
    while (idle && !in->first && !in->cancels && !in->stop) {
        in->progress_ms = 0;
        pthread_cond_wait(&in->work, &in->lock);
    }
    if (in->progress_ms == 0)
        in->progress_ms = tm_clock_ms();
    *arrived = in->first;
    *cancels = in->cancels;
    in->waiting += in->count; /* they stay counted while they move to the scheduler */
    in->stats.waiting += in->count;
    in->count = 0;
    in->first = in->last = NULL;
    in->cancels = false;
    bool stop = in->stop;
    pthread_mutex_unlock(&in->lock);
    return !stop;
}

static void cancel_marked(tm_engine *e)
{
    tm_inbox *in = &e->inbox;
    for (;;) {
        pthread_mutex_lock(&in->lock);
        tm_live *l = in->all;
        while (l && (!l->cancel || l->seq->state == TM_SEQ_NEW))
            l = l->next;
        pthread_mutex_unlock(&in->lock);
        if (!l)
            return;
        tm_sched_cancel(e->sched, l->seq);
        tm_engine_finish(e, l, TM_FINISH_CANCELLED, TM_OK);
    }
}

static bool admit(tm_engine *e)
{
    tm_live *arrived;
    bool cancels;
    bool goes_on = collect(e, &arrived, &cancels);
    while (arrived) {
        tm_live *l = arrived;
        arrived = l->inbox_next;
        if (finish_complete(e, l))
            continue;
        /* The bound was checked by tm_engine_submit under the inbox lock. */
        TM_ASSERT(tm_sched_submit(e->sched, l->seq, NULL) == TM_OK);
    }
    if (cancels)
        cancel_marked(e);
    return goes_on;
}

/* Every request that is still here gets its end; from now on none is accepted. */
static void finish_all(tm_engine *e, tm_finish finish, tm_status status)
{
    for (;;) {
        pthread_mutex_lock(&e->inbox.lock);
        tm_live *l = e->inbox.all;
        pthread_mutex_unlock(&e->inbox.lock);
        if (!l)
            break;
        if (l->seq->state != TM_SEQ_NEW)
            tm_sched_cancel(e->sched, l->seq);
        tm_engine_finish(e, l, finish, status);
    }
    pthread_mutex_lock(&e->inbox.lock);
    e->inbox.first = e->inbox.last = NULL;
    e->inbox.count = 0;
    tm_engine_copy_stats(e);
    e->inbox.progress_ms = 0;
    pthread_mutex_unlock(&e->inbox.lock);
}

static void end_orderly(tm_engine *e)
{
    finish_all(e, TM_FINISH_CANCELLED, TM_OK);
    tm_plan_stop(&e->plan, e->step + 1);
    size_t len = e->plan.len;
    if (tm_comm_bcast(e->comm, e->plan.data, &len, e->plan.cap) != TM_OK)
        tm_log(TM_LOG_WARN, "engine", "the other ranks were not told to stop: the group is lost");
    if (tm_engine_collect(e) != TM_OK)
        tm_log(TM_LOG_WARN, "engine", "the last step did not end: the device is lost");
    tm_outbox_put(&e->outbox, &e->events, e->step);
    tm_outbox_end(&e->outbox, TM_STATUS_CLOSED);
}

static void end_lost(tm_engine *e, const tm_err *err)
{
    tm_log(TM_LOG_ERROR, "group_lost", "%s", err->msg);
    pthread_mutex_lock(&e->inbox.lock);
    e->inbox.lost = true;
    pthread_mutex_unlock(&e->inbox.lock);
    finish_all(e, TM_FINISH_ERROR, TM_STATUS_UNAVAILABLE);
    tm_outbox_put(&e->outbox, &e->events, e->step);
    tm_outbox_end(&e->outbox, TM_STATUS_UNAVAILABLE);
}

void *tm_engine_main(void *engine)
{
    tm_engine *e = engine;
    tm_err err = TM_ERR_INIT;
    tm_status st = TM_OK;
    while (st == TM_OK && admit(e)) {
        st = tm_engine_turn(e, &err);
        if (st == TM_OK)
            tm_outbox_put(&e->outbox, &e->events, e->step);
    }
    if (st == TM_OK)
        end_orderly(e);
    else
        end_lost(e, &err);
    return NULL;
}
