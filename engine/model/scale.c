/* The residual stream in float16.
 *
 * float16 has 8 times the precision of bfloat16 in the tensor cores' operands, but ends at 65504, which the stream, and the
 * feed-forward's product of gate and up, leave in some trained models. Both are kept 2^-6 times as large: the embedding
 * is multiplied by that, and so are all weights whose output is added to the stream; a norm in between divides the
 * factor out again, with an epsilon that is smaller by its square. A power of two changes no digit of a number, and what
 * float16 holds is then 2^-30 to 2^22 of the model's own units. Everything else, keys, queries and values above all, is as
 * the model has it.
 *
 *   stream, o, post-norms: s      up: s, so act(gate) * up: s      down: 1 behind a gate, which has the s already; else s */
#include "engine/model/model_impl.h"

#define FLOAT16_SCALE 0x1p-6f

float tm_scale_choose(const tm_model *m)
{
    /* Random weights are of no trained size. */
    return m->act == TM_DTYPE_F16 && !m->opts.shape ? FLOAT16_SCALE : 1.0f;
}

/* Rows of `up` follow as many of `gate`. */
static bool is_up(const tm_model *m, tm_role role, int row)
{
    const tm_shard *s = &m->shard;
    if (role == TM_ROLE_EXPERTS_GATE_UP)
        return row % (2 * s->moe_ffn) >= s->moe_ffn;
    return row >= (role == TM_ROLE_SHARED_GATE_UP ? s->shared : s->ffn);
}

tm_scaling tm_scale_of(const tm_model *m, tm_role role, int row)
{
    const tm_scaling none = {1.0f, 0.0f}, stream = {m->scale, 0.0f};
    const tm_scaling plus_one = {m->scale, m->scale - 1.0f}; /* s (1 + w) = 1 + (s w + s - 1) */
    switch (role) {
    case TM_ROLE_O:
    case TM_ROLE_O_BIAS:
    case TM_ROLE_DOWN_BIAS:
        return stream;
    case TM_ROLE_DOWN:
        return m->arch.gated ? none : stream;
    case TM_ROLE_GATE_UP:
    case TM_ROLE_GATE_UP_BIAS:
        return m->arch.gated && is_up(m, role, row) ? stream : none;
    case TM_ROLE_EXPERTS_GATE_UP:
    case TM_ROLE_SHARED_GATE_UP:
        return is_up(m, role, row) ? stream : none;
    case TM_ROLE_POST_ATTN_NORM:
    case TM_ROLE_POST_FFN_NORM:
        return m->arch.norm_add_one ? plus_one : stream;
    default:
        return none;
    }
}
