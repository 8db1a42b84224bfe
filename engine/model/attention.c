/* The attention block, of both kinds, from ws.normed.
 *
 * Ordinary: qkv -> bounds and norms of heads where the family has them -> rope and append -> attention -> o.
 *
 * Latent (DeepSeek): what is cached of a position is [rope | latent], the rotated key part that all heads share
 * and kv_rank numbers that keys and values are made of. Instead of making them, each query goes into the latent
 * space (q_nope . W_k) and each head's output comes back (W_v . out), so that attention itself is the ordinary
 * operator with one kv head whose keys are its values. That is the least to cache and to read, the same
 * arithmetic in prefill and decode, and in exchange more products per key than expanded heads would take. */
#include "common/check.h"
#include "engine/model/model_impl.h"

/* Norms inside latent attention have this epsilon whatever config.json says. */
#define MLA_EPS 1e-6f

/* Rows of the qkv workspace in numbers. */
static int qkv_row(const tm_model *m)
{
    return (m->shard.heads + 2 * m->shard.kv_heads) * m->arch.head_dim;
}

static tm_status head_norm(tm_model *m, void *x, int ld, int heads, int d, const float *w,
                           float eps, int rows)
{
    const tm_head_norm_args a = {.x = x,
                                 .w = w,
                                 .n_tokens = rows,
                                 .ld = ld,
                                 .n_heads = heads,
                                 .d = d,
                                 .eps = eps,
                                 .add_one = m->arch.norm_add_one};
    return m->backend->ops->head_norm(m->dev, &a);
}

/* Rope, append and attention: ws.qkv to ws.attn. */
static tm_status attend(tm_model *m, const tm_batch *b, int layer)
{
    const tm_op_table *ops = m->backend->ops;
    const tm_arch *a = &m->arch;
    bool local = a->layer[layer].local_rope;
    const tm_rope *rope = local ? &a->rope_local : &a->rope;
    const tm_rope_append_args r = {.qkv = m->ws.qkv,
                                   .inv_freq = local ? m->inv_freq_local : m->inv_freq,
                                   .seq_inv_freq = m->seq_rope && !local ? m->ws.seq_freq : NULL,
                                   .logn_len = a->logn_len,
                                   .batch = b,
                                   .kv = &m->kv[layer],
                                   .n_heads = m->shard.heads,
                                   .n_kv_heads = m->shard.kv_heads,
                                   .head_dim = a->head_dim,
                                   .rotary_dim = rope->dim,
                                   .interleaved = rope->interleaved,
                                   .mscale = local ? 1.0f : m->rope_mscale};
    const tm_attention_args t = {.out = m->ws.attn,
                                 .qkv = m->ws.qkv,
                                 .batch = b,
                                 .kv = &m->kv[layer],
                                 .n_heads = m->shard.heads,
                                 .n_kv_heads = m->shard.kv_heads,
                                 .head_dim = a->head_dim,
                                 .window = a->layer[layer].window,
                                 .scale = a->attn_scale,
                                 .softcap = a->attn_softcap,
                                 .alibi = m->alibi};
    if (ops->rope_attention_decode && b->n_seqs == b->n_decode)
        return ops->rope_attention_decode(m->dev, &r, &t);
    TM_TRY(ops->rope_append(m->dev, &r));
    if (b->n_seqs > b->n_decode)
        TM_TRY(ops->attention_prefill(m->dev, &t));
    if (b->n_decode > 0)
        TM_TRY(ops->attention_decode(m->dev, &t));
    return TM_OK;
}

static tm_status ordinary(tm_model *m, const tm_batch *b, int layer, void *out)
{
    const tm_layer *l = &m->layers[layer];
    const tm_arch *a = &m->arch;
    int rows = b->n_tokens, row = qkv_row(m), d = a->head_dim;
    void *k = tm_act_at(m, m->ws.qkv, m->shard.heads * d);
    TM_TRY(tm_run_normed_linear(m, m->ws.qkv, &l->qkv, rows));
    if (a->clip_qkv > 0.0f) {
        const tm_bound_args c = {.x = m->ws.qkv, .n_rows = rows, .n = row, .limit = a->clip_qkv};
        TM_TRY(m->backend->ops->bound(m->dev, &c));
    }
    if (l->q_norm)
        TM_TRY(head_norm(m, m->ws.qkv, row, m->shard.heads, d, l->q_norm, a->eps, rows));
    if (l->k_norm)
        TM_TRY(head_norm(m, k, row, m->shard.kv_heads, d, l->k_norm, a->eps, rows));
    TM_TRY(attend(m, b, layer));
    return tm_run_linear(m, out, m->ws.attn, &l->o, rows);
}

/* One product per head where the backend has none for all. */
static tm_status linear_heads(tm_model *m, const tm_linear_heads_args *p)
{
    const tm_op_table *ops = m->backend->ops;
    size_t bytes = (size_t)p->n * (size_t)p->w->k * tm_dtype_size(p->w->dtype);
    if (ops->linear_heads)
        return ops->linear_heads(m->dev, p);
    for (int i = 0; i < p->groups; i++) {
        const tm_weight w = {.dtype = p->w->dtype,
                             .n = p->n,
                             .k = p->w->k,
                             .data = (const char *)p->w->data + (size_t)i * bytes};
        const tm_linear_args a = {.out = tm_act_at(m, p->out, i * p->gdo),
                                  .x = tm_act_at(m, (void *)(uintptr_t)p->x, i * p->gdx),
                                  .w = &w,
                                  .n_tokens = p->n_tokens,
                                  .ldx = p->ldx,
                                  .ldo = p->ldo};
        TM_TRY(ops->linear(m->dev, &a));
    }
    return TM_OK;
}

/* ws.q: per head [rope | nope], from x or through q_rank numbers. */
static tm_status mla_queries(tm_model *m, const tm_layer *l, int rows)
{
    int rank = m->arch.mla.q_rank;
    if (rank == 0)
        return tm_run_linear(m, m->ws.q, m->ws.normed, &l->q_b, rows);
    TM_TRY(tm_run_linear(m, m->ws.q_a, m->ws.normed, &l->q_a, rows));
    TM_TRY(head_norm(m, m->ws.q_a, rank, 1, rank, l->q_a_norm, MLA_EPS, rows));
    return tm_run_linear(m, m->ws.q, m->ws.q_a, &l->q_b, rows);
}

/* The shared key [rope | latent] of each token into its place in ws.qkv. */
static tm_status mla_key(tm_model *m, const tm_layer *l, int rows)
{
    const tm_mla_arch *a = &m->arch.mla;
    int row = qkv_row(m), key = m->shard.heads * m->arch.head_dim;
    const tm_linear_args kv = {.out = tm_act_at(m, m->ws.qkv, key),
                               .x = m->ws.normed,
                               .w = &l->kv_a,
                               .n_tokens = rows,
                               .ldx = m->arch.hidden,
                               .ldo = row};
    TM_TRY(m->backend->ops->linear(m->dev, &kv));
    return head_norm(m, tm_act_at(m, m->ws.qkv, key + a->rope), row, 1, a->kv_rank, l->kv_a_norm,
                     MLA_EPS, rows);
}

static tm_status latent(tm_model *m, const tm_batch *b, int layer, void *out)
{
    const tm_layer *l = &m->layers[layer];
    const tm_mla_arch *a = &m->arch.mla;
    int rows = b->n_tokens, row = qkv_row(m), d = m->arch.head_dim, dq = a->rope + a->nope;
    int heads = m->shard.heads;
    const tm_linear_heads_args in = {.out = tm_act_at(m, m->ws.qkv, a->rope),
                                     .x = tm_act_at(m, m->ws.q, a->rope),
                                     .w = &l->kv_b_k,
                                     .n_tokens = rows,
                                     .groups = heads,
                                     .n = a->kv_rank,
                                     .ldo = row,
                                     .gdo = d,
                                     .ldx = heads * dq,
                                     .gdx = dq};
    const tm_copy_args rotated = {.out = m->ws.qkv,
                                  .x = m->ws.q,
                                  .n_tokens = rows,
                                  .groups = heads,
                                  .cols = a->rope,
                                  .ldo = row,
                                  .gdo = d,
                                  .ldx = heads * dq,
                                  .gdx = dq};
    const tm_linear_heads_args back = {.out = m->ws.q,
                                       .x = tm_act_at(m, m->ws.attn, a->rope),
                                       .w = &l->kv_b_v,
                                       .n_tokens = rows,
                                       .groups = heads,
                                       .n = a->v,
                                       .ldo = heads * a->v,
                                       .gdo = a->v,
                                       .ldx = heads * d,
                                       .gdx = d};
    TM_TRY(mla_queries(m, l, rows));
    TM_TRY(mla_key(m, l, rows));
    TM_TRY(linear_heads(m, &in));
    TM_TRY(m->backend->ops->copy(m->dev, &rotated));
    TM_TRY(attend(m, b, layer));
    TM_TRY(linear_heads(m, &back));
    return tm_run_linear(m, out, m->ws.q, &l->o, rows);
}

tm_status tm_attention_forward(tm_model *m, const tm_batch *b, int layer, void *out)
{
    return m->arch.mla.kv_rank > 0 ? latent(m, b, layer, out) : ordinary(m, b, layer, out);
}
