/* The sample phase of a step: logits rows into tokens and events.
 *
 * Prompt rows come before the row that gives the next token, and both may be the same one: it is reported
 * first, because drawing may change it. */
#include <string.h>

#include "common/log.h"
#include "engine/engine_impl.h"

static void add_tops(tm_events *ev, size_t at, const tm_logprobs *lp)
{
    int32_t first = (int32_t)ev->tops_count;
    for (int i = 0; i < lp->top_count; i++)
        tm_events_add_top(ev, lp->top_ids[i], lp->top_logprobs[i]);
    tm_event *e = &ev->events[at];
    e->logprob = lp->logprob;
    e->top_first = first;
    e->top_count = lp->top_count;
}

/* What the row at prompt position pos says: the log-probability of the next prompt token, and the row itself. */
static tm_status report_prompt_row(tm_engine *e, const tm_live *l, int32_t pos, const float *row)
{
    const tm_seq *seq = l->seq;
    if (l->prompt_logprobs >= 0 && pos + 1 < seq->n_prompt) {
        tm_logprobs lp;
        int32_t next = seq->tokens[pos + 1];
        tm_status st = tm_logprobs_of(e->space, row, next, l->prompt_logprobs, &lp);
        if (st != TM_OK)
            return st;
        tm_event *ev = tm_events_add(&e->events, TM_EVENT_PROMPT_LOGPROB, l->id);
        ev->pos = pos + 1;
        ev->token = next;
        add_tops(&e->events, e->events.count - 1, &lp);
    }
    if (pos >= seq->n_prompt - l->logits_last) {
        size_t at = tm_events_add_logits(&e->events, row, e->info.model.vocab);
        tm_event *ev = tm_events_add(&e->events, TM_EVENT_LOGITS, l->id);
        ev->pos = pos;
        ev->logits_at = at;
    }
    return TM_OK;
}

static tm_status draw_token(tm_engine *e, const tm_step_seq *s, bool picks, int32_t *token)
{
    tm_live *l = s->seq->user;
    int index = s->sample_logit, position = s->position;
    float *row = e->logits + (size_t)index * (size_t)e->info.model.vocab;
    tm_logprobs lp = {0};
    tm_status st = TM_OK;
    if (!picks)
        st = tm_sampler_draw(l->sampler, e->space, row, position, token, &lp);
    else if (e->picked[index] < 0)
        st = TM_STATUS_INTERNAL;
    else
        *token = e->picked[index];
    if (st == TM_OK && picks && l->logprobs >= 0)
        tm_logprobs_of_detail(e->space, &tm_model_details(e->model)[index], &lp);
    if (st == TM_OK)
        st = tm_sampler_accept(l->sampler, *token);
    if (st != TM_OK)
        return st;
    tm_event *ev = tm_events_add(&e->events, TM_EVENT_TOKEN, l->id);
    ev->pos = position;
    ev->token = *token;
    if (l->logprobs >= 0)
        add_tops(&e->events, e->events.count - 1, &lp);
    return TM_OK;
}

static tm_status sample_seq(tm_engine *e, const tm_step_seq *s, bool picks, int32_t *token)
{
    tm_live *l = s->seq->user;
    size_t vocab = (size_t)e->info.model.vocab;
    if (s->first) {
        tm_event *ev = tm_events_add(&e->events, TM_EVENT_ADMITTED, l->id);
        ev->prompt_tokens = s->seq->n_prompt;
        ev->cached_tokens = s->seq->cached_tokens;
    }
    for (int i = 0; i < s->prompt_rows; i++) {
        const float *row = e->logits + (size_t)(s->first_logit + i) * vocab;
        tm_status st = report_prompt_row(e, l, s->prompt_pos + i, row);
        if (st != TM_OK)
            return st;
    }
    *token = TM_SAMPLED_NONE;
    if (s->sample_logit < 0)
        return TM_OK;
    return draw_token(e, s, picks, token);
}

static bool takes_best(const tm_step *step)
{
    for (int i = 0; i < step->n_seqs; i++) {
        const tm_step_seq *s = &step->seqs[i];
        const tm_live *l = s->seq ? s->seq->user : NULL;
        if (l && s->sample_logit >= 0 && !tm_sampler_takes_best(l->sampler, s->position))
            return false;
    }
    return true;
}

/* A row whose sequence has left takes whatever is largest. */
static tm_choice fill_draws(tm_engine *e, const tm_step *step)
{
    int edits = 0, room = tm_model_edits_max(e->model);
    memset(e->draw_rows, 0, (size_t)step->n_seqs * sizeof(*e->draw_rows));
    e->draws = (tm_sample_set){.rows = e->draw_rows, .edits = e->draw_edits};
    for (int i = 0; i < step->n_seqs; i++) {
        const tm_step_seq *s = &step->seqs[i];
        const tm_live *l = s->seq ? s->seq->user : NULL;
        if (!l || s->sample_logit < 0)
            continue;
        if (!tm_sampler_knows(l->sampler, s->position))
            return TM_CHOICE_LATER;
        if (!tm_sampler_device_row(l->sampler, s->position, &e->draw_rows[s->sample_logit],
                                   e->draw_edits, room, &edits))
            return TM_CHOICE_HOST;
        e->draws.details |= l->logprobs >= 0;
    }
    e->draws.n_edits = edits;
    return TM_CHOICE_DRAWN;
}

tm_choice tm_engine_choice(tm_engine *e, const tm_step *step)
{
    if (!tm_model_can_pick(e->model))
        return TM_CHOICE_HOST;
    for (int i = 0; i < step->n_seqs; i++)
        if (step->seqs[i].prompt_rows > 0)
            return TM_CHOICE_HOST;
    if (takes_best(step))
        return TM_CHOICE_BEST;
    return tm_model_can_sample(e->model) ? fill_draws(e, step) : TM_CHOICE_HOST;
}

void tm_engine_sample(tm_engine *e, const tm_step *step, bool picks)
{
    for (int i = 0; i < step->n_seqs; i++) {
        e->failures[i] = TM_OK;
        e->sampled[i] = TM_SAMPLED_NONE;
        if (!step->seqs[i].seq) /* it has left meanwhile */
            continue;
        e->failures[i] = sample_seq(e, &step->seqs[i], picks, &e->sampled[i]);
        if (e->failures[i] == TM_OK)
            continue;
        e->sampled[i] = TM_SAMPLED_FAILED;
        if (e->failures[i] == TM_STATUS_INTERNAL)
            tm_log(TM_LOG_ERROR, "logits",
                   "a request ends: the model's logits are not finite (broken weights?)");
    }
}
