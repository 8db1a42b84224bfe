/* What varies from layer to layer, and the numbers of scores and experts. */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/config_impl.h"

/* Does layer i slide by the family's rule? */
static bool slides(const tm_arch *a, int i, int first, int pattern)
{
    switch (a->family->window) {
    case TM_WINDOW_EVEN:
        return i % 2 == 0;
    case TM_WINDOW_PATTERN:
        return (i + 1) % pattern != 0;
    default:
        return i >= first;
    }
}

/* "sliding_attention" and "full_attention", one for each layer. */
static tm_status read_kind(const json_t *kinds, int i, bool *slide, tm_err *err)
{
    const char *kind = json_string_value(json_array_get(kinds, (size_t)i));
    if (!kind || (strcmp(kind, "full_attention") != 0 && strcmp(kind, "sliding_attention") != 0))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "layer_types[%d]: expected full_attention or sliding_attention", i);
    *slide = kind[0] == 's';
    return TM_OK;
}

/* The window of each layer: an explicit list of layer kinds wins over the family's rule. */
tm_status tm_config_windows(tm_arch *a, const json_t *root, tm_err *err)
{
    const tm_family *f = a->family;
    int window = f->window_len, first = 0, pattern = TM_MAX(f->pattern, 1);
    bool use = f->window != TM_WINDOW_NONE;
    TM_TRY(tm_config_int(root, "sliding_window", 1, 1 << 28, &window, err));
    if (f->window == TM_WINDOW_QWEN2)
        TM_TRY(tm_config_rule(root, (tm_flag_rule){"use_sliding_window", false}, &use, err));
    if (!use || window == 0)
        return TM_OK;
    if (f->window == TM_WINDOW_QWEN2)
        TM_TRY(tm_config_int(root, "max_window_layers", 0, TM_LAYERS_MAX, &first, err));
    if (f->window == TM_WINDOW_PATTERN)
        TM_TRY(tm_config_int(root, "sliding_window_pattern", 1, TM_LAYERS_MAX, &pattern, err));
    const json_t *kinds = tm_json_get(root, "layer_types");
    if (kinds && json_array_size(kinds) != (size_t)a->layers)
        return TM_FAIL(err, TM_STATUS_CONFIG, "layer_types: expected an array of %d names",
                       a->layers);
    for (int i = 0; i < a->layers; i++) {
        bool slide = slides(a, i, first, pattern);
        if (kinds)
            TM_TRY(read_kind(kinds, i, &slide, err));
        a->layer[i].window = slide ? window : 0;
        a->layer[i].local_rope = slide && f->window == TM_WINDOW_PATTERN;
    }
    return TM_OK;
}

/* Which layers have experts. */
static tm_status read_sparse(tm_arch *a, const json_t *root, tm_err *err)
{
    int step = 1, first = 0;
    const json_t *dense = NULL, *kinds = tm_json_get(root, "mlp_layer_types");
    if (a->family->sparse == TM_SPARSE_QWEN) {
        TM_TRY(tm_config_int(root, "decoder_sparse_step", 1, TM_LAYERS_MAX, &step, err));
        dense = tm_json_get(root, "mlp_only_layers");
    } else if (a->family->sparse == TM_SPARSE_DEEPSEEK) {
        TM_TRY(tm_config_int(root, "first_k_dense_replace", 0, TM_LAYERS_MAX, &first, err));
        TM_TRY(tm_config_int(root, "moe_layer_freq", 1, TM_LAYERS_MAX, &step, err));
    }
    int shift = a->family->sparse == TM_SPARSE_QWEN ? 1 : 0;
    for (int i = 0; i < a->layers; i++) {
        const char *kind = json_string_value(json_array_get(kinds, (size_t)i));
        a->layer[i].moe =
            kind ? strcmp(kind, "sparse") == 0 : i >= first && (i + shift) % step == 0;
        for (size_t k = 0; k < json_array_size(dense); k++)
            if (json_integer_value(json_array_get(dense, k)) == i)
                a->layer[i].moe = false;
    }
    return TM_OK;
}

tm_status tm_config_moe(tm_arch *a, const json_t *root, tm_err *err)
{
    tm_moe_arch *m = &a->moe;
    double scale = 1.0;
    if (m->experts == 0)
        return TM_OK;
    if (m->top_k < 1 || m->top_k > m->experts)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "num_experts_per_tok %d: expected a number from 1 to the %d experts",
                       m->top_k, m->experts);
    m->ffn = m->ffn > 0 ? m->ffn : a->ffn;
    m->groups = TM_MAX(m->groups, 1);
    m->top_groups = TM_MAX(m->top_groups, 1);
    if ((int64_t)m->experts * 2 * TM_MAX(m->ffn, a->hidden) > INT_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%d experts of width %d are too large", m->experts,
                       m->ffn);
    TM_TRY(tm_config_rule(root, a->family->norm_topk, &m->normalise, err));
    TM_TRY(tm_config_num(root, "routed_scaling_factor", 1e-6, 1e6, &scale, err));
    m->scale = (float)scale;
    m->shared_gate = a->family->shared_gate && m->shared > 0;
    return read_sparse(a, root, err);
}

/* Choosing needs whole groups with enough experts in the open ones. */
tm_status tm_config_check_groups(const tm_arch *a, tm_err *err)
{
    const tm_moe_arch *m = &a->moe;
    if (m->experts == 0 || m->groups <= 1)
        return TM_OK;
    if (m->experts % m->groups != 0 || m->top_groups > m->groups ||
        m->top_k > m->top_groups * (m->experts / m->groups))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "n_group %d, topk_group %d: %d of %d experts cannot be chosen in them",
                       m->groups, m->top_groups, m->top_k, m->experts);
    return TM_OK;
}

/* An absent key means the class default, an explicit null means none. */
static tm_status read_cap(const json_t *root, const char *key, double def, float *out, tm_err *err)
{
    double cap = json_object_get(root, key) ? 0.0 : def;
    TM_TRY(tm_config_num(root, key, 1e-3, 1e6, &cap, err));
    *out = (float)cap;
    return TM_OK;
}

tm_status tm_config_scores(tm_arch *a, const json_t *root, tm_err *err)
{
    const tm_family *f = a->family;
    double scalar = f->query_scalar;
    if (scalar > 0.0) {
        TM_TRY(tm_config_num(root, "query_pre_attn_scalar", 1e-3, 1e6, &scalar, err));
        a->attn_scale = (float)(1.0 / sqrt(scalar));
    }
    TM_TRY(read_cap(root, "attn_logit_softcapping", f->attn_softcap, &a->attn_softcap, err));
    return read_cap(root, "final_logit_softcapping", f->head_softcap, &a->head_softcap, err);
}
