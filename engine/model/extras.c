/* What only some families need, kept out of the way of the others: their operators, their workspaces, ALiBi
 * slopes, frequencies that depend on a sequence's length. */
#include <math.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/model/model_impl.h"
#include "engine/weights/convert.h"

tm_status tm_extras_check(const tm_model *m, tm_err *err)
{
    const tm_op_table *o = m->backend->ops;
    const tm_arch *a = &m->arch;
    bool mla = a->mla.kv_rank > 0, moe = a->moe.experts > 0;
    bool qk_norm = tm_family_has(a->family, TM_ROLE_Q_NORM);
    const struct {
        const char *name;
        bool needed, there;
    } all[] = {
        {"head_norm", qk_norm || mla, o->head_norm != NULL},
        {"bound", a->clip_qkv > 0.0f || a->head_softcap > 0.0f, o->bound != NULL},
        {"copy", mla, o->copy != NULL},
        {"moe_route", moe, o->moe_route != NULL},
        {"moe_experts", moe, o->moe_experts != NULL && o->moe_work_bytes != NULL},
        {"latent cache", mla, (o->features & TM_FEATURE_LATENT_KV) != 0},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        if (all[i].needed && !all[i].there)
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                           "backend '%s' has no operator '%s', which %s needs", m->backend->name,
                           all[i].name, a->arch);
    return TM_OK;
}

/* Within the trained length neither changes anything, so a backend without them serves that much. */
void tm_extras_limit_context(tm_model *m)
{
    tm_arch *a = &m->arch;
    unsigned features = m->backend->ops->features;
    int limit = a->context_max;
    if (tm_rope_by_length(&a->rope) && !(features & TM_FEATURE_SEQ_ROPE))
        limit = TM_MIN(limit, (int)a->rope.original);
    if (a->logn_len > 0 && !(features & TM_FEATURE_LOGN))
        limit = TM_MIN(limit, a->logn_len);
    if (limit < a->max_positions)
        tm_log(TM_LOG_WARN, "model",
               "backend '%s' has no rope by length: the context ends at the %d positions that %s "
               "was trained for",
               m->backend->name, limit, a->arch);
    a->context_max = limit;
    a->max_positions = TM_MIN(a->max_positions, limit);
}

/* Slope of head i of n: 2^(-8 (i + 1) / n) for a power of two; else those of the power of two below, then
 * every other one of twice that. */
static double slope_of(int i, int n)
{
    int power = 1;
    while (power * 2 <= n)
        power *= 2;
    if (i < power)
        return exp2(-8.0 * (i + 1) / power);
    return exp2(-8.0 * (2 * (i - power) + 1) / (2 * power));
}

static tm_status take_slopes(tm_model *m, tm_err *err)
{
    size_t n = (size_t)m->shard.heads;
    void *dev = NULL;
    float *host = malloc(n * sizeof(float));
    if (!host)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "slopes of ALiBi: out of memory");
    for (size_t i = 0; i < n; i++) /* of the model's heads, not of this rank's */
        host[i] = (float)slope_of(m->shard.head0 + (int)i, m->arch.heads) * m->arch.alibi_scale;
    tm_status st = tm_model_take(m, n * sizeof(float), &dev, err);
    if (st == TM_OK && m->backend->dev->upload(m->dev, dev, host, n * sizeof(float)) != TM_OK)
        st = TM_FAIL(err, TM_STATUS_IO, "slopes of ALiBi: the copy to the device failed");
    m->alibi = dev;
    free(host);
    return st;
}

static tm_status take_rope(tm_model *m, const tm_rope *r, const float **out, float *mscale,
                           tm_err *err)
{
    size_t n = (size_t)r->dim / 2;
    float host[2048];
    void *dev = NULL;
    TM_ASSERT(n <= TM_ARRAY_LEN(host)); /* config.c bounds head_dim */
    tm_rope_freqs(r, host, mscale);
    TM_TRY(tm_model_take(m, TM_MAX(n, (size_t)1) * sizeof(float), &dev, err));
    *out = dev;
    if (m->backend->dev->upload(m->dev, dev, host, n * sizeof(float)) != TM_OK)
        return TM_FAIL(err, TM_STATUS_IO, "rotary frequencies: the copy to the device failed");
    return TM_OK;
}

/* Frequencies of each sequence of a step. */
static tm_status take_seq_rope(tm_model *m, tm_err *err)
{
    size_t seqs = (size_t)m->opts.max_seqs, n = (size_t)m->arch.rope.dim / 2;
    void *dev = NULL;
    m->ws.seq_freq_host = calloc(seqs * n, sizeof(float));
    m->ws.seq_freq_len = calloc(seqs, sizeof(int32_t));
    if (!m->ws.seq_freq_host || !m->ws.seq_freq_len)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "rotary frequencies: out of memory");
    if (m->host_memory) {
        m->ws.seq_freq = m->ws.seq_freq_host;
        return TM_OK;
    }
    TM_TRY(tm_model_take(m, seqs * n * sizeof(float), &dev, err));
    m->ws.seq_freq = dev;
    return TM_OK;
}

typedef struct want {
    void *out; /* a pointer of the workspace */
    size_t bytes;
} want;

static tm_status take_wants(tm_model *m, const want *wants, size_t n, tm_err *err)
{
    for (size_t i = 0; i < n; i++)
        if (wants[i].bytes > 0)
            TM_TRY(tm_model_take(m, wants[i].bytes, wants[i].out, err));
    return TM_OK;
}

static tm_status take_moe(tm_model *m, tm_err *err)
{
    const tm_moe_arch *e = &m->arch.moe;
    tm_workspace *ws = &m->ws;
    size_t t = (size_t)m->opts.max_step_tokens, act = tm_act_size(m), k = (size_t)e->top_k;
    const tm_moe_experts_args most = {.n_tokens = m->opts.max_step_tokens,
                                      .h = m->arch.hidden,
                                      .f = m->shard.moe_ffn,
                                      .n_experts = e->experts,
                                      .top_k = e->top_k};
    const want wants[] = {
        {&ws->router, t * (size_t)e->experts * sizeof(float)},
        {&ws->expert_ids, t * k * sizeof(int32_t)},
        {&ws->expert_weights, t * k * sizeof(float)},
        {&ws->experts, m->backend->ops->moe_work_bytes(&most)},
        {&ws->shared, e->shared > 0 ? t * (size_t)m->arch.hidden * act : 0},
        {&ws->gate, e->shared_gate ? t * sizeof(float) : 0},
    };
    return take_wants(m, wants, TM_ARRAY_LEN(wants), err);
}

static tm_status take_mla(tm_model *m, tm_err *err)
{
    const tm_mla_arch *a = &m->arch.mla;
    size_t t = (size_t)m->opts.max_step_tokens * tm_act_size(m);
    size_t q = (size_t)m->shard.heads * (size_t)TM_MAX(a->rope + a->nope, a->v);
    const want wants[] = {
        {&m->ws.q_a, t * (size_t)a->q_rank},
        {&m->ws.q, t * q},
    };
    return take_wants(m, wants, TM_ARRAY_LEN(wants), err);
}

tm_status tm_extras_take(tm_model *m, tm_err *err)
{
    const tm_arch *a = &m->arch;
    size_t t = (size_t)m->opts.max_step_tokens * tm_act_size(m);
    const want side = {&m->ws.side,
                       a->block == TM_BLOCK_SEQUENTIAL ? 0 : t * (size_t)m->arch.hidden};
    float local_scale;
    /* The scale of the embedding was a number of the model's own format when it was trained. */
    tm_dtype own = m->dtype == TM_DTYPE_F32 ? TM_DTYPE_F32 : m->f16 ? TM_DTYPE_F16 : TM_DTYPE_BF16;
    unsigned char rounded[sizeof(float)];
    tm_convert(rounded, own, &a->embed_scale, TM_DTYPE_F32, 1);
    tm_convert(&m->arch.embed_scale, TM_DTYPE_F32, rounded, own, 1);
    m->arch.embed_scale *= m->scale;
    TM_TRY(take_rope(m, &a->rope, &m->inv_freq, &m->rope_mscale, err));
    TM_TRY(take_rope(m, &a->rope_local, &m->inv_freq_local, &local_scale, err));
    TM_TRY(take_wants(m, &side, 1, err));
    if (a->alibi)
        TM_TRY(take_slopes(m, err));
    if (tm_rope_by_length(&a->rope))
        TM_TRY(take_seq_rope(m, err));
    if (a->mla.kv_rank > 0)
        TM_TRY(take_mla(m, err));
    return a->moe.experts > 0 ? take_moe(m, err) : TM_OK;
}

void tm_extras_release(tm_model *m)
{
    free(m->ws.seq_freq_host);
    free(m->ws.seq_freq_len);
}

/* On a device the frequencies lie at a fixed place, which recorded steps read; they are copied when they change. */
tm_status tm_extras_begin_step(tm_model *m, const tm_batch *b)
{
    size_t n = (size_t)m->arch.rope.dim / 2;
    bool changed = false;
    float mscale;
    m->seq_rope = m->ws.seq_freq != NULL;
    for (int i = 0; m->seq_rope && i < b->n_seqs; i++) {
        /* Most sequences keep their place and their length from step to step. */
        int32_t length = b->rope_len ? TM_MAX(b->rope_len[i], 1) : 1;
        if (m->ws.seq_freq_len[i] == length)
            continue;
        tm_rope_freqs_at(&m->arch.rope, length, m->ws.seq_freq_host + (size_t)i * n, &mscale);
        m->ws.seq_freq_len[i] = length;
        changed = true;
    }
    if (!changed || m->host_memory)
        return TM_OK;
    return m->backend->dev->upload(m->dev, m->ws.seq_freq, m->ws.seq_freq_host,
                                   (size_t)b->n_seqs * n * sizeof(float));
}
