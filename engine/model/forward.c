/* The generic decoder: one step of all families over the backend's operators.
 *
 * embed -> layers of { norm, qkv, rope and append, attention, o, sum over ranks, norm, gate_up, act, down,
 * sum over ranks } -> last add -> the rows whose logits are wanted -> norm, head, columns of all ranks to rank 0.
 * The add of a block's output to the residual stream is part of the next norm, which saves one pass over
 * the activations. Only wanted rows go through the head: it is the widest weight of the model. */
#include <string.h>

#include "common/check.h"
#include "engine/model/model_impl.h"
#include "engine/weights/convert.h"

/* Sums a partial result over the ranks. */
static tm_status sum_ranks(tm_model *m, void *x, size_t n)
{
    if (m->shard.tp == 1)
        return TM_OK;
    TM_TRY(m->backend->dev->sync(m->dev));
    return tm_comm_allreduce_f32(m->comm, x, n);
}

static tm_status norm(tm_model *m, void *out, void *x, const void *delta, const float *w,
                      const float *b, int rows)
{
    const tm_norm_args a = {.out = out,
                            .residual = x,
                            .delta = delta,
                            .w = w,
                            .b = b,
                            .n_tokens = rows,
                            .h = m->arch.hidden,
                            .eps = m->arch.eps,
                            .kind = m->arch.norm,
                            .add_one = m->arch.norm_add_one};
    return m->backend->ops->norm(m->dev, &a);
}

static tm_status linear(tm_model *m, void *out, const void *x, const tm_weight *w, int rows)
{
    const tm_linear_args a = {
        .out = out, .x = x, .w = w, .n_tokens = rows, .ldx = w->k, .ldo = w->n};
    return m->backend->ops->linear(m->dev, &a);
}

static tm_status embed(tm_model *m, const tm_batch *b)
{
    const tm_embed_args a = {.out = m->ws.x,
                             .ids = b->tokens,
                             .table = &m->embed,
                             .n_tokens = b->n_tokens,
                             .v0 = m->shard.vocab0,
                             .scale = m->arch.embed_scale};
    TM_TRY(m->backend->ops->embed(m->dev, &a));
    return sum_ranks(m, m->ws.x, (size_t)b->n_tokens * (size_t)m->arch.hidden);
}

static tm_status attention(tm_model *m, const tm_batch *b, int layer)
{
    const tm_op_table *ops = m->backend->ops;
    const tm_arch *a = &m->arch;
    const tm_rope_append_args r = {.qkv = m->ws.qkv,
                                   .inv_freq = m->inv_freq,
                                   .batch = b,
                                   .kv = &m->kv[layer],
                                   .n_heads = m->shard.heads,
                                   .n_kv_heads = m->shard.kv_heads,
                                   .head_dim = a->head_dim,
                                   .rotary_dim = a->rope.dim,
                                   .interleaved = a->rope.interleaved,
                                   .mscale = m->rope_mscale};
    const tm_attention_args t = {.out = m->ws.attn,
                                 .qkv = m->ws.qkv,
                                 .batch = b,
                                 .kv = &m->kv[layer],
                                 .n_heads = m->shard.heads,
                                 .n_kv_heads = m->shard.kv_heads,
                                 .head_dim = a->head_dim,
                                 .window = a->layer[layer].window,
                                 .scale = a->attn_scale,
                                 .softcap = a->attn_softcap};
    TM_TRY(ops->rope_append(m->dev, &r));
    if (b->n_seqs > b->n_decode)
        TM_TRY(ops->attention_prefill(m->dev, &t));
    if (b->n_decode > 0)
        TM_TRY(ops->attention_decode(m->dev, &t));
    return TM_OK;
}

/* delta is what the layer before still has to add to x, or NULL; the layer's own ends in ws.delta. */
static tm_status layer_forward(tm_model *m, const tm_batch *b, int i, const void *delta)
{
    const tm_layer *l = &m->layers[i];
    tm_workspace *ws = &m->ws;
    int rows = b->n_tokens;
    size_t n = (size_t)rows * (size_t)m->arch.hidden;
    TM_TRY(norm(m, ws->normed, ws->x, delta, l->attn_norm, l->attn_norm_b, rows));
    TM_TRY(linear(m, ws->qkv, ws->normed, &l->qkv, rows));
    TM_TRY(attention(m, b, i));
    TM_TRY(linear(m, ws->delta, ws->attn, &l->o, rows));
    TM_TRY(sum_ranks(m, ws->delta, n));
    TM_TRY(norm(m, ws->normed, ws->x, ws->delta, l->ffn_norm, l->ffn_norm_b, rows));
    TM_TRY(linear(m, ws->gate_up, ws->normed, &l->gate_up, rows));
    const tm_act_args a = {.out = ws->act,
                           .gate_up = ws->gate_up,
                           .n_tokens = rows,
                           .f = m->shard.ffn,
                           .act = m->arch.act,
                           .gated = m->arch.gated};
    TM_TRY(m->backend->ops->act(m->dev, &a));
    TM_TRY(linear(m, ws->delta, ws->act, &l->down, rows));
    return sum_ranks(m, ws->delta, n);
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

/* Logits of rows_max rows at most. Where the device computes in host memory and has all columns, the head
 * writes straight into the caller's array. */
static tm_status head_pass(tm_model *m, const int32_t *rows, int n, float *logits)
{
    tm_workspace *ws = &m->ws;
    bool direct = m->host_memory && m->shard.tp == 1;
    void *out = direct ? (void *)logits : ws->logits;
    const tm_gather_rows_args g = {
        .out = ws->rows, .x = ws->x, .rows = rows, .n_rows = n, .h = m->arch.hidden};
    TM_TRY(m->backend->ops->gather_rows(m->dev, &g));
    TM_TRY(norm(m, ws->rows, ws->rows, NULL, m->final_norm, m->final_norm_b, n));
    TM_TRY(linear(m, out, ws->rows, &m->head, n));
    if (direct)
        return TM_OK;
    if (m->shard.tp > 1) {
        TM_TRY(m->backend->dev->sync(m->dev));
        return collect(m, out, n, logits);
    }
    return m->backend->dev->download(m->dev, logits, out,
                                     (size_t)n * (size_t)m->arch.vocab * sizeof(float));
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

static tm_status put(tm_model *m, int32_t *dst, const int32_t *src, size_t n, const int32_t **out)
{
    TM_TRY(m->backend->dev->upload(m->dev, dst, src, n * sizeof(*src)));
    *out = dst;
    return TM_OK;
}

/* The batch with its arrays where the device can read them. */
static tm_status upload_batch(tm_model *m, const tm_batch *b, tm_batch *out)
{
    tm_workspace *ws = &m->ws;
    size_t t = (size_t)b->n_tokens, s = (size_t)b->n_seqs;
    *out = *b;
    if (m->host_memory)
        return TM_OK;
    TM_TRY(put(m, ws->tokens, b->tokens, t, &out->tokens));
    TM_TRY(put(m, ws->positions, b->positions, t, &out->positions));
    TM_TRY(put(m, ws->seq_begin, b->seq_begin, s + 1, &out->seq_begin));
    TM_TRY(put(m, ws->kv_len, b->kv_len, s, &out->kv_len));
    TM_TRY(put(m, ws->blocks, b->blocks, s * (size_t)b->max_blocks, &out->blocks));
    return put(m, ws->logit_rows, b->logit_rows, (size_t)b->n_logits, &out->logit_rows);
}

/* A batch over the limits would write past the workspaces. */
static bool fits(const tm_model *m, const tm_batch *b)
{
    int bt = m->opts.block_tokens;
    return m->kv && m->kv[0].k && b->n_tokens > 0 && b->n_tokens <= m->opts.max_step_tokens &&
           b->n_seqs > 0 && b->n_seqs <= m->opts.max_seqs && b->n_decode >= 0 &&
           b->n_decode <= b->n_seqs && b->n_logits >= 0 && b->n_logits <= b->n_tokens &&
           b->max_blocks > 0 && b->max_blocks <= (m->info.max_positions + bt - 1) / bt;
}

tm_status tm_model_forward(tm_model *m, const tm_batch *batch, float *logits)
{
    tm_batch b;
    if (!fits(m, batch))
        return TM_STATUS_INVALID;
    TM_TRY(upload_batch(m, batch, &b));
    TM_TRY(embed(m, &b));
    for (int i = 0; i < m->arch.layers; i++)
        TM_TRY(layer_forward(m, &b, i, i > 0 ? m->ws.delta : NULL));
    if (b.n_logits == 0)
        return m->backend->dev->sync(m->dev);
    TM_TRY(norm(m, NULL, m->ws.x, m->ws.delta, NULL, NULL, b.n_tokens));
    return heads(m, &b, logits);
}
