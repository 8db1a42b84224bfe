/* The residual stream in float16.
 *
 * float16 has 8 times the precision of bfloat16 in the tensor cores' operands, but ends at 65504, which the stream, and the
 * feed-forward's product of gate and up, leave in some trained models. Both are kept 2^-6 times as large: the embedding
 * is multiplied by that, and so are all weights whose output is added to the stream; a norm in between divides the
 * factor out again, with an epsilon that is smaller by its square. Of the model's own units float16 then holds up to 2^22,
 * from 2^-8 down with a digit less for each power of two, down to 2^-18. Weights that have the factor, of a bfloat16 checkpoint
 * and spread by 0.002 or more, as trained ones are, lose less than bfloat16's own digits were worth (1e-7 of their square
 * there, 1e-10 at 0.02, where the format's rounding was 3e-6). Everything else, keys, queries and values above all, is as the model has it.
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

/* Every role by name, so that the compiler asks about a new one. */
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
    case TM_ROLE_EMBED: /* its rows are multiplied as they are read: it may be the head, too */
    case TM_ROLE_HEAD:
    case TM_ROLE_FINAL_NORM:
    case TM_ROLE_FINAL_NORM_BIAS:
    case TM_ROLE_ATTN_NORM:
    case TM_ROLE_ATTN_NORM_BIAS:
    case TM_ROLE_FFN_NORM:
    case TM_ROLE_FFN_NORM_BIAS:
    case TM_ROLE_QKV:
    case TM_ROLE_QKV_BIAS:
    case TM_ROLE_Q_NORM:
    case TM_ROLE_K_NORM:
    case TM_ROLE_Q_A:
    case TM_ROLE_Q_A_NORM:
    case TM_ROLE_Q_B:
    case TM_ROLE_KV_A:
    case TM_ROLE_KV_A_NORM:
    case TM_ROLE_KV_B_K:
    case TM_ROLE_KV_B_V:
    case TM_ROLE_ROUTER:
    case TM_ROLE_CHOICE_BIAS:
    case TM_ROLE_EXPERTS_DOWN: /* behind a gate always */
    case TM_ROLE_SHARED_DOWN:
    case TM_ROLE_SHARED_GATE:
    case TM_ROLE_COUNT:
        break;
    }
    return none;
}
