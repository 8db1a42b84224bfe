/* Steps: plan -> broadcast -> begin -> end -> sample -> retire, with the next one begun before this one has ended.
 *
 * A step of which the device chooses every token needs nothing from here to be followed: the next plan names the
 * tokens by the logits row that chooses them. So while the device computes step n, step n+1 is planned, sent to the
 * other ranks and enqueued behind it, and what step n gave is handed out while the device computes step n+1. The
 * price: a sequence that turns out to have ended takes part in one step more, whose result is dropped.
 *
 * A step of which logits are wanted here (scores, more log-probabilities than the device lists) is planned the same way,
 * but begins only when the one in front has ended, and nothing runs ahead of it. Without a device that chooses, every
 * step is one of these. So does a step with penalties begin, whose draws depend on all tokens so far. */
#include "common/check.h"
#include "common/clock.h"
#include "engine/engine_impl.h"

/* Weight of a new value in the moving averages. */
#define AVERAGE 0.1f

/* Says in the plan and in e->draws how the tokens are chosen. */
static void choose(tm_engine *e, tm_work *w)
{
    w->choice = tm_engine_choice(e, &w->step);
    if (w->choice == TM_CHOICE_BEST)
        tm_plan_pick(&e->plan);
    else if (w->choice == TM_CHOICE_DRAWN)
        tm_plan_sample(&e->plan);
}

/* The device chooses, and can begin now. */
static bool on_device(const tm_work *w)
{
    return w->choice == TM_CHOICE_BEST || w->choice == TM_CHOICE_DRAWN;
}

/* False when there is nothing to compute. What was admitted no longer counts as waiting while its first step runs. */
static bool plan(tm_engine *e, tm_work *w)
{
    w->planned_ns = tm_clock_ns();
    tm_sched_plan(e->sched, e->step + 1, &e->plan, &w->step);
    pthread_mutex_lock(&e->inbox.lock);
    tm_engine_copy_stats(e);
    pthread_mutex_unlock(&e->inbox.lock);
    if (w->step.n_tokens == 0)
        return false;
    w->number = ++e->step;
    choose(e, w);
    return true;
}

static tm_status send_plan(tm_engine *e, const tm_plan_buf *plan, uint64_t step, tm_err *err)
{
    size_t len = plan->len;
    tm_status st = tm_comm_bcast(e->comm, plan->data, &len, plan->cap);
    if (st != TM_OK)
        return TM_FAIL(err, st, "the plan of step %llu did not reach every rank",
                       (unsigned long long)step);
    return TM_OK;
}

static tm_status failed(const tm_work *w, tm_status st, tm_err *err)
{
    return TM_FAIL(err, st, "step %llu failed in the model (%s)", (unsigned long long)w->number,
                   tm_status_name(st));
}

/* Every rank computes the same flat plan; rank 0 reads its own the same way the others do. */
static tm_status begin(tm_engine *e, const tm_work *w, tm_err *err)
{
    tm_plan_kind kind;
    uint64_t number;
    tm_batch batch;
    TM_TRY(send_plan(e, &e->plan, w->number, err));
    TM_TRY(tm_plan_parse(&e->plan, e->plan.len, &kind, &number, &batch, err));
    tm_status st;
    if (w->choice == TM_CHOICE_BEST)
        st = tm_model_begin(e->model, &batch);
    else if (w->choice == TM_CHOICE_DRAWN)
        st = tm_model_begin_sample(e->model, &batch, &e->draws);
    else
        st = tm_model_forward(e->model, &batch, e->logits);
    if (st != TM_OK)
        return failed(w, st, err);
    e->in_flight += on_device(w);
    return TM_OK;
}

static void retire(tm_engine *e, tm_step *step)
{
    tm_sched_retire(e->sched, step, e->sampled);
    for (int i = 0; i < step->n_seqs; i++) {
        tm_step_seq *s = &step->seqs[i];
        if (!s->seq)
            continue;
        if (s->failed)
            tm_engine_finish(e, s->seq->user, TM_FINISH_ERROR, e->failures[i]);
        else if (s->end != TM_SEQ_GOES_ON)
            tm_engine_finish(e, s->seq->user,
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
        bool first = s->seq && s->first;
        c.prompt += first ? (uint64_t)s->seq->n_prompt : 0;
        c.cached += first ? (uint64_t)s->seq->cached_tokens : 0;
        c.sampled += e->sampled[i] >= 0;
    }
    return c;
}

/* A step's rate counts for prefill when most of its tokens are prompts, else for decode. A step that ran ahead is timed
 * from the end of the one in front. */
static void publish_stats(tm_engine *e, const tm_work *w, const step_counts *c)
{
    int64_t now_ns = tm_clock_ns();
    double s = (double)(now_ns - TM_MAX(w->planned_ns, e->ended_ns) + 1) * 1e-9;
    e->ended_ns = now_ns;
    pthread_mutex_lock(&e->inbox.lock);
    tm_engine_stats *st = &e->inbox.stats;
    st->steps = w->number;
    st->prompt_tokens += c->prompt;
    st->cached_tokens += c->cached;
    st->generated_tokens += c->sampled;
    average(&st->step_ms, s * 1e3);
    if (2 * c->prefill > c->tokens)
        average(&st->prefill_tps, c->prefill / s);
    else
        average(&st->decode_tps, (double)c->sampled / s);
    tm_engine_copy_stats(e);
    e->inbox.progress_ms = now_ns / 1000000;
    pthread_mutex_unlock(&e->inbox.lock);
}

/* The rows of a step that has ended: tokens, events, and who leaves. */
static void hand_out(tm_engine *e, tm_work *w)
{
    tm_engine_sample(e, &w->step, on_device(w));
    step_counts counts = count_step(e, &w->step);
    retire(e, &w->step);
    publish_stats(e, w, &counts);
    tm_outbox_put(&e->outbox, &e->events, w->number);
}

/* The ranks are told that nothing follows for now. */
static tm_status send_drain(tm_engine *e, uint64_t step, tm_err *err)
{
    tm_plan_drain(&e->signal, step);
    return send_plan(e, &e->signal, step, err);
}

static tm_status end_oldest(tm_engine *e, tm_err *err)
{
    tm_status st = tm_model_end(e->model, e->picked);
    if (st != TM_OK)
        return failed(&e->works[0], st, err);
    e->in_flight--;
    return TM_OK;
}

/* works[0] with nothing in flight, and nothing behind it. What it had to wait for is known now. */
static tm_status run_alone(tm_engine *e, tm_err *err)
{
    tm_work *w = &e->works[0];
    if (w->choice == TM_CHOICE_LATER)
        choose(e, w);
    tm_watchdog_begin(e->watchdog, w->step.n_tokens);
    tm_status st = begin(e, w, err);
    if (st == TM_OK && on_device(w))
        st = send_drain(e, w->number, err);
    if (st == TM_OK && on_device(w))
        st = end_oldest(e, err);
    tm_watchdog_end(e->watchdog);
    if (st == TM_OK)
        hand_out(e, w);
    return st;
}

/* The next step is planned as if the one in flight had ended, and begun where the device can go on by itself; else the
 * ranks are told that nothing follows for now. *waits: it is planned and not begun. */
static tm_status run_ahead(tm_engine *e, bool *waits, tm_err *err)
{
    tm_work *first = &e->works[0], *next = &e->works[1];
    tm_sched_advance(e->sched, &first->step);
    bool more = plan(e, next);
    *waits = more && !on_device(next);
    return more && !*waits ? begin(e, next, err) : send_drain(e, first->number, err);
}

/* works[0] is begun, if it is not yet, then the one behind it; then works[0] ends. The watchdog looks at the oldest
 * step, and only while it is waited for: events that nobody reads may hold the engine up for longer than a step may
 * take. */
static tm_status run_pair(tm_engine *e, tm_err *err)
{
    bool waits = false;
    tm_watchdog_begin(e->watchdog, e->works[0].step.n_tokens);
    tm_status st = e->in_flight > 0 ? TM_OK : begin(e, &e->works[0], err);
    if (st == TM_OK)
        st = run_ahead(e, &waits, err);
    if (st == TM_OK)
        st = end_oldest(e, err);
    tm_watchdog_end(e->watchdog);
    if (st != TM_OK)
        return st;
    tm_work next = e->works[1];
    hand_out(e, &e->works[0]);
    e->works[0] = next;
    return waits ? run_alone(e, err) : TM_OK;
}

tm_status tm_engine_turn(tm_engine *e, tm_err *err)
{
    tm_work *w = &e->works[0];
    if (e->in_flight == 0 && !plan(e, w))
        return TM_OK;
    return on_device(w) ? run_pair(e, err) : run_alone(e, err);
}

tm_status tm_engine_collect(tm_engine *e)
{
    for (; e->in_flight > 0; e->in_flight--)
        TM_TRY(tm_model_end(e->model, NULL));
    return TM_OK;
}
