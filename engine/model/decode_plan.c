/* Decode steps as one operator, where the device has it and the model is plain enough. */
#include <stdlib.h>

#include "common/check.h"
#include "engine/model/model_impl.h"

static bool layer_is_plain(const tm_model *m, int i)
{
    const tm_layer *l = &m->layers[i];
    const tm_layer_arch *a = &m->arch.layer[i];
    return !a->moe && a->window == 0 && !a->local_rope && l->attn_norm && l->ffn_norm &&
           !l->attn_norm_b && !l->ffn_norm_b && !l->post_attn_norm && !l->post_ffn_norm &&
           !l->q_norm && !l->k_norm;
}

/* What tm_decode_shape promises, and nothing that it cannot say. */
static bool is_plain(const tm_model *m)
{
    const tm_arch *a = &m->arch;
    if (m->shard.tp > 1 || a->block != TM_BLOCK_SEQUENTIAL || a->norm != TM_NORM_RMS || !a->gated ||
        a->mla.kv_rank > 0 || a->clip_qkv > 0.0f || a->attn_softcap > 0.0f || m->alibi ||
        a->logn_len > 0 || a->head_softcap > 0.0f || m->final_norm_b ||
        a->rope.dim != a->head_dim || a->rope.interleaved || tm_rope_by_length(&a->rope))
        return false;
    for (int i = 0; i < a->layers; i++)
        if (!layer_is_plain(m, i))
            return false;
    return true;
}

tm_status tm_decode_plan_open(tm_model *m, tm_err *err)
{
    const tm_op_table *ops = m->backend->ops;
    const tm_arch *a = &m->arch;
    if (!ops->decode_plan || !m->opts.step_kernel || !is_plain(m))
        return TM_OK;
    tm_decode_layer *layers = calloc((size_t)TM_MAX(a->layers, 1), sizeof(*layers));
    if (!layers)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the plan of a decode step");
    for (int i = 0; i < a->layers; i++) {
        const tm_layer *l = &m->layers[i];
        layers[i] = (tm_decode_layer){.qkv = &l->qkv,
                                      .o = &l->o,
                                      .gate_up = &l->gate_up,
                                      .down = &l->down,
                                      .attn_norm = l->attn_norm,
                                      .ffn_norm = l->ffn_norm,
                                      .kv = &m->kv[i]};
    }
    const tm_decode_shape s = {.layers = layers,
                               .n_layers = a->layers,
                               .head = &m->head,
                               .final_norm = m->final_norm,
                               .x = m->ws.x,
                               .x_other = m->ws.x_other,
                               .delta = m->ws.delta,
                               .qkv = m->ws.qkv,
                               .attn = m->ws.attn,
                               .act = m->ws.act,
                               .logits = m->ws.logits,
                               .inv_freq = m->inv_freq,
                               .n_heads = m->shard.heads,
                               .n_kv_heads = m->shard.kv_heads,
                               .head_dim = a->head_dim,
                               .scale = a->attn_scale,
                               .mscale = m->rope_mscale,
                               .eps = a->eps,
                               .add_one = a->norm_add_one,
                               .act_kind = a->act};
    m->ws.plan_x = m->ws.x;
    tm_status st = ops->decode_plan(m->dev, &s, &m->ws.plan, err);
    free(layers);
    return st;
}

void tm_decode_plan_close(tm_model *m)
{
    if (m->ws.plan)
        m->backend->ops->decode_plan_free(m->dev, m->ws.plan);
}

bool tm_decode_plan_takes(const tm_model *m, int n_seqs)
{
    return m->ws.plan && n_seqs <= m->backend->ops->decode_plan_rows(m->ws.plan);
}

tm_status tm_decode_plan_run(tm_model *m, const tm_batch *b)
{
    /* The plan starts from ws.plan_x; operators may have left the two buffers of the stream swapped. */
    if (m->ws.x != m->ws.plan_x) {
        m->ws.x_other = m->ws.x;
        m->ws.x = m->ws.plan_x;
    }
    TM_TRY(tm_forward_embed(m, b));
    return m->backend->ops->decode_run(m->dev, m->ws.plan, b);
}
