/* config.json to tm_arch.
 *
 * Two dialects exist, written by Transformers up to 4 and from 5 on; old remote-code families have names of
 * their own. A canonical number is therefore a row with all names it goes by. An absent key means the class
 * default, which the family's row holds. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/config_impl.h"

#define CONTEXT_MAX  (1 << 24)
#define HEAD_DIM_MAX 4096

typedef struct int_row {
    const char *names[TM_CONFIG_NAMES];
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
     0,
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
        json_t *v = tm_config_any(root, row->names, &key);
        if (v)
            TM_TRY(tm_config_to_int(v, key, row->min, row->max, int_at(a, row), err));
    }
    set_default(&a->heads, f->heads);
    set_default(&a->kv_heads, f->kv_heads);
    set_default(&a->head_dim, f->head_dim);
    set_default(&a->vocab, f->vocab);
    set_default(&a->max_positions, f->max_positions);
    if (f->shape)
        TM_TRY(f->shape(a, root, err));
    for (size_t i = 0; i < TM_ARRAY_LEN(int_rows); i++)
        if (int_rows[i].required && *int_at(a, &int_rows[i]) == 0)
            return TM_FAIL(err, TM_STATUS_CONFIG, "%s: this key is missing", int_rows[i].names[0]);
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

/* Keys of parts that the family's tensors do not have: better refused than computed without. */
static tm_status check_parts(const tm_arch *a, tm_err *err)
{
    if (a->moe.experts > 0 && !tm_family_has(a->family, TM_ROLE_ROUTER))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "num_experts %d: %s has no experts here",
                       a->moe.experts, a->arch);
    if (a->mla.kv_rank > 0 && !tm_family_has(a->family, TM_ROLE_KV_A))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "kv_lora_rank %d: %s has no latent attention here", a->mla.kv_rank, a->arch);
    return TM_OK;
}

/* A family of experts only has no tensors for a dense layer. */
static tm_status check_layers(const tm_arch *a, tm_err *err)
{
    if (tm_family_has(a->family, TM_ROLE_GATE_UP))
        return TM_OK;
    for (int i = 0; i < a->layers; i++)
        if (!a->layer[i].moe)
            return TM_FAIL(err, TM_STATUS_CONFIG,
                           "num_experts: layer %d has none, and %s has no other layers", i,
                           a->arch);
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
    if (a->head_dim > HEAD_DIM_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "head_dim %d: expected at most %d", a->head_dim,
                       HEAD_DIM_MAX);
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
    static const char *const names[TM_CONFIG_NAMES] = {"hidden_activation", "hidden_act",
                                                       "activation", "ffn_config.ffn_act_fn.name"};
    const char *key = names[0];
    json_t *v = tm_config_any(root, names, &key);
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

/* How far the context goes by default, and how far the user may set it. A rope that follows the length serves
 * longer sequences than it was trained for: by default as much longer as its factor says, but four times at least
 * (InternLM 20B is released with factor 1 for 16k out of 4k). Yarn is switched on in configs whose
 * max_position_embeddings stays what it was without. */
static void settle_context(tm_arch *a)
{
    const tm_rope *r = &a->rope;
    double longer = a->max_positions;
    if (r->type == TM_ROPE_DYNAMIC)
        longer = (double)a->max_positions * TM_MAX(r->factor, 4.0);
    if (r->type == TM_ROPE_YARN)
        longer = TM_MAX(longer, r->original * r->factor);
    bool open = r->type == TM_ROPE_DYNAMIC || r->type == TM_ROPE_QWEN;
    a->max_positions = (int)TM_MAX(TM_MIN(longer, (double)CONTEXT_MAX), (double)a->max_positions);
    a->context_max = open ? TM_MAX(CONTEXT_MAX, a->max_positions) : a->max_positions;
}

tm_status tm_arch_read(tm_arch *out, const json_t *root, tm_err *err)
{
    static const char *const eps_names[TM_CONFIG_NAMES] = {"rms_norm_eps", "layer_norm_epsilon",
                                                           "layernorm_epsilon", "layer_norm_eps"};
    if (!json_is_object(root))
        return TM_FAIL(err, TM_STATUS_CONFIG, "expected an object, got %s",
                       tm_json_type_name(root));
    tm_arch a = {.embed_scale = 1.0f};
    TM_TRY(read_family(&a, root, err));
    TM_TRY(refuse_unknown(root, err));
    if (json_is_object(tm_json_get(root, "text_config"))) /* of a model that also sees */
        root = tm_json_get(root, "text_config");
    TM_TRY(read_ints(&a, root, err));
    TM_TRY(check_parts(&a, err));
    TM_TRY(settle_heads(&a, err));
    const tm_family *f = a.family;
    double eps = f->eps;
    TM_TRY(tm_config_any_num(root, eps_names, 0.0, 1.0, &eps, err));
    a.eps = (float)eps;
    a.norm = f->norm;
    a.norm_add_one = f->norm_add_one;
    a.gated = f->gated;
    if (f->embed_sqrt)
        a.embed_scale = (float)sqrt((double)a.hidden);
    TM_TRY(tm_config_rule(root, f->qkv_bias, &a.qkv_bias, err));
    TM_TRY(tm_config_rule(root, f->o_bias, &a.o_bias, err));
    TM_TRY(tm_config_rule(root, f->mlp_bias, &a.mlp_bias, err));
    TM_TRY(tm_config_rule(root, f->tie, &a.tie, err));
    a.head_apart = f->tie.key && tm_config_get(root, f->tie.key) && !a.tie;
    TM_TRY(read_act(&a, root, err));
    TM_TRY(tm_config_rope(&a, root, err));
    TM_TRY(tm_config_windows(&a, root, err));
    TM_TRY(tm_config_scores(&a, root, err));
    TM_TRY(tm_config_moe(&a, root, err));
    if (f->adjust)
        TM_TRY(f->adjust(&a, root, err));
    TM_TRY(tm_config_check_groups(&a, err));
    TM_TRY(check_layers(&a, err));
    settle_context(&a);
    *out = a;
    return TM_OK;
}
