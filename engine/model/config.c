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

#define ALIASES_MAX 6

/* The value of "a" or "a.b"; NULL when absent or null. */
static json_t *find_path(const json_t *root, const char *path)
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
    return tm_json_get(tm_json_get(root, head), dot + 1);
}

static json_t *find_any(const json_t *root, const char *const *names, const char **hit)
{
    for (int i = 0; i < ALIASES_MAX && names[i]; i++) {
        json_t *v = find_path(root, names[i]);
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
    bool required;
} int_row;

static const int_row int_rows[] = {
    {{"hidden_size", "d_model", "n_embd"}, offsetof(tm_arch, hidden), 1, 1 << 17, true},
    {{"num_hidden_layers", "num_layers", "n_layers", "n_layer"},
     offsetof(tm_arch, layers),
     1,
     TM_LAYERS_MAX,
     true},
    {{"num_attention_heads", "n_heads", "n_head"}, offsetof(tm_arch, heads), 1, 4096, true},
    {{"num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num",
      "attn_config.kv_n_heads"},
     offsetof(tm_arch, kv_heads),
     1,
     4096,
     false},
    {{"head_dim", "kv_channels"}, offsetof(tm_arch, head_dim), 1, 4096, false},
    {{"intermediate_size", "ffn_hidden_size", "ffn_config.ffn_hidden_size"},
     offsetof(tm_arch, ffn),
     1,
     1 << 21,
     true},
    {{"padded_vocab_size", "vocab_size"}, offsetof(tm_arch, vocab), 1, 1 << 24, true},
    {{"max_position_embeddings", "seq_length", "model_max_length", "max_seq_len"},
     offsetof(tm_arch, max_positions),
     1,
     1 << 28,
     true},
};

static tm_status read_ints(tm_arch *a, const json_t *root, tm_err *err)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(int_rows); i++) {
        const int_row *row = &int_rows[i];
        const char *key = row->names[0];
        json_t *v = find_any(root, row->names, &key);
        if (!v && row->required)
            return TM_FAIL(err, TM_STATUS_CONFIG, "%s: this key is missing", key);
        if (!v)
            continue;
        double num = json_number_value(v);
        if (!json_is_number(v) || num != floor(num) || num < row->min || num > row->max)
            return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an integer from %d to %d", key,
                           row->min, row->max);
        *(int *)(void *)((char *)a + row->offset) = (int)num;
    }
    return TM_OK;
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

static tm_status read_flag(const json_t *root, tm_flag_rule rule, bool *out, tm_err *err)
{
    json_t *v = rule.key ? find_path(root, rule.key) : NULL;
    if (v && !json_is_boolean(v))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected true or false, got %s", rule.key,
                       tm_json_type_name(v));
    *out = v ? json_is_true(v) : rule.def;
    return TM_OK;
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
        char known[320];
        tm_family_list(known, sizeof(known));
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "architecture '%.60s' is unknown; known are %s",
                       arch ? arch : type, known);
    }
    snprintf(a->arch, sizeof(a->arch), "%.*s", (int)sizeof(a->arch) - 1,
             arch ? arch : a->family->archs[0]);
    return TM_OK;
}

/* Widths that follow from others, and what must divide what. */
static tm_status settle_heads(tm_arch *a, tm_err *err)
{
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
    a->attn_scale = (float)(1.0 / sqrt((double)a->head_dim));
    return TM_OK;
}

static tm_status read_act(tm_arch *a, const json_t *root, tm_err *err)
{
    static const struct {
        const char *name;
        tm_act_kind act;
    } acts[] = {{"silu", TM_ACT_SILU},
                {"swish", TM_ACT_SILU},
                {"gelu", TM_ACT_GELU_ERF},
                {"gelu_new", TM_ACT_GELU_TANH},
                {"gelu_pytorch_tanh", TM_ACT_GELU_TANH}};
    static const char *const names[ALIASES_MAX] = {"hidden_activation", "hidden_act", "activation"};
    const char *key = names[0];
    json_t *v = find_any(root, names, &key);
    const char *text = v ? json_string_value(v) : "silu";
    for (size_t i = 0; text && i < TM_ARRAY_LEN(acts); i++)
        if (strcmp(acts[i].name, text) == 0) {
            a->act = acts[i].act;
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
                 {"llama3", TM_ROPE_LLAMA3},   {"yarn", TM_ROPE_YARN}};
    static const char *const names[ALIASES_MAX] = {"rope_type", "type"};
    const char *key = names[0];
    json_t *v = find_any(scaling, names, &key);
    const char *text = v ? json_string_value(v) : "default";
    for (size_t i = 0; text && i < TM_ARRAY_LEN(types); i++)
        if (strcmp(types[i].name, text) == 0) {
            *out = types[i].type;
            return TM_OK;
        }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "rope_scaling.%s: '%.40s' is not supported; known are default, linear, dynamic, "
                   "llama3, yarn",
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
    {"original_max_position_embeddings", 1.0, 1e9, offsetof(tm_rope, original)},
    {"low_freq_factor", 1e-6, 1e6, offsetof(tm_rope, low_freq_factor)},
    {"high_freq_factor", 1e-6, 1e6, offsetof(tm_rope, high_freq_factor)},
    {"beta_fast", 1e-6, 1e6, offsetof(tm_rope, beta_fast)},
    {"beta_slow", 1e-6, 1e6, offsetof(tm_rope, beta_slow)},
    {"mscale", 0.0, 1e6, offsetof(tm_rope, mscale)},
    {"mscale_all_dim", 0.0, 1e6, offsetof(tm_rope, mscale_all_dim)},
    {"attention_factor", 1e-6, 1e6, offsetof(tm_rope, attention_factor)},
};

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

static tm_status read_rope(tm_arch *a, const json_t *root, tm_err *err)
{
    static const char *const base_names[ALIASES_MAX] = {"rope_parameters.rope_theta", "rope_theta",
                                                        "rotary_emb_base", "attn_config.rope_theta",
                                                        "rotary.base"};
    static const char *const share_names[ALIASES_MAX] = {"rope_parameters.partial_rotary_factor",
                                                         "partial_rotary_factor", "rotary_pct",
                                                         "rotary_percent"};
    static const char *const original_names[ALIASES_MAX] = {"original_max_position_embeddings"};
    static const char *const scaling_names[ALIASES_MAX] = {"rope_parameters", "rope_scaling",
                                                           "rotary"};
    const tm_family *f = a->family;
    tm_rope *r = &a->rope;
    *r = (tm_rope){.interleaved = f->rope_interleaved,
                   .base = f->rope_base,
                   .factor = 1.0,
                   .original = a->max_positions,
                   .beta_fast = 32.0,
                   .beta_slow = 1.0,
                   .truncate = true};
    double share = f->rotary_share;
    TM_TRY(read_num(root, base_names, 1e-3, 1e12, &r->base, err));
    TM_TRY(read_num(root, share_names, 0.01, 1.0, &share, err));
    TM_TRY(read_num(root, original_names, 1.0, 1e9, &r->original, err));
    r->dim = (int)((double)a->head_dim * share) & ~1;
    const char *key = scaling_names[0];
    json_t *scaling = find_any(root, scaling_names, &key);
    if (!scaling)
        return TM_OK;
    if (!json_is_object(scaling))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an object, got %s", key,
                       tm_json_type_name(scaling));
    bool has_factor = tm_json_get(scaling, "factor") != NULL;
    TM_TRY(read_scaling(r, scaling, err));
    if (r->type == TM_ROPE_YARN && !has_factor)
        r->factor = TM_MAX(1.0, (double)a->max_positions / r->original);
    return TM_OK;
}

/* The window of each layer: an explicit list of layer kinds wins over the family's rule. */
static tm_status read_windows(tm_arch *a, const json_t *root, tm_err *err)
{
    double window = 0, first = 0;
    static const char *const window_names[ALIASES_MAX] = {"sliding_window"};
    static const char *const first_names[ALIASES_MAX] = {"max_window_layers"};
    TM_TRY(read_num(root, window_names, 1, 1 << 28, &window, err));
    bool use = a->family->window == TM_WINDOW_ALL;
    if (a->family->window == TM_WINDOW_QWEN2)
        TM_TRY(read_flag(root, (tm_flag_rule){"use_sliding_window", false}, &use, err));
    if (!use || window == 0)
        return TM_OK;
    if (a->family->window == TM_WINDOW_QWEN2)
        TM_TRY(read_num(root, first_names, 0, TM_LAYERS_MAX, &first, err));
    const json_t *kinds = tm_json_get(root, "layer_types");
    if (kinds && json_array_size(kinds) != (size_t)a->layers)
        return TM_FAIL(err, TM_STATUS_CONFIG, "layer_types: expected an array of %d names",
                       a->layers);
    for (int i = 0; i < a->layers; i++) {
        const char *kind = json_string_value(json_array_get(kinds, (size_t)i));
        if (kinds && (!kind || (strcmp(kind, "full_attention") != 0 &&
                                strcmp(kind, "sliding_attention") != 0)))
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                           "layer_types[%d]: expected full_attention or sliding_attention", i);
        bool slides = kind ? kind[0] == 's' : i >= (int)first;
        a->layer[i].window = slides ? (int)window : 0;
    }
    return TM_OK;
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
    TM_TRY(read_flag(root, f->qkv_bias, &a.qkv_bias, err));
    TM_TRY(read_flag(root, f->o_bias, &a.o_bias, err));
    TM_TRY(read_flag(root, f->mlp_bias, &a.mlp_bias, err));
    TM_TRY(read_flag(root, f->tie, &a.tie, err));
    TM_TRY(read_act(&a, root, err));
    TM_TRY(read_rope(&a, root, err));
    TM_TRY(read_windows(&a, root, err));
    *out = a;
    return TM_OK;
}
