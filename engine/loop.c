/* The engine thread: admit -> plan -> broadcast -> forward -> sample -> retire, one step after the other.
 *
 * Nothing here polls: with no work the thread sleeps on the inbox, with an unread queue of events it sleeps on
 * the outbox. On the CPU the forward phase is synchronous; the phases are separate functions so that a device
 * can run step n while step n+1 is planned. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "engine/engine_impl.h"

/* Weight of a new value in the moving averages. */
#define AVERAGE 0.1f

static void add_finished(tm_engine *e, uint64_t id, tm_finish finish, tm_status status)
{
    tm_event *ev = tm_events_add(&e->events, TM_EVENT_FINISHED, id);
    ev->finish = finish;
    ev->status = status;
}

/* The request is told its end and forgotten. The id is free again before the reader can see the event. */
static void finish_live(tm_engine *e, tm_live *l, tm_finish finish, tm_status status)
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
    finish_live(e, l, end == TM_SEQ_END_STOP ? TM_FINISH_STOP : TM_FINISH_LENGTH, TM_OK);
    return true;
}

/* Under the inbox lock. */
static void copy_stats(tm_engine *e)
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
    bool idle = tm_sched_any(e->sched) == NULL;
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
        finish_live(e, l, TM_FINISH_CANCELLED, TM_OK);
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

/* What was admitted no longer counts as waiting while its first step runs. */
static void plan(tm_engine *e, tm_step *step)
{
    tm_sched_plan(e->sched, e->step + 1, &e->plan, step);
    pthread_mutex_lock(&e->inbox.lock);
    copy_stats(e);
    pthread_mutex_unlock(&e->inbox.lock);
}

/* Every rank computes the same flat plan; rank 0 reads its own the same way the others do. */
static tm_status broadcast(tm_engine *e, tm_batch *batch, tm_err *err)
{
    size_t len = e->plan.len;
    tm_status st = tm_comm_bcast(e->comm, e->plan.data, &len, e->plan.cap);
    if (st != TM_OK)
        return TM_FAIL(err, st, "the plan of step %llu did not reach every rank",
                       (unsigned long long)e->step);
    tm_plan_kind kind;
    uint64_t step;
    return tm_plan_parse(&e->plan, len, &kind, &step, batch, err);
}

static tm_status forward(tm_engine *e, const tm_batch *batch, tm_err *err)
{
    tm_status st =
        e->picks ? tm_model_begin(e->model, batch) : tm_model_forward(e->model, batch, e->logits);
    if (st == TM_OK && e->picks)
        st = tm_model_end(e->model, e->picked);
    if (st != TM_OK)
        return TM_FAIL(err, st, "step %llu failed in the model (%s)", (unsigned long long)e->step,
                       tm_status_name(st));
    return TM_OK;
}

static void retire(tm_engine *e, tm_step *step)
{
    tm_sched_retire(e->sched, step, e->sampled);
    for (int i = 0; i < step->n_seqs; i++) {
        tm_step_seq *s = &step->seqs[i];
        if (s->failed)
            finish_live(e, s->seq->user, TM_FINISH_ERROR, e->failures[i]);
        else if (s->end != TM_SEQ_GOES_ON)
            finish_live(e, s->seq->user,
                        s->end == TM_SEQ_END_STOP ? TM_FINISH_STOP : TM_FINISH_LENGTH, TM_OK);
    }
}

static void average(float *avg, double value)
{
    *avg = *avg == 0.0f ? (float)value : *avg + AVERAGE * ((float)value - *avg);
}

/* Counts taken before retire, which forgets finished sequences. */
typedef struct step_counts {
    uint64_t prompt, cached, sampled;
    int prefill, tokens;
} step_counts;

static step_counts count_step(const tm_engine *e, const tm_step *step)
{
    step_counts c = {.prefill = step->n_prefill_tokens, .tokens = step->n_tokens};
    for (int i = 0; i < step->n_seqs; i++) {
        const tm_step_seq *s = &step->seqs[i];
        c.prompt += s->first ? (uint64_t)s->seq->n_prompt : 0;
        c.cached += s->first ? (uint64_t)s->seq->cached_tokens : 0;
        c.sampled += e->sampled[i] >= 0;
    }
    return c;
}

/* A step's rate counts for prefill when most of its tokens are prompts, else for decode. */
static void publish_stats(tm_engine *e, const step_counts *c, int64_t begun_ns)
{
    int64_t now_ns = tm_clock_ns();
    double s = (double)(now_ns - begun_ns + 1) * 1e-9;
    pthread_mutex_lock(&e->inbox.lock);
    tm_engine_stats *st = &e->inbox.stats;
    st->steps = e->step;
    st->prompt_tokens += c->prompt;
    st->cached_tokens += c->cached;
    st->generated_tokens += c->sampled;
    average(&st->step_ms, s * 1e3);
    if (2 * c->prefill > c->tokens)
        average(&st->prefill_tps, c->prefill / s);
    else
        average(&st->decode_tps, (double)c->sampled / s);
    copy_stats(e);
    e->inbox.progress_ms = now_ns / 1000000;
    pthread_mutex_unlock(&e->inbox.lock);
}

static tm_status run_step(tm_engine *e, tm_err *err)
{
    tm_step step;
    tm_batch batch;
    int64_t begun_ns = tm_clock_ns();
    plan(e, &step);
    if (step.n_tokens == 0)
        return TM_OK;
    e->step++;
    e->picks = tm_engine_takes_best(e, &step);
    if (e->picks)
        tm_plan_pick(&e->plan);
    tm_watchdog_begin(e->watchdog, step.n_tokens);
    tm_status st = broadcast(e, &batch, err);
    if (st == TM_OK)
        st = forward(e, &batch, err);
    if (st == TM_OK)
        tm_engine_sample(e, &step);
    tm_watchdog_end(e->watchdog);
    if (st != TM_OK)
        return st;
    step_counts counts = count_step(e, &step);
    retire(e, &step);
    publish_stats(e, &counts, begun_ns);
    return TM_OK;
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
        finish_live(e, l, finish, status);
    }
    pthread_mutex_lock(&e->inbox.lock);
    e->inbox.first = e->inbox.last = NULL;
    e->inbox.count = 0;
    copy_stats(e);
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
        st = run_step(e, &err);
        if (st == TM_OK)
            tm_outbox_put(&e->outbox, &e->events, e->step);
    }
    if (st == TM_OK)
        end_orderly(e);
    else
        end_lost(e, &err);
    return NULL;
}
