/* Writing and checking plan buffers.
 *
 * A follower trusts nothing: a plan that does not fit the limits would write outside the KV pool, and a
 * group whose ranks disagree about a step has to end rather than to go on with different caches. */
#include "engine/sched/plan.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"

#define PLAN_MAGIC 0x544d504c /* "TMPL" */

enum {
    H_MAGIC,
    H_KIND,
    H_STEP_LO,
    H_STEP_HI,
    H_TOKENS,
    H_SEQS,
    H_DECODE,
    H_BLOCKS,
    H_LOGITS,
    H_COUNT = 16 /* rounded up: the arrays start on a cache line */
};

static size_t words_of(const tm_plan_shape *s)
{
    return H_COUNT + 2 * (size_t)s->n_tokens + (size_t)s->n_seqs + 1 + 2 * (size_t)s->n_seqs +
           (size_t)s->n_seqs * (size_t)s->max_blocks + (size_t)s->n_logits;
}

tm_status tm_plan_buf_init(tm_plan_buf *b, const tm_plan_limits *l, tm_err *err)
{
    tm_plan_shape most = {l->max_tokens, l->max_seqs, 0, l->max_blocks, l->max_logits};
    size_t cap = words_of(&most) * sizeof(int32_t);
    int32_t *data = malloc(cap);
    if (!data)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a plan buffer of %zu bytes", cap);
    *b = (tm_plan_buf){.data = data, .cap = cap, .limits = *l};
    return TM_OK;
}

void tm_plan_buf_deinit(tm_plan_buf *b)
{
    free(b->data);
    *b = (tm_plan_buf){0};
}

static void locate(int32_t *data, const tm_plan_shape *s, tm_plan_arrays *a)
{
    a->tokens = data + H_COUNT;
    a->positions = a->tokens + s->n_tokens;
    a->seq_begin = a->positions + s->n_tokens;
    a->kv_len = a->seq_begin + s->n_seqs + 1;
    a->rope_len = a->kv_len + s->n_seqs;
    a->blocks = a->rope_len + s->n_seqs;
    a->logit_rows = a->blocks + (size_t)s->n_seqs * (size_t)s->max_blocks;
}

static void write_header(tm_plan_buf *b, tm_plan_kind kind, uint64_t step, const tm_plan_shape *s)
{
    b->len = words_of(s) * sizeof(int32_t);
    TM_ASSERT(b->len <= b->cap);
    memset(b->data, 0, H_COUNT * sizeof(int32_t));
    b->data[H_MAGIC] = PLAN_MAGIC;
    b->data[H_KIND] = (int32_t)kind;
    b->data[H_STEP_LO] = (int32_t)(uint32_t)step;
    b->data[H_STEP_HI] = (int32_t)(uint32_t)(step >> 32);
    b->data[H_TOKENS] = s->n_tokens;
    b->data[H_SEQS] = s->n_seqs;
    b->data[H_DECODE] = s->n_decode;
    b->data[H_BLOCKS] = s->max_blocks;
    b->data[H_LOGITS] = s->n_logits;
}

void tm_plan_begin(tm_plan_buf *b, uint64_t step, const tm_plan_shape *shape,
                   tm_plan_arrays *arrays)
{
    write_header(b, TM_PLAN_STEP, step, shape);
    locate(b->data, shape, arrays);
}

void tm_plan_pick(tm_plan_buf *b)
{
    TM_ASSERT(b->data[H_KIND] == TM_PLAN_STEP);
    b->data[H_KIND] = TM_PLAN_PICK;
}

void tm_plan_sample(tm_plan_buf *b)
{
    TM_ASSERT(b->data[H_KIND] == TM_PLAN_STEP);
    b->data[H_KIND] = TM_PLAN_SAMPLE;
}

void tm_plan_stop(tm_plan_buf *b, uint64_t step)
{
    tm_plan_shape none = {0};
    write_header(b, TM_PLAN_STOP, step, &none);
}

void tm_plan_drain(tm_plan_buf *b, uint64_t step)
{
    tm_plan_shape none = {0};
    write_header(b, TM_PLAN_DRAIN, step, &none);
}

static bool in_range(int32_t v, int32_t lo, int32_t hi)
{
    return v >= lo && v <= hi;
}

static tm_status check_shape(const tm_plan_limits *l, const tm_plan_shape *s, tm_err *err)
{
    if (!in_range(s->n_tokens, 1, l->max_tokens) || !in_range(s->n_seqs, 1, l->max_seqs) ||
        s->n_seqs > s->n_tokens || !in_range(s->n_decode, 0, s->n_seqs) ||
        !in_range(s->max_blocks, 1, l->max_blocks) || !in_range(s->n_logits, 0, l->max_logits) ||
        s->n_logits > s->n_tokens)
        return TM_FAIL(err, TM_STATUS_INTERNAL,
                       "plan of %d tokens, %d sequences (%d decode), %d blocks, %d logits rows is "
                       "outside the limits %d, %d, %d, %d",
                       s->n_tokens, s->n_seqs, s->n_decode, s->max_blocks, s->n_logits,
                       l->max_tokens, l->max_seqs, l->max_blocks, l->max_logits);
    return TM_OK;
}

static tm_status check_seq(const tm_plan_buf *buf, const tm_batch *b, int i, tm_err *err)
{
    const tm_plan_limits *l = &buf->limits;
    int from = b->seq_begin[i], to = b->seq_begin[i + 1];
    if (to <= from || to > b->n_tokens || (i < b->n_decode) != (to - from == 1))
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: sequence %d has rows %d to %d", i, from, to);
    for (int r = from; r < to; r++)
        if (b->positions[r] != b->positions[from] + (r - from) || b->positions[r] < 0 ||
            !in_range(b->tokens[r], TM_TOKEN_PICKED(buf->picks - 1), l->vocab - 1))
            return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: row %d has token %d, position %d", r,
                           (int)b->tokens[r], (int)b->positions[r]);
    if (b->rope_len[i] < 0)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: sequence %d has rope length %d", i,
                       (int)b->rope_len[i]);
    int64_t room = (int64_t)b->max_blocks * l->block_tokens;
    if (b->kv_len[i] != b->positions[to - 1] + 1 || b->kv_len[i] > room)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: sequence %d has %d tokens in %d blocks", i,
                       (int)b->kv_len[i], b->max_blocks);
    const int32_t *blocks = b->blocks + (size_t)i * (size_t)b->max_blocks;
    for (int j = 0; j * l->block_tokens < b->kv_len[i]; j++)
        if (!in_range(blocks[j], 0, l->n_blocks - 1))
            return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: sequence %d refers to block %d of %d", i,
                           (int)blocks[j], l->n_blocks);
    return TM_OK;
}

static tm_status check_batch(const tm_plan_buf *buf, const tm_batch *b, tm_err *err)
{
    if (b->seq_begin[0] != 0 || b->seq_begin[b->n_seqs] != b->n_tokens)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: the rows of the sequences are not 0 to %d",
                       b->n_tokens);
    for (int i = 0; i < b->n_seqs; i++)
        TM_TRY(check_seq(buf, b, i, err));
    for (int i = 0; i < b->n_logits; i++)
        if (!in_range(b->logit_rows[i], i ? b->logit_rows[i - 1] + 1 : 0, b->n_tokens - 1))
            return TM_FAIL(err, TM_STATUS_INTERNAL, "plan: logits row %d of %d", i,
                           (int)b->logit_rows[i]);
    return TM_OK;
}

tm_status tm_plan_parse(tm_plan_buf *b, size_t len, tm_plan_kind *kind, uint64_t *step,
                        tm_batch *batch, tm_err *err)
{
    const int32_t *d = b->data;
    if (len < H_COUNT * sizeof(int32_t) || len > b->cap || d[H_MAGIC] != PLAN_MAGIC)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "%zu bytes received are not a plan", len);
    uint64_t number = (uint64_t)(uint32_t)d[H_STEP_HI] << 32 | (uint32_t)d[H_STEP_LO];
    if (d[H_KIND] == TM_PLAN_STOP || d[H_KIND] == TM_PLAN_DRAIN) {
        *kind = (tm_plan_kind)d[H_KIND];
        *step = number;
        return TM_OK;
    }
    bool chooses = d[H_KIND] == TM_PLAN_PICK || d[H_KIND] == TM_PLAN_SAMPLE;
    if (d[H_KIND] != TM_PLAN_STEP && !chooses)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan of unknown kind %d", (int)d[H_KIND]);
    tm_plan_shape s = {d[H_TOKENS], d[H_SEQS], d[H_DECODE], d[H_BLOCKS], d[H_LOGITS]};
    TM_TRY(check_shape(&b->limits, &s, err));
    if (len != words_of(&s) * sizeof(int32_t))
        return TM_FAIL(err, TM_STATUS_INTERNAL, "plan of %zu bytes, its sizes say %zu", len,
                       words_of(&s) * sizeof(int32_t));
    tm_plan_arrays a;
    locate(b->data, &s, &a);
    tm_batch view = {.n_tokens = s.n_tokens,
                     .n_seqs = s.n_seqs,
                     .n_decode = s.n_decode,
                     .tokens = a.tokens,
                     .positions = a.positions,
                     .seq_begin = a.seq_begin,
                     .kv_len = a.kv_len,
                     .rope_len = a.rope_len,
                     .blocks = a.blocks,
                     .max_blocks = s.max_blocks,
                     .n_logits = s.n_logits,
                     .logit_rows = a.logit_rows};
    TM_TRY(check_batch(b, &view, err));
    b->picks = chooses ? s.n_logits : 0;
    *batch = view;
    *kind = (tm_plan_kind)d[H_KIND];
    *step = number;
    return TM_OK;
}
