/* One layer of the generic decoder.
 *
 * Sequential: attention, then feed-forward, each on its own norm of the residual stream; with a norm on a block's
 * output where the family has one. Parallel: both on the same x, their outputs added and summed over the ranks
 * once. The add of a block's output to the residual stream is part of the next norm, which saves one pass over
 * the activations. */
#include "common/check.h"
#include "engine/model/model_impl.h"

tm_status tm_run_sum(tm_model *m, void *x, size_t n)
{
    const tm_sum_args a = {.x = x, .n = n};
    if (m->shard.tp == 1)
        return TM_OK;
    if (!m->host_memory)
        return m->backend->ops->sum(m->dev, &a);
    TM_TRY(m->backend->dev->sync(m->dev));
    return tm_comm_allreduce_f32(m->comm, x, n);
}

static tm_norm_args norm_args(const tm_model *m, void *out, void *x, const void *delta,
                              const float *w, const float *b, int rows)
{
    return (tm_norm_args){.out = out,
                          .residual = x,
                          .delta = delta,
                          .w = w,
                          .b = b,
                          .n_tokens = rows,
                          .h = m->arch.hidden,
                          .eps = m->arch.eps * m->scale * m->scale,
                          .kind = m->arch.norm,
                          .add_one = m->arch.norm_add_one};
}

/* The norm, with the sum of a delta that still waits for it. */
static tm_status norm(tm_model *m, const tm_norm_args *a)
{
    if (!a->delta || a->delta != m->ws.delta || !m->ws.sum_waits)
        return m->backend->ops->norm(m->dev, a);
    m->ws.sum_waits = false;
    return m->backend->ops->sum_norm(m->dev, a);
}

tm_status tm_run_norm(tm_model *m, void *out, void *x, const void *delta, const float *w,
                      const float *b, int rows)
{
    const tm_norm_args a = norm_args(m, out, x, delta, w, b, rows);
    return norm(m, &a);
}

/* The norm of the residual stream in front of a block. Where only the block's first product reads it (`joins`) and
 * the backend has the two in one operator, it is left to that product. Its blocks read the stream while one of them
 * writes the sum, so the stream goes on in the other buffer. */
static tm_status norm_for_block(tm_model *m, bool joins, const void *delta, const float *w,
                                const float *b, int rows)
{
    tm_workspace *ws = &m->ws;
    void *x = ws->x;
    ws->norm = norm_args(m, ws->normed, x, delta, w, b, rows);
    ws->norm_waits = joins && m->backend->ops->norm_linear && !ws->sum_waits;
    if (!ws->norm_waits)
        return norm(m, &ws->norm);
    if (delta) {
        ws->norm.residual_out = ws->x_other;
        ws->x = ws->x_other;
        ws->x_other = x;
    }
    return TM_OK;
}

tm_status tm_run_normed_linear(tm_model *m, void *out, const tm_weight *w, int rows)
{
    const tm_linear_args a = {
        .out = out, .x = m->ws.normed, .w = w, .n_tokens = rows, .ldx = w->k, .ldo = w->n};
    if (!m->ws.norm_waits)
        return m->backend->ops->linear(m->dev, &a);
    m->ws.norm_waits = false;
    return m->backend->ops->norm_linear(m->dev, &m->ws.norm, &a);
}

tm_status tm_run_linear(tm_model *m, void *out, const void *x, const tm_weight *w, int rows)
{
    const tm_linear_args a = {
        .out = out, .x = x, .w = w, .n_tokens = rows, .ldx = w->k, .ldo = w->n};
    return m->backend->ops->linear(m->dev, &a);
}

tm_status tm_run_linear_f32(tm_model *m, float *out, const void *x, const tm_weight *w, int rows)
{
    const tm_linear_args a = {
        .out = out, .x = x, .w = w, .n_tokens = rows, .ldx = w->k, .ldo = w->n, .f32_out = true};
    return m->backend->ops->linear(m->dev, &a);
}

/* ws.delta, a block's output of this rank: summed over the ranks and normalised where the family does. Without a norm
 * of its own, joined devices sum it as part of the next one. */
static tm_status finish(tm_model *m, const float *post_norm, int rows)
{
    void *delta = m->ws.delta;
    if (m->shard.tp > 1 && !m->host_memory && !post_norm) {
        m->ws.sum_waits = true;
        return TM_OK;
    }
    TM_TRY(tm_run_sum(m, delta, (size_t)rows * (size_t)m->arch.hidden));
    return post_norm ? tm_run_norm(m, delta, delta, NULL, post_norm, NULL, rows) : TM_OK;
}

static tm_status sequential(tm_model *m, const tm_batch *b, int layer)
{
    const tm_layer *l = &m->layers[layer];
    tm_workspace *ws = &m->ws;
    int rows = b->n_tokens;
    TM_TRY(tm_attention_forward(m, b, layer, ws->delta));
    TM_TRY(finish(m, l->post_attn_norm, rows));
    TM_TRY(
        norm_for_block(m, !m->arch.layer[layer].moe, ws->delta, l->ffn_norm, l->ffn_norm_b, rows));
    TM_TRY(tm_ffn_forward(m, layer, rows, ws->delta));
    return finish(m, l->post_ffn_norm, rows);
}

static tm_status parallel(tm_model *m, const tm_batch *b, int layer)
{
    const tm_layer *l = &m->layers[layer];
    tm_workspace *ws = &m->ws;
    int rows = b->n_tokens;
    TM_TRY(tm_attention_forward(m, b, layer, ws->delta));
    if (m->arch.block == TM_BLOCK_PARALLEL2)
        TM_TRY(tm_run_norm(m, ws->normed, ws->x, NULL, l->ffn_norm, l->ffn_norm_b, rows));
    TM_TRY(tm_ffn_forward(m, layer, rows, ws->side));
    TM_TRY(tm_run_norm(m, NULL, ws->delta, ws->side, NULL, NULL, rows)); /* only the add */
    return finish(m, NULL, rows);
}

tm_status tm_layer_forward(tm_model *m, const tm_batch *b, int layer, const void *delta)
{
    const tm_layer *l = &m->layers[layer];
    bool sequence = m->arch.block == TM_BLOCK_SEQUENTIAL;
    bool joins = sequence && m->arch.mla.kv_rank == 0;
    TM_TRY(norm_for_block(m, joins, delta, l->attn_norm, l->attn_norm_b, b->n_tokens));
    return sequence ? sequential(m, b, layer) : parallel(m, b, layer);
}
