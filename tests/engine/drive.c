/* Event checks shared by the engine's tests. */
#include "tests/engine/drive.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <string.h>

#include <cmocka.h>

tm_status drive_submit(tm_engine *e, tm_request *r, answer *a, tm_err *err)
{
    memset(a, 0, sizeof(*a));
    a->id = r->id;
    a->first_pos = (int)r->generated_len;
    a->next_prompt_pos = 1;
    a->first_logits_pos = -1;
    return tm_engine_submit(e, r, err);
}

static void apply_logits(const tm_step_events *ev, const tm_event *x, answer *a, int vocab)
{
    const float *row = ev->logits + x->logits_at;
    int best = 0;
    for (int i = 1; i < vocab; i++)
        best = row[i] > row[best] ? i : best;
    if (a->n_logits == 0)
        a->first_logits_pos = x->pos;
    assert_int_equal(x->pos, a->first_logits_pos + a->n_logits);
    a->logits_argmax[a->n_logits++] = best;
}

static void apply_one(const tm_step_events *ev, const tm_event *x, answer *a, int vocab)
{
    assert_false(a->finished);
    assert_true(a->admitted || x->kind == TM_EVENT_ADMITTED || x->kind == TM_EVENT_FINISHED);
    a->tops += x->top_count;
    switch (x->kind) {
    case TM_EVENT_ADMITTED:
        assert_false(a->admitted);
        a->admitted = true;
        a->prompt_tokens = x->prompt_tokens;
        a->cached_tokens = x->cached_tokens;
        break;
    case TM_EVENT_PROMPT_LOGPROB:
        assert_int_equal(a->n, 0);
        assert_int_equal(x->pos, a->next_prompt_pos);
        assert_true(isfinite(x->logprob) && x->logprob <= 0.0f);
        a->prompt_logprobs[a->next_prompt_pos++] = x->logprob;
        break;
    case TM_EVENT_LOGITS:
        assert_int_equal(a->n, 0);
        apply_logits(ev, x, a, vocab);
        break;
    case TM_EVENT_TOKEN:
        assert_int_equal(x->pos, a->first_pos + a->n);
        assert_true(a->n < ANSWER_MAX && x->token >= 0 && x->token < vocab);
        a->logprobs[a->n] = x->logprob;
        a->tokens[a->n++] = x->token;
        break;
    case TM_EVENT_FINISHED:
        a->finished = true;
        a->finish = x->finish;
        a->status = x->status;
        break;
    }
}

void drive_apply(const tm_step_events *ev, answer **answers, int n, int vocab)
{
    assert_true(ev->count > 0);
    for (int i = 0; i < ev->count; i++) {
        answer *a = NULL;
        for (int j = 0; j < n && !a; j++)
            if (answers[j]->id == ev->events[i].request)
                a = answers[j];
        assert_non_null(a);
        apply_one(ev, &ev->events[i], a, vocab);
    }
}

static bool all_finished(answer **answers, int n)
{
    for (int i = 0; i < n; i++)
        if (!answers[i]->finished)
            return false;
    return true;
}

void drive_all(tm_engine *e, answer **answers, int n)
{
    uint64_t last = 0;
    while (!all_finished(answers, n)) {
        tm_step_events *ev;
        assert_int_equal(tm_engine_wait(e, 60000, &ev), TM_OK);
        assert_true(ev->step >= last);
        last = ev->step;
        drive_apply(ev, answers, n, tm_engine_info_get(e)->model.vocab);
        tm_engine_events_free(ev);
    }
}
