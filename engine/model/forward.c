/* The generic decoder: one step of all families over the backend's operators.
 *
 * embed -> layers (layer.c) -> last add -> the rows whose logits are wanted -> norm, head, columns of all ranks
 * to rank 0. Only wanted rows go through the head: it is the widest weight of the model. */
#include <string.h>

#include "common/check.h"
#include "engine/model/model_impl.h"
#include "engine/weights/convert.h"

static tm_status head_linear(tm_model *m, void *out, int rows)
{
    const tm_weight *w = &m->head;
    const tm_linear_args a = {.out = out,
                              .x = m->ws.rows,
                              .w = w,
                              .n_tokens = rows,
                              .ldx = w->k,
                              .ldo = w->n,
                              .f32_out = true};
    const tm_bound_args cap = {.x = out,
                               .n_rows = rows,
                               .n = w->n,
                               .limit = m->arch.head_softcap,
                               .smooth = true,
                               .f32 = true};
    TM_TRY(m->backend->ops->linear(m->dev, &a));
    return cap.limit > 0.0f ? m->backend->ops->bound(m->dev, &cap) : TM_OK;
}

static tm_status embed(tm_model *m, const tm_batch *b)
{
    const tm_embed_args a = {.out = m->ws.x,
                             .ids = b->tokens,
                             .picked = m->ws.picked,
                             .table = &m->embed,
                             .n_tokens = b->n_tokens,
                             .v0 = m->shard.vocab0,
                             .scale = m->arch.embed_scale};
    TM_TRY(m->backend->ops->embed(m->dev, &a));
    return tm_run_sum(m, m->ws.x, (size_t)b->n_tokens * (size_t)m->arch.hidden);
}

/* Rank 0's logits from the ranks' columns; the padding of the vocabulary is left out. */
static tm_status collect(tm_model *m, const float *mine, int rows, float *logits)
{
    size_t cols = (size_t)m->shard.vocab, all = cols * (size_t)m->shard.tp;
    size_t vocab = (size_t)m->arch.vocab;
    float *to = all == vocab ? logits : m->ws.gathered;
    TM_TRY(tm_comm_gather_cols_f32(m->comm, mine, (size_t)rows, cols, to));
    if (m->shard.rank == 0 && to != logits)
        for (size_t i = 0; i < (size_t)rows; i++)
            memcpy(logits + i * vocab, to + i * all, vocab * sizeof(float));
    return TM_OK;
}

tm_status tm_forward_layers(tm_model *m, const tm_batch *b)
{
    m->ws.sum_waits = false;
    TM_TRY(embed(m, b));
    for (int i = 0; i < m->arch.layers; i++)
        TM_TRY(tm_layer_forward(m, b, i, i > 0 ? m->ws.delta : NULL));
    return TM_OK;
}

tm_status tm_forward_decode_head(tm_model *m, int rows)
{
    tm_workspace *ws = &m->ws;
    TM_TRY(tm_run_norm(m, ws->rows, ws->x, ws->delta, m->final_norm, m->final_norm_b, rows));
    return head_linear(m, ws->logits, rows);
}

tm_status tm_forward_head(tm_model *m, const int32_t *rows, int n, void *out)
{
    tm_workspace *ws = &m->ws;
    const tm_gather_rows_args g = {
        .out = ws->rows, .x = ws->x, .rows = rows, .n_rows = n, .h = m->arch.hidden};
    TM_TRY(m->backend->ops->gather_rows(m->dev, &g));
    TM_TRY(tm_run_norm(m, ws->rows, ws->rows, NULL, m->final_norm, m->final_norm_b, n));
    return head_linear(m, out, n);
}

tm_status tm_forward_download(tm_model *m, int rows, float *logits)
{
    const tm_workspace *ws = &m->ws;
    const tm_device_ops *dev = m->backend->dev;
    const tm_gather_cols_args g = {
        .x = ws->logits, .n_rows = rows, .cols = m->shard.vocab, .n = m->arch.vocab};
    size_t bytes = (size_t)rows * (size_t)m->arch.vocab * sizeof(float);
    if (m->shard.tp == 1)
        return dev->download(m->dev, logits, ws->logits, bytes);
    TM_TRY(m->backend->ops->gather_cols(m->dev, &g));
    return m->shard.rank == 0 ? dev->download(m->dev, logits, ws->joined, bytes)
                              : dev->sync(m->dev);
}

tm_status tm_forward_pick(tm_model *m, int first, int rows)
{
    const tm_shard *s = &m->shard;
    const tm_argmax_args a = {.out = m->ws.picked + first,
                              .x = m->ws.logits,
                              .n_rows = rows,
                              .n = TM_MIN(s->vocab, TM_MAX(m->arch.vocab - s->vocab0, 0)),
                              .ld = s->vocab,
                              .v0 = s->vocab0};
    return s->tp == 1 ? m->backend->ops->argmax(m->dev, &a)
                      : m->backend->ops->argmax_ranks(m->dev, &a);
}

tm_status tm_forward_choose(tm_model *m, int first, int rows, bool samples)
{
    return samples ? tm_forward_sample(m, first, rows) : tm_forward_pick(m, first, rows);
}

/* Logits of rows_max rows at most. Where the device computes in host memory and has all columns, the head
 * writes straight into the caller's array. */
static tm_status head_pass(tm_model *m, const int32_t *rows, int n, float *logits)
{
    bool direct = m->host_memory && m->shard.tp == 1;
    float *out = direct ? logits : m->ws.logits;
    TM_TRY(tm_forward_head(m, rows, n, out));
    if (direct)
        return TM_OK;
    if (m->shard.tp > 1 && m->host_memory) {
        TM_TRY(m->backend->dev->sync(m->dev));
        return collect(m, out, n, logits);
    }
    return tm_forward_download(m, n, logits);
}

static tm_status heads(tm_model *m, const tm_batch *b, float *logits)
{
    for (int i = 0; i < b->n_logits; i += m->ws.rows_max) {
        int n = TM_MIN(b->n_logits - i, m->ws.rows_max);
        float *at = m->shard.rank == 0 ? logits + (size_t)i * (size_t)m->arch.vocab : NULL;
        TM_TRY(head_pass(m, b->logit_rows + i, n, at));
    }
    return m->backend->dev->sync(m->dev);
}

static tm_status choose_rows(tm_model *m, const tm_batch *b, bool samples)
{
    for (int i = 0; i < b->n_logits; i += m->ws.rows_max) {
        int n = TM_MIN(b->n_logits - i, m->ws.rows_max);
        TM_TRY(tm_forward_head(m, b->logit_rows + i, n, m->ws.logits));
        TM_TRY(tm_forward_choose(m, i, n, samples));
    }
    return TM_OK;
}

/* A batch over the limits would write past the workspaces. */
static bool fits(const tm_model *m, const tm_batch *b)
{
    int bt = m->opts.block_tokens;
    for (int i = 0; i < b->n_tokens; i++)
        if (b->tokens[i] < TM_TOKEN_PICKED(m->ws.n_picks - 1))
            return false;
    return m->kv && m->kv[0].k && b->n_tokens > 0 && b->n_tokens <= m->opts.max_step_tokens &&
           b->n_seqs > 0 && b->n_seqs <= m->opts.max_seqs && b->n_decode >= 0 &&
           b->n_decode <= b->n_seqs && b->n_logits >= 0 && b->n_logits <= b->n_tokens &&
           b->max_blocks > 0 && b->max_blocks <= (m->info.max_positions + bt - 1) / bt;
}

/* Everything before the head; *b is the batch where the device can read it. */
static tm_status body(tm_model *m, const tm_batch *batch, tm_batch *b)
{
    *b = *batch;
    if (!m->host_memory)
        TM_TRY(tm_device_step_upload(m, batch, m->ws.flights[m->ws.flight_next].batch, b));
    TM_TRY(tm_extras_begin_step(m, batch));
    TM_TRY(tm_forward_layers(m, b));
    if (b->n_logits == 0)
        return TM_OK;
    return tm_run_norm(m, NULL, m->ws.x, m->ws.delta, NULL, NULL, b->n_tokens);
}

tm_status tm_model_forward(tm_model *m, const tm_batch *batch, float *logits)
{
    tm_workspace *ws = &m->ws;
    tm_batch b;
    if (ws->in_flight > 0 || !fits(m, batch))
        return TM_STATUS_INVALID;
    ws->n_picks = 0;
    if (tm_device_step_is_decode(m, batch)) {
        TM_TRY(tm_device_step_decode(m, batch, ws->flights[ws->flight_next].batch, false));
        return tm_forward_download(m, batch->n_logits, logits);
    }
    TM_TRY(body(m, batch, &b));
    return heads(m, &b, logits);
}

tm_status tm_model_profile(tm_model *m, tm_profile_row *rows, int max, int *count)
{
    const tm_device_ops *dev = m->backend->dev;
    if (!dev->profile_begin)
        return TM_STATUS_UNSUPPORTED;
    return rows ? dev->profile_end(m->dev, rows, max, count) : dev->profile_begin(m->dev);
}

bool tm_model_can_pick(const tm_model *m)
{
    const tm_op_table *o = m->backend->ops;
    return !m->host_memory && o->argmax && (m->shard.tp == 1 || o->argmax_ranks);
}

static tm_status enqueue_choice(tm_model *m, const tm_batch *batch, int32_t *host, bool samples)
{
    tm_batch b;
    if (tm_device_step_is_decode(m, batch))
        return tm_device_step_decode(m, batch, host, samples);
    TM_TRY(body(m, batch, &b));
    return choose_rows(m, &b, samples);
}

/* The step is enqueued: its results to the host, and the place behind them. */
static tm_status launch(tm_model *m, tm_flight *f, int n_picks, bool details)
{
    tm_workspace *ws = &m->ws;
    const tm_device_ops *dev = m->backend->dev;
    ws->n_picks = f->n_picks = n_picks;
    if (n_picks > 0)
        TM_TRY(dev->download_async(m->dev, f->picked, ws->picked,
                                   (size_t)n_picks * sizeof(*f->picked)));
    if (details)
        TM_TRY(dev->download_async(m->dev, f->details, ws->details,
                                   (size_t)n_picks * sizeof(*f->details)));
    TM_TRY(dev->event_record(m->dev, f->done));
    ws->flight_next = (ws->flight_next + 1) % TM_MODEL_FLIGHTS;
    ws->in_flight++;
    return TM_OK;
}

tm_status tm_model_begin(tm_model *m, const tm_batch *batch)
{
    tm_workspace *ws = &m->ws;
    tm_flight *f = &ws->flights[ws->flight_next];
    if (ws->in_flight == TM_MODEL_FLIGHTS || !tm_model_can_pick(m) || !fits(m, batch))
        return TM_STATUS_INVALID;
    TM_TRY(enqueue_choice(m, batch, f->batch, false));
    return launch(m, f, batch->n_logits, false);
}

tm_status tm_model_begin_sample(tm_model *m, const tm_batch *batch, const tm_sample_set *set)
{
    tm_workspace *ws = &m->ws;
    tm_flight *f = &ws->flights[ws->flight_next];
    bool first = m->shard.rank == 0;
    if (ws->in_flight == TM_MODEL_FLIGHTS || !tm_model_can_sample(m) || !fits(m, batch) ||
        batch->n_logits > m->opts.max_seqs)
        return TM_STATUS_INVALID;
    if (first)
        TM_TRY(tm_sample_step_upload(m, f, set, batch->n_logits));
    TM_TRY(enqueue_choice(m, batch, f->batch, true));
    return launch(m, f, batch->n_logits, first && set->details && batch->n_logits > 0);
}

tm_status tm_model_end(tm_model *m, int32_t *picked)
{
    tm_workspace *ws = &m->ws;
    if (ws->in_flight == 0)
        return TM_STATUS_INVALID;
    int oldest = (ws->flight_next + TM_MODEL_FLIGHTS - ws->in_flight) % TM_MODEL_FLIGHTS;
    const tm_flight *f = &ws->flights[oldest];
    TM_TRY(m->backend->dev->event_wait(m->dev, f->done));
    if (picked && f->n_picks > 0)
        memcpy(picked, f->picked, (size_t)f->n_picks * sizeof(*picked));
    ws->details_ended = f->details;
    ws->in_flight--;
    return TM_OK;
}

int tm_model_in_flight(const tm_model *m)
{
    return m->ws.in_flight;
}
