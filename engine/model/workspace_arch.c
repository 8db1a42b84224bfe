/* A workspace's config as tm_arch.
 *
 * Its keys describe one generic decoder: Llama with a few flags. Where the tokenizer's folder has the model's
 * config.json, that is read first and the sizes must agree; it also says what the workspace's keys cannot (how a rope
 * is scaled, sliding windows, stop ids). Keys that say something (not 0) beat it, because users edit them. */
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/model/folder.h"

/* A family of Llama's parts? What else there may be is named. */
tm_status tm_workspace_can_hold(const tm_arch *a, bool yaml, tm_err *err)
{
    const tm_family *f = a->family;
    bool moe = a->moe.experts > 0;
    const struct {
        bool there;
        const char *what;
    } parts[] = {
        {a->mla.kv_rank > 0, "latent attention"},
        {a->alibi, "ALiBi"},
        {a->norm != TM_NORM_RMS || a->norm_add_one, "its norms"},
        {a->block != TM_BLOCK_SEQUENTIAL, "attention and feed-forward side by side"},
        {tm_family_has(f, TM_ROLE_POST_ATTN_NORM), "norms behind its blocks"},
        {!a->gated || a->act != TM_ACT_SILU, "its activation"},
        {a->mlp_bias, "biases of the feed-forward part"},
        {a->embed_scale != 1.0f || a->attn_softcap > 0 || a->head_softcap > 0 || a->clip_qkv > 0,
         "scaled embeddings and bounded values"},
        {a->rope.dim != a->head_dim && !a->rope.interleaved, "a rope on a part of the head"},
        {a->moe.groups > 1 || a->moe.choice_bias, "its choice of experts"},
        {a->moe.score != TM_MOE_SOFTMAX && moe, "its scores of experts"},
        {a->moe.shared > 0 && !a->moe.shared_gate, "shared experts without a gate"},
        {!yaml && moe, "experts (config.yaml has)"},
        {!yaml && tm_family_has(f, TM_ROLE_Q_NORM), "norms of heads (config.yaml has)"},
        {!yaml && a->hidden != a->heads * a->head_dim,
         "heads that are not hidden_size wide together (config.yaml has)"},
        {a->o_bias && !a->qkv_bias, "a bias of the output alone"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(parts); i++)
        if (parts[i].there)
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                           "%s (%s) does not fit a workspace, which has no place for %s", a->arch,
                           f->name, parts[i].what);
    return TM_OK;
}

/* A config.json for a workspace that came without: Llama of the right sizes. */
tm_status tm_workspace_stand_in(const tm_ws_config *c, json_t **out, tm_err *err)
{
    for (int i = 0; i < c->layers; i++)
        if (c->experts[i] > 0 || c->ffn[i] != c->ffn[0])
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                           "%s: layers that differ are only read with the model's config.json "
                           "beside the tokenizer",
                           c->file);
    bool plain = !c->rope_type[0] || strcmp(c->rope_type, "default") == 0 ||
                 !strcmp(c->rope_type, "dynamic");
    const tm_family *f = c->model_arch[0] ? tm_family_find(c->model_arch, NULL) : NULL;
    if (!plain || (f && f->rope_interleaved))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "%s: the rope of %s (%s) is only read with the model's config.json beside "
                       "the tokenizer",
                       c->file, c->model_arch[0] ? c->model_arch : "this model",
                       plain ? "pairs" : c->rope_type);
    int positions = c->max_positions > 0 ? c->max_positions : 2048;
    double base = c->rope_base > 0 ? c->rope_base : 10000.0;
    json_t *root = json_pack(
        "{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b}", "architectures",
        c->qk_norm ? "Qwen3ForCausalLM" : "LlamaForCausalLM", "model_type",
        c->qk_norm ? "qwen3" : "llama", "hidden_size", c->hidden, "intermediate_size", c->ffn[0],
        "num_hidden_layers", c->layers, "num_attention_heads", c->heads, "num_key_value_heads",
        c->kv_heads, "head_dim", c->head_dim, "vocab_size", c->vocab, "max_position_embeddings",
        positions, "rms_norm_eps", c->eps, "rope_theta", base, "attention_bias", c->attn_bias);
    if (root && c->end_id >= 0)
        json_object_set_new(root, "eos_token_id", json_integer(c->end_id));
    if (root && c->dtype == TM_DTYPE_F16)
        json_object_set_new(root, "torch_dtype", json_string("float16"));
    if (root && c->rope_dim < c->head_dim)
        json_object_set_new(root, "partial_rotary_factor",
                            json_real((double)c->rope_dim / c->head_dim));
    if (!root)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    *out = root;
    return TM_OK;
}

/* Sizes that both configs say; what a workspace pads or repeats for its ranks may be more. */
static tm_status check_sizes(const tm_arch *a, const tm_ws_config *c, tm_err *err)
{
    const struct {
        const char *key;
        int ws, model;
        bool more;     /* may be more in the workspace */
        bool multiple; /* and is then a multiple */
    } sizes[] = {{"hidden size", c->hidden, a->hidden, false, false},
                 {"num_layer", c->layers, a->layers, false, false},
                 {"head_num", c->heads, a->heads, false, false},
                 {"size_per_head", c->head_dim, a->head_dim, false, false},
                 {"kv_head_num", c->kv_heads, a->kv_heads, true, true},
                 {"expert_inter_size", a->moe.experts > 0 ? c->expert_ffn : 0,
                  a->moe.experts > 0 ? a->moe.ffn : 0, true, false}};
    for (size_t i = 0; i < TM_ARRAY_LEN(sizes); i++) {
        bool fits = sizes[i].ws == sizes[i].model ||
                    (sizes[i].more && sizes[i].ws > sizes[i].model &&
                     (!sizes[i].multiple || sizes[i].ws % sizes[i].model == 0));
        if (!fits)
            return TM_FAIL(err, TM_STATUS_DATA,
                           "%s: %s is %d, the model's config.json beside the tokenizer says %d",
                           c->file, sizes[i].key, sizes[i].ws, sizes[i].model);
    }
    for (int i = 0; i < a->layers; i++) {
        int want = a->layer[i].moe ? a->moe.shared : a->ffn;
        int experts = a->layer[i].moe ? a->moe.experts : 0;
        if (c->ffn[i] < want || c->experts[i] != experts || (want == 0 && c->ffn[i] > 0))
            return TM_FAIL(err, TM_STATUS_DATA,
                           "%s: layer %d has inter_size %d and %d experts, the model's config.json "
                           "beside the tokenizer says %d and %d",
                           c->file, i, c->ffn[i], c->experts[i], want, experts);
    }
    return TM_OK;
}

static void settle_rope(tm_arch *a, const tm_ws_config *c)
{
    tm_rope *r = &a->rope;
    if (c->rope_base > 0)
        r->base = c->rope_base;
    /* Qwen's own dynamic rope is only known by its config.json; a factor means the ordinary one. */
    bool plain = r->type == TM_ROPE_DEFAULT || r->type == TM_ROPE_DYNAMIC;
    bool dynamic = c->rope_factor >= 1.0 &&
                   (!c->rope_type[0] || strcmp(c->rope_type, "dynamic") == 0) && r->dim >= 4;
    if (plain && dynamic && (!c->yaml || c->rope_type[0])) {
        r->type = TM_ROPE_DYNAMIC;
        r->factor = c->rope_factor;
    }
    if (c->logn && a->logn_len == 0)
        a->logn_len = c->max_positions > 0 ? c->max_positions : a->max_positions;
}

/* How far a session goes: what the workspace says, within what the model allows. */
static void settle_context(tm_arch *a, const tm_ws_config *c)
{
    if (a->rope.type == TM_ROPE_DYNAMIC)
        a->context_max = TM_MAX(a->context_max, 1 << 24);
    if (c->session_len > 0)
        a->max_positions = TM_MIN(c->session_len, a->context_max);
}

tm_status tm_workspace_settle(tm_arch *a, const tm_ws_config *c, bool has_config, tm_err *err)
{
    TM_TRY(tm_workspace_can_hold(a, true, err));
    TM_TRY(check_sizes(a, c, err));
    if (c->embedding != c->vocab)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "%s: embedding_size %d differs from vocab_size %d", c->file, c->embedding,
                       c->vocab);
    bool norm = tm_family_has(a->family, TM_ROLE_Q_NORM);
    if (norm != c->qk_norm && c->yaml)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: qk_norm %d does not fit %s", c->file, c->qk_norm,
                       a->arch);
    if (c->quant_policy != 0)
        tm_log(TM_LOG_WARN, "model",
               "%s: quant_policy %d: the KV cache is not quantised here, it is kept in 16 bits",
               c->file, c->quant_policy);
    a->vocab = c->vocab;
    a->eps = (float)c->eps;
    a->qkv_bias = c->attn_bias;
    a->o_bias = c->attn_bias && (a->o_bias || !has_config);
    a->head_norm = false; /* the converter divided the rows */
    a->moe.stacked = false;
    settle_rope(a, c);
    settle_context(a, c);
    a->family = tm_workspace_family(norm);
    return TM_OK;
}
