/* config.json to tm_arch.
 *
 * Two dialects exist, written by Transformers up to 4 and from 5 on; old remote-code families have names of
 * their own. A canonical number is therefore a row with all names it goes by, first hit wins, and "a.b"
 * looks into an object. An absent key means the class default, which the family's row holds. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/arch.h"

#define ALIASES_MAX 8
#define CONTEXT_MAX (1 << 24)

json_t *tm_config_get(const json_t *root, const char *path)
{
    const char *dot = strchr(path, '.');
    if (!dot)
        return tm_json_get(root, path);
    char head[64];
    size_t n = (size_t)(dot - path);
    if (n >= sizeof(head))
        return NULL;
    memcpy(head, path, n);
    head[n] = '\0';
    return tm_config_get(tm_json_get(root, head), dot + 1);
}

static json_t *find_any(const json_t *root, const char *const *names, const char **hit)
{
    for (int i = 0; i < ALIASES_MAX && names[i]; i++) {
        json_t *v = tm_config_get(root, names[i]);
        if (v) {
            *hit = names[i];
            return v;
        }
    }
    return NULL;
}

typedef struct int_row {
    const char *names[ALIASES_MAX];
    size_t offset; /* of an int in tm_arch */
    int min, max;
    bool required; /* after the family's defaults and its hook */
} int_row;

#define AT(field) offsetof(tm_arch, field)
static const int_row int_rows[] = {
    {{"hidden_size", "d_model", "n_embd"}, AT(hidden), 1, 1 << 17, true},
    {{"num_hidden_layers", "num_layers", "n_layers", "n_layer"},
     AT(layers),
     1,
     TM_LAYERS_MAX,
     true},
    {{"num_attention_heads", "n_heads", "n_head"}, AT(heads), 1, 4096, true},
    {{"num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num",
      "attn_config.kv_n_heads"},
     AT(kv_heads),
     1,
     4096,
     false},
    {{"head_dim", "kv_channels"}, AT(head_dim), 1, 4096, false},
    {{"intermediate_size", "ffn_hidden_size", "ffn_config.ffn_hidden_size"},
     AT(ffn),
     1,
     1 << 21,
     true},
    {{"padded_vocab_size", "vocab_size"}, AT(vocab), 1, 1 << 24, true},
    {{"max_position_embeddings", "seq_length", "model_max_length", "max_seq_len"},
     AT(max_positions),
     1,
     1 << 28,
     true},
    {{"num_experts", "num_local_experts", "n_routed_experts", "ffn_config.moe_num_experts"},
     AT(moe.experts),
     1,
     1024,
     false},
    {{"num_experts_per_tok", "ffn_config.moe_top_k"}, AT(moe.top_k), 1, 1024, false},
    {{"moe_intermediate_size"}, AT(moe.ffn), 1, 1 << 21, false},
    {{"shared_expert_intermediate_size"}, AT(moe.shared), 0, 1 << 21, false},
    {{"n_group"}, AT(moe.groups), 1, 1024, false},
    {{"topk_group"}, AT(moe.top_groups), 1, 1024, false},
    {{"q_lora_rank"}, AT(mla.q_rank), 1, 1 << 17, false},
    {{"kv_lora_rank"}, AT(mla.kv_rank), 1, 4096, false},
    {{"qk_nope_head_dim"}, AT(mla.nope), 1, 4096, false},
    {{"qk_rope_head_dim"}, AT(mla.rope), 1, 4096, false},
    {{"v_head_dim"}, AT(mla.v), 1, 4096, false},
};
#undef AT

static int *int_at(tm_arch *a, const int_row *row)
{
    return (int *)(void *)((char *)a + row->offset);
}

static tm_status to_int(const json_t *v, const char *key, int min, int max, int *out, tm_err *err)
{
    double num = json_number_value(v);
    if (!json_is_number(v) || num != floor(num) || num < min || num > max)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an integer from %d to %d", key, min,
                       max);
    *out = (int)num;
    return TM_OK;
}

static void set_default(int *value, int def)
{
    if (*value == 0)
        *value = def;
}

/* Numbers of config.json, then the family's defaults, then its hook; what is still missing is named. */
static tm_status read_ints(tm_arch *a, const json_t *root, tm_err *err)
{
    const tm_family *f = a->family;
    for (size_t i = 0; i < TM_ARRAY_LEN(int_rows); i++) {
        const int_row *row = &int_rows[i];
        const char *key = row->names[0];
        json_t *v = find_any(root, row->names, &key);
        if (v)
            TM_TRY(to_int(v, key, row->min, row->max, int_at(a, row), err));
    }
    set_default(&a->kv_heads, f->kv_heads);
    set_default(&a->head_dim, f->head_dim);
    set_default(&a->max_positions, f->max_positions);
    if (f->shape)
        TM_TRY(f->shape(a, root, err));
    for (size_t i = 0; i < TM_ARRAY_LEN(int_rows); i++)
        if (int_rows[i].required && *int_at(a, &int_rows[i]) == 0)
            return TM_FAIL(err, TM_STATUS_CONFIG, "%s: this key is missing", int_rows[i].names[0]);
    return TM_OK;
}

tm_status tm_config_int(const json_t *root, const char *path, int min, int max, int *out,
                        tm_err *err)
{
    json_t *v = tm_config_get(root, path);
    return v ? to_int(v, path, min, max, out, err) : TM_OK;
}

static tm_status read_num(const json_t *root, const char *const *names, double min, double max,
                          double *out, tm_err *err)
{
    const char *key = names[0];
    json_t *v = find_any(root, names, &key);
    if (!v)
        return TM_OK;
    double num = json_number_value(v);
    if (!json_is_number(v) || !(num >= min && num <= max))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected a number from %g to %g", key, min, max);
    *out = num;
    return TM_OK;
}

tm_status tm_config_num(const json_t *root, const char *path, double min, double max, double *out,
                        tm_err *err)
{
    const char *const names[ALIASES_MAX] = {path};
    return read_num(root, names, min, max, out, err);
}

static tm_status read_flag(const json_t *root, tm_flag_rule rule, bool *out, tm_err *err)
{
    json_t *v = rule.key ? tm_config_get(root, rule.key) : NULL;
    if (v && !json_is_boolean(v))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected true or false, got %s", rule.key,
                       tm_json_type_name(v));
    *out = v ? json_is_true(v) : rule.def;
    return TM_OK;
}

tm_status tm_config_flag(const json_t *root, const char *path, bool *out, tm_err *err)
{
    return read_flag(root, (tm_flag_rule){path, *out}, out, err);
}

static tm_status read_family(tm_arch *a, const json_t *root, tm_err *err)
{
    const char *arch = json_string_value(json_array_get(tm_json_get(root, "architectures"), 0));
    const char *type = json_string_value(tm_json_get(root, "model_type"));
    if (!arch && !type)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "architectures: this key is missing (and so is model_type)");
    a->family = tm_family_find(arch, type);
    if (!a->family) {
        char close[256];
        tm_family_closest(arch ? arch : type, close, sizeof(close));
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "architecture '%.60s' is unknown; the closest known ones are %s "
                       "(`turbomesh list` shows all)",
                       arch ? arch : type, close);
    }
    snprintf(a->arch, sizeof(a->arch), "%.*s", (int)sizeof(a->arch) - 1,
             arch ? arch : a->family->archs[0]);
    return TM_OK;
}

/* Latent attention looks to the operators like one kv head; see tm_mla_arch. */
static tm_status settle_mla(tm_arch *a, tm_err *err)
{
    const tm_mla_arch *m = &a->mla;
    if (m->nope == 0 || m->rope == 0 || m->v == 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "qk_nope_head_dim, qk_rope_head_dim, v_head_dim: all are needed beside "
                       "kv_lora_rank");
    a->kv_heads = 1;
    a->head_dim = m->rope + m->kv_rank;
    a->v_dim = m->v;
    a->attn_scale = (float)(1.0 / sqrt((double)(m->nope + m->rope)));
    return TM_OK;
}

/* Widths that follow from others, and what must divide what. */
static tm_status settle_heads(tm_arch *a, tm_err *err)
{
    if (a->mla.kv_rank > 0)
        return settle_mla(a, err);
    if (a->kv_heads == 0)
        a->kv_heads = a->heads;
    if (a->heads % a->kv_heads != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "num_key_value_heads %d does not divide num_attention_heads %d", a->kv_heads,
                       a->heads);
    if (a->head_dim == 0) {
        if (a->hidden % a->heads != 0)
            return TM_FAIL(err, TM_STATUS_CONFIG,
                           "hidden_size %d is not divisible by num_attention_heads %d", a->hidden,
                           a->heads);
        a->head_dim = a->hidden / a->heads;
    }
    if (a->head_dim % 2 != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "head_dim %d is odd", a->head_dim);
    a->v_dim = a->head_dim;
    a->attn_scale = (float)(1.0 / sqrt((double)a->head_dim));
    return TM_OK;
}

static tm_status read_act(tm_arch *a, const json_t *root, tm_err *err)
{
    a->act = a->family->act;
    static const struct {
        const char *name;
        tm_act_kind act;
    } acts[] = {{"silu", TM_ACT_SILU},
                {"swish", TM_ACT_SILU},
                {"gelu", TM_ACT_GELU_ERF},
                {"gelu_new", TM_ACT_GELU_TANH},
                {"gelu_pytorch_tanh", TM_ACT_GELU_TANH}};
    static const char *const names[ALIASES_MAX] = {"hidden_activation", "hidden_act", "activation",
                                                   "ffn_config.ffn_act_fn.name"};
    const char *key = names[0];
    json_t *v = find_any(root, names, &key);
    const char *text = json_string_value(v);
    if (!v)
        return TM_OK;
    for (size_t i = 0; text && i < TM_ARRAY_LEN(acts); i++)
        if (strcmp(acts[i].name, text) == 0) {
            bool is_tanh = a->family->gelu_is_tanh && acts[i].act == TM_ACT_GELU_ERF;
            a->act = is_tanh ? TM_ACT_GELU_TANH : acts[i].act;
            return TM_OK;
        }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "%s: activation '%.40s' is not supported", key,
                   text ? text : tm_json_type_name(v));
}

static tm_status read_rope_type(const json_t *scaling, tm_rope_type *out, tm_err *err)
{
    static const struct {
        const char *name;
        tm_rope_type type;
    } types[] = {{"default", TM_ROPE_DEFAULT}, {"origin", TM_ROPE_DEFAULT}, /* InternLM 1 */
                 {"linear", TM_ROPE_LINEAR},   {"dynamic", TM_ROPE_DYNAMIC},
                 {"llama3", TM_ROPE_LLAMA3},   {"yarn", TM_ROPE_YARN},
                 {"longrope", TM_ROPE_LONG},   {"su", TM_ROPE_LONG}}; /* Phi-3's old name */
    static const char *const names[ALIASES_MAX] = {"rope_type", "type"};
    const char *key = names[0];
    json_t *v = find_any(scaling, names, &key);
    const char *text = v ? json_string_value(v) : "default";
    for (size_t i = 0; text && i < TM_ARRAY_LEN(types); i++)
        if (strcmp(types[i].name, text) == 0) {
            /* An old Phi-3 config calls its lists yarn. */
            bool lists = tm_json_get(scaling, "long_factor") != NULL;
            *out = types[i].type == TM_ROPE_YARN && lists ? TM_ROPE_LONG : types[i].type;
            return TM_OK;
        }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "rope_scaling.%s: '%.40s' is not supported; known are default, linear, dynamic, "
                   "llama3, yarn, longrope",
                   key, text ? text : tm_json_type_name(v));
}

/* A scaled rope needs its factor; a missing one must not silently mean 1. */
static tm_status need_key(const json_t *scaling, const char *key, tm_err *err)
{
    if (!tm_json_get(scaling, key))
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s: this key is missing", key);
    return TM_OK;
}

typedef struct rope_num {
    const char *key;
    double min, max;
    size_t offset; /* of a double in tm_rope */
} rope_num;

static const rope_num rope_nums[] = {
    {"factor", 1.0, 1e6, offsetof(tm_rope, factor)},
    {"scaling_factor", 1.0, 1e6, offsetof(tm_rope, factor)}, /* InternLM 1 */
    {"original_max_position_embeddings", 1.0, 1e9, offsetof(tm_rope, original)},
    {"low_freq_factor", 1e-6, 1e6, offsetof(tm_rope, low_freq_factor)},
    {"high_freq_factor", 1e-6, 1e6, offsetof(tm_rope, high_freq_factor)},
    {"beta_fast", 1e-6, 1e6, offsetof(tm_rope, beta_fast)},
    {"beta_slow", 1e-6, 1e6, offsetof(tm_rope, beta_slow)},
    {"mscale", 0.0, 1e6, offsetof(tm_rope, mscale)},
    {"mscale_all_dim", 0.0, 1e6, offsetof(tm_rope, mscale_all_dim)},
    {"attention_factor", 1e-6, 1e6, offsetof(tm_rope, attention_factor)},
};

static tm_status read_list(const json_t *scaling, const char *key, int n, float *out, tm_err *err)
{
    const json_t *list = tm_json_get(scaling, key);
    if (!json_is_array(list) || json_array_size(list) != (size_t)n || n > TM_LONGROPE_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s: expected an array of %d numbers",
                       key, n);
    for (int i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, (size_t)i);
        double num = json_number_value(v);
        if (!json_is_number(v) || !(num > 1e-6 && num < 1e6))
            return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s[%d]: expected a number above 0",
                           key, i);
        out[i] = (float)num;
    }
    return TM_OK;
}

static tm_status read_scaling(tm_rope *r, const json_t *scaling, tm_err *err)
{
    TM_TRY(read_rope_type(scaling, &r->type, err));
    for (size_t i = 0; i < TM_ARRAY_LEN(rope_nums); i++) {
        const rope_num *n = &rope_nums[i];
        const char *const names[ALIASES_MAX] = {n->key};
        double *out = (double *)(void *)((char *)r + n->offset);
        tm_status st = read_num(scaling, names, n->min, n->max, out, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "rope_scaling");
            return st;
        }
    }
    TM_TRY(read_flag(scaling, (tm_flag_rule){"truncate", true}, &r->truncate, err));
    if (r->type == TM_ROPE_LINEAR || r->type == TM_ROPE_LLAMA3)
        TM_TRY(need_key(scaling, "factor", err));
    if (r->type == TM_ROPE_LONG) {
        TM_TRY(read_list(scaling, "short_factor", r->dim / 2, r->short_factor, err));
        TM_TRY(read_list(scaling, "long_factor", r->dim / 2, r->long_factor, err));
    }
    if (r->type == TM_ROPE_DYNAMIC && r->dim < 4)
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling: dynamic needs 4 rotated dimensions");
    if (r->type == TM_ROPE_LLAMA3) {
        TM_TRY(need_key(scaling, "low_freq_factor", err));
        TM_TRY(need_key(scaling, "high_freq_factor", err));
        if (r->high_freq_factor <= r->low_freq_factor)
            return TM_FAIL(err, TM_STATUS_CONFIG,
                           "rope_scaling.high_freq_factor %g is not above low_freq_factor %g",
                           r->high_freq_factor, r->low_freq_factor);
    }
    return TM_OK;
}

/* The scaling of the global rope; its object may be nested by layer kind. */
static tm_status read_scaled(tm_arch *a, const json_t *root, tm_err *err)
{
    static const char *const scaling_names[ALIASES_MAX] = {
        "rope_parameters.full_attention", "rope_parameters", "rope_scaling", "rotary"};
    tm_rope *r = &a->rope;
    const char *key = scaling_names[0];
    json_t *scaling = find_any(root, scaling_names, &key);
    if (!scaling)
        return TM_OK;
    if (!json_is_object(scaling))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an object, got %s", key,
                       tm_json_type_name(scaling));
    bool has_factor = tm_json_get(scaling, "factor") != NULL;
    double top = r->original;
    TM_TRY(read_scaling(r, scaling, err));
    if (r->type == TM_ROPE_LONG && tm_config_get(root, "original_max_position_embeddings"))
        r->original = top;
    if (r->type == TM_ROPE_LONG || (r->type == TM_ROPE_YARN && !has_factor))
        r->factor = TM_MAX(1.0, (double)a->max_positions / r->original);
    return TM_OK;
}

static tm_status read_rope(tm_arch *a, const json_t *root, tm_err *err)
{
    static const char *const base_names[ALIASES_MAX] = {"rope_parameters.full_attention.rope_theta",
                                                        "rope_parameters.rope_theta",
                                                        "rope_theta",
                                                        "rotary_emb_base",
                                                        "attn_config.rope_theta",
                                                        "rotary.base"};
    static const char *const local_names[ALIASES_MAX] = {
        "rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"};
    static const char *const share_names[ALIASES_MAX] = {"rope_parameters.partial_rotary_factor",
                                                         "partial_rotary_factor", "rotary_pct",
                                                         "rotary_percent"};
    static const char *const original_names[ALIASES_MAX] = {"original_max_position_embeddings"};
    const tm_family *f = a->family;
    tm_rope *r = &a->rope;
    *r = (tm_rope){.interleaved = f->rope_interleaved,
                   .base = f->rope_base,
                   .factor = 1.0,
                   .original = a->max_positions,
                   .beta_fast = 32.0,
                   .beta_slow = 1.0,
                   .truncate = true};
    double share = f->rotary_share > 0.0 ? f->rotary_share : 1.0;
    TM_TRY(read_num(root, base_names, 1e-3, 1e12, &r->base, err));
    TM_TRY(read_num(root, share_names, 0.01, 1.0, &share, err));
    TM_TRY(read_num(root, original_names, 1.0, 1e9, &r->original, err));
    r->dim = a->mla.kv_rank > 0 ? a->mla.rope : (int)((double)a->head_dim * share) & ~1;
    a->rope_local = *r; /* without scaling */
    a->rope_local.base = 10000.0;
    TM_TRY(read_num(root, local_names, 1e-3, 1e12, &a->rope_local.base, err));
    return read_scaled(a, root, err);
}

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
static tm_status read_windows(tm_arch *a, const json_t *root, tm_err *err)
{
    const tm_family *f = a->family;
    int window = f->window_len, first = 0, pattern = TM_MAX(f->pattern, 1);
    bool use = f->window != TM_WINDOW_NONE;
    TM_TRY(tm_config_int(root, "sliding_window", 1, 1 << 28, &window, err));
    if (f->window == TM_WINDOW_QWEN2)
        TM_TRY(read_flag(root, (tm_flag_rule){"use_sliding_window", false}, &use, err));
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

static tm_status read_moe(tm_arch *a, const json_t *root, tm_err *err)
{
    tm_moe_arch *m = &a->moe;
    double scale = 1.0;
    if (m->experts == 0)
        return TM_OK;
    if (m->top_k < 1 || m->top_k > m->experts)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "num_experts_per_tok %d: expected a number from 1 to the %d experts",
                       m->top_k, m->experts);
    set_default(&m->ffn, a->ffn);
    set_default(&m->groups, 1);
    set_default(&m->top_groups, 1);
    TM_TRY(read_flag(root, a->family->norm_topk, &m->normalise, err));
    TM_TRY(tm_config_num(root, "routed_scaling_factor", 1e-6, 1e6, &scale, err));
    m->scale = (float)scale;
    m->shared_gate = a->family->shared_gate && m->shared > 0;
    return read_sparse(a, root, err);
}

/* Choosing needs whole groups with enough experts in the open ones. */
static tm_status check_groups(const tm_arch *a, tm_err *err)
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

static tm_status read_scores(tm_arch *a, const json_t *root, tm_err *err)
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

/* Keys that change the arithmetic in ways this engine does not offer: better refused than ignored. */
static tm_status refuse_unknown(const json_t *root, tm_err *err)
{
    const json_t *q = tm_json_get(root, "quantization_config");
    if (q) {
        const char *method = json_string_value(tm_json_get(q, "quant_method"));
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "quantization_config: quantised checkpoints (quant_method '%.40s') are not "
                       "read",
                       method ? method : "?");
    }
    return TM_OK;
}

/* A rope that follows the length serves longer sequences than it was trained for: by default as much longer
 * as its factor says, but four times at least (InternLM 20B is released with factor 1 for 16k out of 4k), and further if
 * the user asks. */
static void settle_context(tm_arch *a)
{
    a->context_max = a->max_positions;
    if (a->rope.type != TM_ROPE_DYNAMIC)
        return;
    double longer = (double)a->max_positions * TM_MAX(a->rope.factor, 4.0);
    a->max_positions = (int)TM_MIN(longer, (double)CONTEXT_MAX);
    a->context_max = CONTEXT_MAX;
}

tm_status tm_arch_read(tm_arch *out, const json_t *root, tm_err *err)
{
    static const char *const eps_names[ALIASES_MAX] = {"rms_norm_eps", "layer_norm_epsilon",
                                                       "layernorm_epsilon", "layer_norm_eps"};
    if (!json_is_object(root))
        return TM_FAIL(err, TM_STATUS_CONFIG, "expected an object, got %s",
                       tm_json_type_name(root));
    tm_arch a = {.embed_scale = 1.0f};
    TM_TRY(read_family(&a, root, err));
    TM_TRY(refuse_unknown(root, err));
    TM_TRY(read_ints(&a, root, err));
    TM_TRY(settle_heads(&a, err));
    const tm_family *f = a.family;
    double eps = f->eps;
    TM_TRY(read_num(root, eps_names, 0.0, 1.0, &eps, err));
    a.eps = (float)eps;
    a.norm = f->norm;
    a.norm_add_one = f->norm_add_one;
    a.gated = f->gated;
    if (f->embed_sqrt)
        a.embed_scale = (float)sqrt((double)a.hidden);
    TM_TRY(read_flag(root, f->qkv_bias, &a.qkv_bias, err));
    TM_TRY(read_flag(root, f->o_bias, &a.o_bias, err));
    TM_TRY(read_flag(root, f->mlp_bias, &a.mlp_bias, err));
    TM_TRY(read_flag(root, f->tie, &a.tie, err));
    TM_TRY(read_act(&a, root, err));
    TM_TRY(read_rope(&a, root, err));
    TM_TRY(read_windows(&a, root, err));
    TM_TRY(read_scores(&a, root, err));
    TM_TRY(read_moe(&a, root, err));
    if (f->adjust)
        TM_TRY(f->adjust(&a, root, err));
    TM_TRY(check_groups(&a, err));
    settle_context(&a);
    *out = a;
    return TM_OK;
}
