/* See sched_world.h. */
#include "tests/engine/sched_world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/hash.h"
#include "tests/engine/sched_check.h"

static const int32_t model_stops[] = {MODEL_STOP};

int32_t world_next_token(const int32_t *tokens, int n)
{
    return (int32_t)(tm_hash64(tokens, (size_t)n * sizeof(*tokens), 99) % VOCAB);
}

void world_open(world *w, const tm_sched_opts *o, int max_len, bool caching)
{
    memset(w, 0, sizeof(*w));
    w->o = *o;
    w->limits = (tm_seq_limits){.max_len = TM_MIN(max_len, o->n_blocks * o->block_tokens),
                                .block_tokens = o->block_tokens,
                                .digest = "fake",
                                .stop_ids = model_stops,
                                .stop_count = 1,
                                .prefix_caching = caching};
    tm_plan_limits pl = {.max_tokens = o->max_step_tokens + o->max_seqs,
                         .max_seqs = o->max_seqs,
                         .max_blocks = o->n_blocks,
                         .max_logits = o->max_seqs + o->max_prompt_rows,
                         .vocab = VOCAB,
                         .n_blocks = o->n_blocks,
                         .block_tokens = o->block_tokens};
    assert_int_equal(tm_sched_create(&w->s, o, NULL), TM_OK);
    assert_int_equal(tm_plan_buf_init(&w->buf, &pl, NULL), TM_OK);
    w->kv = calloc((size_t)(o->n_blocks * o->block_tokens), sizeof(*w->kv));
    assert_non_null(w->kv);
    assert_true(o->max_seqs <= SEQS_MAX && o->max_seqs + o->max_prompt_rows <= LOGITS_MAX);
}

void world_close(world *w)
{
    tm_sched_stats st;
    assert_null(tm_sched_any(w->s));
    tm_sched_stats_get(w->s, &st);
    assert_int_equal(st.blocks_used, 0);
    assert_int_equal(st.running + st.waiting, 0);
    assert_int_equal(st.waiting_tokens, 0);
    sched_check(w->s);
    tm_sched_destroy(w->s);
    tm_plan_buf_deinit(&w->buf);
    free(w->kv);
}

tm_status world_submit(world *w, client *c, const tm_seq_opts *base)
{
    tm_seq_opts o = *base;
    o.prompt = c->prompt;
    o.prompt_len = (size_t)c->n_prompt;
    o.max_tokens = c->max_tokens;
    o.rows_from = c->rows_from;
    o.rows_to = c->rows_to;
    o.user = c;
    c->rows_seen = c->rows_from;
    tm_status st = tm_seq_create(&c->seq, &o, &w->limits, NULL);
    if (st != TM_OK)
        return st;
    st = tm_sched_submit(w->s, c->seq, NULL);
    if (st != TM_OK) {
        tm_seq_destroy(c->seq);
        c->seq = NULL;
        return st;
    }
    c->submitted = true;
    c->submit_step = w->step;
    /* The answer that nothing disturbed. */
    int32_t all[1024];
    memcpy(all, c->prompt, (size_t)c->n_prompt * sizeof(*all));
    int n = c->n_prompt, limit = TM_MIN(w->limits.max_len, c->n_prompt + c->max_tokens);
    c->n_expected = 0;
    while (n < limit) {
        all[n] = world_next_token(all, n);
        c->expected[c->n_expected++] = all[n++];
        bool stop = all[n - 1] == MODEL_STOP && !base->ignore_eos;
        for (size_t i = 0; i < base->stop_count; i++)
            stop |= all[n - 1] == base->stop_ids[i];
        if (stop && c->n_expected > base->min_tokens)
            break;
    }
    if (base->generated_len) {
        assert_true((int)base->generated_len <= c->n_expected);
        c->n_seen = c->n_given = (int)base->generated_len;
    }
    return TM_OK;
}

static void expect_row(const world *w, const tm_batch *b, int i, int row)
{
    int pos = b->positions[row];
    assert_true(row >= b->seq_begin[i] && row < b->seq_begin[i + 1]);
    assert_true(pos < b->kv_len[i]);
    (void)w;
}

/* The token that follows a row, from what the cache holds. */
static int32_t fake_logits(const world *w, const tm_batch *b, int i, int row)
{
    int32_t history[1024];
    const int32_t *blocks = b->blocks + i * b->max_blocks;
    expect_row(w, b, i, row);
    for (int p = 0; p <= b->positions[row]; p++) {
        const slot *s =
            &w->kv[blocks[p / w->o.block_tokens] * w->o.block_tokens + p % w->o.block_tokens];
        assert_int_equal(s->position, p);
        history[p] = s->token;
    }
    return world_next_token(history, b->positions[row] + 1);
}

void world_forward(world *w, const tm_batch *b)
{
    for (int i = 0; i < b->n_seqs; i++)
        for (int r = b->seq_begin[i]; r < b->seq_begin[i + 1]; r++) {
            int p = b->positions[r], bt = w->o.block_tokens;
            int32_t token = b->tokens[r] < 0 ? w->picks[-1 - b->tokens[r]] : b->tokens[r];
            w->kv[b->blocks[i * b->max_blocks + p / bt] * bt + p % bt] = (slot){token, p};
        }
}

/* Blocks written in this step belong to one sequence each. */
static void check_writes(const world *w, const tm_batch *b)
{
    int owner[4096];
    memset(owner, 0xff, sizeof(owner));
    assert_true(w->o.n_blocks <= 4096);
    for (int i = 0; i < b->n_seqs; i++)
        for (int p = b->positions[b->seq_begin[i]]; p < b->kv_len[i]; p++) {
            int32_t block = b->blocks[i * b->max_blocks + p / w->o.block_tokens];
            assert_true(owner[block] == -1 || owner[block] == i);
            owner[block] = i;
        }
}

static void check_budget(const world *w, const tm_step *step)
{
    int decodes = 0;
    for (int i = 0; i < step->n_seqs; i++)
        decodes += step->seqs[i].rows == 1;
    assert_int_equal(decodes, step->n_decode);
    int least = TM_MIN(w->o.block_tokens, w->o.max_step_tokens);
    int generating = step->n_tokens - step->n_prefill_tokens;
    assert_true(step->n_prefill_tokens <= TM_MAX(w->o.max_step_tokens - generating, least));
    assert_true(step->n_seqs <= w->o.max_seqs);
    assert_true(step->n_logits <= w->o.max_seqs + w->o.max_prompt_rows);
}

static void take_rows(world *w, const tm_batch *b, pending *p, int i)
{
    const tm_step_seq *e = &p->step.seqs[i];
    client *c = e->seq->user;
    for (int k = 0; k < e->prompt_rows; k++) {
        int row = b->logit_rows[e->first_logit + k];
        assert_int_equal(b->positions[row], e->prompt_pos + k);
        assert_int_equal(c->rows_seen, e->prompt_pos + k); /* each position once, in order */
        c->rows_seen++;
        assert_int_equal(fake_logits(w, b, i, row),
                         world_next_token(c->prompt, e->prompt_pos + k + 1));
    }
    p->sampled[i] = TM_SAMPLED_NONE;
    if (e->sample_logit >= 0) {
        int row = b->logit_rows[e->sample_logit];
        assert_int_equal(row, b->seq_begin[i + 1] - 1);
        p->sampled[i] = fake_logits(w, b, i, row);
    }
}

static void see_token(const tm_step_seq *e, int32_t token)
{
    client *c = e->seq->user;
    if (e->sample_logit < 0)
        return;
    assert_true(c->n_seen < c->n_expected);
    assert_int_equal(token, c->expected[c->n_seen]);
    assert_int_equal(e->position, c->n_seen);
    c->n_seen++;
}

static void finish(world *w, tm_step_seq *e)
{
    client *c = e->seq->user;
    assert_false(c->finished || c->cancelled);
    c->finished = true;
    c->finish_step = w->step;
    assert_int_equal(c->n_seen, c->n_expected);
    assert_int_equal(c->rows_seen, c->rows_to);
    tm_seq_destroy(e->seq);
    c->seq = NULL;
}

bool world_begin_step(world *w)
{
    pending *p = &w->pend[w->n_pend];
    tm_batch b;
    tm_plan_kind kind;
    uint64_t number;
    tm_err err = TM_ERR_INIT;
    tm_sched_plan(w->s, ++w->step, &w->buf, &p->step);
    if (p->step.n_tokens == 0)
        return false;
    tm_plan_pick(&w->buf);
    if (tm_plan_parse(&w->buf, w->buf.len, &kind, &number, &b, &err) != TM_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(number, w->step);
    check_budget(w, &p->step);
    check_writes(w, &b);
    world_forward(w, &b);
    for (int i = 0; i < p->step.n_seqs; i++)
        take_rows(w, &b, p, i);
    for (int i = 0; i < p->step.n_seqs; i++)
        if (p->step.seqs[i].sample_logit >= 0)
            w->picks[p->step.seqs[i].sample_logit] = p->sampled[i];
    w->max_seen_tokens = TM_MAX(w->max_seen_tokens, p->step.n_tokens);
    w->n_pend++;
    return true;
}

static void end_step(world *w)
{
    pending p = w->pend[0];
    for (int i = 0; i < p.step.n_seqs; i++)
        if (p.step.seqs[i].seq)
            see_token(&p.step.seqs[i], p.sampled[i]);
    tm_sched_retire(w->s, &p.step, p.sampled);
    for (int i = 0; i < p.step.n_seqs; i++)
        if (p.step.seqs[i].seq && p.step.seqs[i].end != TM_SEQ_GOES_ON)
            finish(w, &p.step.seqs[i]);
    w->pend[0] = w->pend[1];
    w->n_pend--;
}

int world_step(world *w)
{
    if (w->n_pend == 0 && !world_begin_step(w))
        return 0;
    int n = w->pend[0].step.n_tokens;
    if (w->ahead && (!w->mood || rng_below(w->mood, 5) > 0)) {
        tm_sched_advance(w->s, &w->pend[0].step);
        sched_check(w->s);
        world_begin_step(w);
    }
    end_step(w);
    return n;
}

void world_drain(world *w)
{
    int64_t left = 200000;
    while (world_step(w) > 0)
        assert_true(--left > 0);
}
