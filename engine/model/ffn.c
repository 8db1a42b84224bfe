/* The feed-forward block, dense or of experts, from ws.normed. */
#include "common/check.h"
#include "engine/model/model_impl.h"

/* down(act(gate_up(x))) with f numbers in between; gate_up and act in one operator where the backend has it. */
static tm_status mlp(tm_model *m, const tm_weight *gate_up, const tm_weight *down, int f, int rows,
                     void *out)
{
    const tm_op_table *ops = m->backend->ops;
    tm_workspace *ws = &m->ws;
    const tm_act_args a = {.out = ws->act,
                           .gate_up = ws->gate_up,
                           .n_tokens = rows,
                           .f = f,
                           .act = m->arch.act,
                           .gated = m->arch.gated};
    const tm_linear_gated_args g = {.out = ws->act,
                                    .gate_up = ws->gate_up,
                                    .x = ws->normed,
                                    .w = gate_up,
                                    .n_tokens = rows,
                                    .ldx = gate_up->k,
                                    .act = m->arch.act};
    bool gated = ops->linear_gated && m->arch.gated && !gate_up->bias;
    if (gated && ws->norm_waits) {
        ws->norm_waits = false;
        TM_TRY(ops->norm_linear_gated(m->dev, &ws->norm, &g));
    } else if (gated) {
        TM_TRY(ops->linear_gated(m->dev, &g));
    } else {
        TM_TRY(tm_run_normed_linear(m, ws->gate_up, gate_up, rows));
        TM_TRY(ops->act(m->dev, &a));
    }
    return tm_run_linear(m, out, ws->act, down, rows);
}

static tm_status route(tm_model *m, const tm_layer *l, int rows)
{
    const tm_moe_arch *e = &m->arch.moe;
    const tm_moe_route_args a = {.ids = m->ws.expert_ids,
                                 .weights = m->ws.expert_weights,
                                 .logits = m->ws.router,
                                 .bias = l->choice_bias,
                                 .n_tokens = rows,
                                 .n_experts = e->experts,
                                 .top_k = e->top_k,
                                 .n_groups = e->groups,
                                 .top_groups = e->top_groups,
                                 .score = e->score,
                                 .group_score = e->group_score,
                                 .normalise = e->normalise,
                                 .scale = e->scale};
    TM_TRY(tm_run_linear_f32(m, m->ws.router, m->ws.normed, &l->router, rows));
    return m->backend->ops->moe_route(m->dev, &a);
}

static tm_status experts(tm_model *m, const tm_layer *l, int rows, void *out)
{
    const tm_moe_arch *e = &m->arch.moe;
    tm_workspace *ws = &m->ws;
    const tm_moe_experts_args a = {.out = out,
                                   .x = ws->normed,
                                   .ids = ws->expert_ids,
                                   .weights = ws->expert_weights,
                                   .gate_up = &l->experts_gate_up,
                                   .down = &l->experts_down,
                                   .add = e->shared > 0 ? ws->shared : NULL,
                                   .add_gate = e->shared_gate ? ws->gate : NULL,
                                   .work = ws->experts,
                                   .n_tokens = rows,
                                   .h = m->arch.hidden,
                                   .f = m->shard.moe_ffn,
                                   .n_experts = e->experts,
                                   .top_k = e->top_k,
                                   .act = m->arch.act};
    TM_TRY(route(m, l, rows));
    if (e->shared > 0)
        TM_TRY(mlp(m, &l->shared_gate_up, &l->shared_down, m->shard.shared, rows, ws->shared));
    if (e->shared_gate)
        TM_TRY(tm_run_linear_f32(m, ws->gate, ws->normed, &l->shared_gate, rows));
    return m->backend->ops->moe_experts(m->dev, &a);
}

tm_status tm_ffn_forward(tm_model *m, int layer, int rows, void *out)
{
    const tm_layer *l = &m->layers[layer];
    if (m->arch.layer[layer].moe)
        return experts(m, l, rows, out);
    return mlp(m, &l->gate_up, &l->down, m->shard.ffn, rows, out);
}
