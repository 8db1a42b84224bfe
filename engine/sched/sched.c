/* The scheduler's state: lists, admission to the queue, cancelling, and retiring a step.
 *
 * Running sequences are an array in rank order (at most max_seqs, walked every step); waiting ones are a
 * list in rank order, inserted from the end because arrivals of one priority are already in order. Planning
 * is in sched_plan.c. */
#include "engine/sched/sched.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "engine/sched/sched_impl.h"

tm_status tm_sched_create(tm_sched **out, const tm_sched_opts *o, tm_err *err)
{
    if (o->max_seqs < 1 || o->max_step_tokens < 1 || o->queue_max < 1 || o->max_prompt_rows < 1)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "a scheduler for %d sequences, %d tokens, a queue of %d, %d prompt rows",
                       o->max_seqs, o->max_step_tokens, o->queue_max, o->max_prompt_rows);
    tm_sched *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a scheduler");
    tm_status st;
    s->opts = *o;
    s->running = calloc((size_t)o->max_seqs, sizeof(*s->running));
    for (int i = 0; i < TM_SCHED_FLIGHTS; i++)
        s->step_seqs[i] = calloc((size_t)o->max_seqs, sizeof(*s->step_seqs[i]));
    if (!s->running || !s->step_seqs[0] || !s->step_seqs[1]) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for %d sequences", o->max_seqs);
        goto fail;
    }
    TM_TRY_GOTO(tm_block_pool_create(&s->pool, o->n_blocks, err), fail);
    TM_TRY_GOTO(tm_prefix_tree_create(&s->tree, s->pool, o->block_tokens, err), fail);
    *out = s;
    return TM_OK;

fail:
    tm_sched_destroy(s);
    return st;
}

void tm_sched_destroy(tm_sched *s)
{
    if (!s)
        return;
    tm_prefix_tree_destroy(s->tree);
    tm_block_pool_destroy(s->pool);
    free(s->running);
    for (int i = 0; i < TM_SCHED_FLIGHTS; i++)
        free(s->step_seqs[i]);
    free(s);
}

static void wait_insert(tm_sched *s, tm_seq *seq)
{
    tm_seq *after = s->wait_last;
    while (after && tm_sched_before(seq, after))
        after = after->prev;
    seq->prev = after;
    seq->next = after ? after->next : s->wait_first;
    if (seq->next)
        seq->next->prev = seq;
    else
        s->wait_last = seq;
    if (after)
        after->next = seq;
    else
        s->wait_first = seq;
    s->n_waiting++;
    s->n_preempted += seq->admitted;
    seq->state = TM_SEQ_WAITING;
}

static void wait_remove(tm_sched *s, tm_seq *seq)
{
    if (seq->prev)
        seq->prev->next = seq->next;
    else
        s->wait_first = seq->next;
    if (seq->next)
        seq->next->prev = seq->prev;
    else
        s->wait_last = seq->prev;
    seq->prev = seq->next = NULL;
    s->n_waiting--;
    s->n_preempted -= seq->admitted;
}

static void running_remove(tm_sched *s, tm_seq *seq)
{
    int i = 0;
    while (i < s->n_running && s->running[i] != seq)
        i++;
    TM_ASSERT(i < s->n_running);
    s->n_running--;
    memmove(&s->running[i], &s->running[i + 1], (size_t)(s->n_running - i) * sizeof(*s->running));
}

tm_status tm_sched_submit(tm_sched *s, tm_seq *seq, tm_err *err)
{
    TM_ASSERT(seq->state == TM_SEQ_NEW && seq->block_tokens == s->opts.block_tokens);
    TM_ASSERT((int64_t)seq->max_len <= (int64_t)s->opts.n_blocks * s->opts.block_tokens);
    if (s->n_waiting - s->n_preempted >= s->opts.queue_max)
        return TM_FAIL(err, TM_STATUS_BUSY, "%d requests are waiting already", s->opts.queue_max);
    seq->rank = (int64_t)seq->priority * TM_SCHED_AGE_STEPS - (int64_t)s->steps;
    seq->order = s->arrivals++;
    s->pending += seq->n_tokens;
    wait_insert(s, seq);
    return TM_OK;
}

void tm_sched_drop_blocks(tm_sched *s, tm_seq *seq)
{
    while (seq->n_blocks > 0)
        tm_prefix_tree_release(s->tree, seq->blocks[--seq->n_blocks]);
    seq->n_published = 0;
}

void tm_sched_preempt(tm_sched *s, tm_seq *seq)
{
    running_remove(s, seq);
    tm_sched_drop_blocks(s, seq);
    s->pending += seq->n_computed;
    seq->n_computed = 0;
    s->preemptions++;
    wait_insert(s, seq);
}

void tm_sched_start(tm_sched *s, tm_seq *seq)
{
    TM_ASSERT(s->n_running < s->opts.max_seqs);
    wait_remove(s, seq);
    int i = s->n_running++;
    for (; i > 0 && tm_sched_before(seq, s->running[i - 1]); i--)
        s->running[i] = s->running[i - 1];
    s->running[i] = seq;
    s->pending -= seq->n_computed;
    seq->state = TM_SEQ_RUNNING;
}

/* The sequence leaves the scheduler, and what steps in flight compute of it is dropped. */
static void forget(tm_sched *s, tm_seq *seq)
{
    for (int f = 0; f < s->in_flight; f++)
        for (int i = 0; i < s->flights[f].n_seqs; i++)
            if (s->flights[f].seqs[i].seq == seq)
                s->flights[f].seqs[i].seq = NULL;
    if (seq->state == TM_SEQ_WAITING)
        wait_remove(s, seq);
    if (seq->state == TM_SEQ_RUNNING)
        running_remove(s, seq);
    tm_sched_drop_blocks(s, seq);
    s->pending -= seq->n_tokens - seq->n_computed;
    seq->state = TM_SEQ_DONE;
}

void tm_sched_cancel(tm_sched *s, tm_seq *seq)
{
    TM_ASSERT(seq->state == TM_SEQ_WAITING || seq->state == TM_SEQ_RUNNING);
    forget(s, seq);
}

tm_seq *tm_sched_any(const tm_sched *s)
{
    return s->n_running ? s->running[0] : s->wait_first;
}

/* Full blocks that are computed now go into the tree. When another sequence was first with the same
 * contents, its block is used from now on and the own one freed. */
static void publish(tm_sched *s, tm_seq *seq)
{
    while (seq->n_published < seq->n_keys &&
           (seq->n_published + 1) * seq->block_tokens <= seq->n_computed) {
        int i = seq->n_published++;
        tm_prefix_node node = {.parent = i ? seq->blocks[i - 1] : -1,
                               .salt = seq->salt,
                               .key = &seq->keys[i],
                               .tokens = seq->tokens + i * seq->block_tokens};
        int32_t own = seq->blocks[i], held = tm_prefix_tree_insert(s->tree, &node, own);
        if (held != own) {
            tm_block_pool_acquire(s->pool, held);
            seq->blocks[i] = held;
            tm_prefix_tree_release(s->tree, own);
        }
    }
}

static void advance_one(tm_sched *s, tm_step_seq *e)
{
    tm_seq *seq = e->seq;
    seq->n_computed += e->rows;
    s->pending -= e->rows;
    seq->rows_next += e->prompt_rows;
    publish(s, seq);
    e->complete = seq->max_tokens == 0 && seq->n_computed == seq->n_tokens;
    if (e->sample_logit >= 0) {
        tm_seq_await(seq, e->sample_logit);
        s->pending++;
    }
}

void tm_sched_advance(tm_sched *s, tm_step *step)
{
    tm_sched_flight *f = &s->flights[s->in_flight - 1];
    TM_ASSERT(s->in_flight > 0 && f->seqs == step->seqs && !f->advanced);
    f->advanced = true;
    for (int i = 0; i < step->n_seqs; i++)
        if (step->seqs[i].seq)
            advance_one(s, &step->seqs[i]);
}

static void retire_one(tm_sched *s, tm_step_seq *e, int32_t token)
{
    e->failed = token == TM_SAMPLED_FAILED;
    if (e->sample_logit >= 0 && !e->failed) {
        tm_seq_settle(e->seq, token);
        e->end = tm_seq_ended(e->seq);
    } else if (e->complete) {
        e->end = TM_SEQ_END_LENGTH;
    }
    if (e->failed || e->end != TM_SEQ_GOES_ON)
        forget(s, e->seq);
}

void tm_sched_retire(tm_sched *s, tm_step *step, const int32_t *sampled)
{
    TM_ASSERT(s->in_flight > 0 && s->flights[0].seqs == step->seqs);
    if (!s->flights[0].advanced)
        tm_sched_advance(s, step);
    s->flights[0] = s->flights[1];
    s->in_flight--; /* from here on forget leaves its entries alone */
    for (int i = 0; i < step->n_seqs; i++)
        if (step->seqs[i].seq)
            retire_one(s, &step->seqs[i], sampled[i]);
}

void tm_sched_stats_get(const tm_sched *s, tm_sched_stats *out)
{
    int reusable = tm_block_pool_reusable(s->pool);
    *out = (tm_sched_stats){
        .running = s->n_running,
        .waiting = s->n_waiting,
        .preempted_waiting = s->n_preempted,
        /* One that ends with the step in flight has no token left. */
        .waiting_tokens = TM_MAX(s->pending - s->n_running, (int64_t)0),
        .blocks_total = s->opts.n_blocks,
        .blocks_used = s->opts.n_blocks - tm_block_pool_free(s->pool) - reusable,
        .blocks_cached = reusable,
        .preemptions = s->preemptions,
    };
}
