/* Both notations of a workspace's config, key by key as the releases wrote them. Keys of the engine (batch sizes, share
 * of the cache) get the values that their converter wrote: nothing here reads them. */
#include "engine/model/workspace_config.h"

#include <stdio.h>
#include <stdlib.h>

#include "common/check.h"

/* A number in the fewest digits that read back as it; narrow: as the float that it is. */
static void put_number(tm_buf *out, double v, bool narrow)
{
    char text[40];
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof(text), "%.*g", digits, v);
        double back = strtod(text, NULL);
        if (back == v || (narrow && (float)back == (float)v))
            break;
    }
    /* YAML takes a number without a point for text. */
    bool point = false, exponent = false;
    for (const char *p = text; *p; p++) {
        point = point || *p == '.';
        exponent = exponent || *p == 'e';
        if (*p == 'e' && !point)
            tm_buf_puts(out, ".0");
        tm_buf_putc(out, *p);
    }
    if (!point && !exponent)
        tm_buf_puts(out, ".0");
}

static void put_num(tm_buf *out, double v)
{
    put_number(out, v, false);
}

static int trained(const tm_arch *a)
{
    bool dynamic = a->rope.type == TM_ROPE_DYNAMIC || a->rope.type == TM_ROPE_QWEN;
    return dynamic ? (int)a->rope.original : a->max_positions;
}

static void put_ini(tm_buf *b, const tm_arch *a, const tm_workspace_sizes *z,
                    const tm_workspace_opts *o, const char *weight_type)
{
    bool dynamic = a->rope.type == TM_ROPE_DYNAMIC;
    const struct {
        const char *key;
        int value;
    } first[] = {{"tensor_para_size", o->tp},
                 {"head_num", a->heads},
                 {"kv_head_num", z->kv_heads},
                 {"vocab_size", a->vocab},
                 {"num_layer", a->layers},
                 {"inter_size", z->ffn},
                 {"attn_bias", a->qkv_bias},
                 {"start_id", TM_MAX(o->start_id, 0)},
                 {"end_id", TM_MAX(o->end_id, 0)},
                 {"session_len", a->max_positions},
                 {"rotary_embedding", a->rope.dim},
                 {"size_per_head", a->head_dim},
                 {"group_size", 0},
                 {"max_batch_size", 64},
                 {"max_context_token_num", 1},
                 {"step_length", 1},
                 {"cache_block_seq_len", 128},
                 {"cache_chunk_size", 1},
                 {"use_context_fmha", 1},
                 {"quant_policy", 0},
                 {"max_position_embeddings", trained(a)},
                 {"use_dynamic_ntk", a->rope.type == TM_ROPE_QWEN || dynamic},
                 {"use_logn_attn", a->logn_len > 0}};
    tm_buf_printf(b, "[llama]\nmodel_name = %s\n", o->model_name);
    for (size_t i = 0; i < TM_ARRAY_LEN(first); i++)
        tm_buf_printf(b, "%s = %d\n", first[i].key, first[i].value);
    tm_buf_printf(b, "weight_type = %s\ncache_max_entry_count = 0.5\nnorm_eps = ", weight_type);
    put_number(b, (double)a->eps, true);
    tm_buf_puts(b, "\nrope_theta = ");
    put_num(b, a->rope.base);
    tm_buf_puts(b, "\nrope_scaling_factor = ");
    put_num(b, dynamic ? a->rope.factor : 0.0);
    tm_buf_puts(b, "\n\n");
}

static void put_key(tm_buf *b, const char *key, int value)
{
    tm_buf_printf(b, "  %s: %d\n", key, value);
}

static void put_flag(tm_buf *b, const char *key, bool value)
{
    tm_buf_printf(b, "  %s: %s\n", key, value ? "true" : "false");
}

static void put_yaml_num(tm_buf *b, const char *indent, const char *key, double value)
{
    tm_buf_printf(b, "%s%s: ", indent, key);
    put_num(b, value);
    tm_buf_putc(b, '\n');
}

/* A text in quotes, which are doubled inside. */
static void put_text(tm_buf *b, const char *key, const char *text)
{
    tm_buf_printf(b, "  %s: '", key);
    for (; *text; text++)
        tm_buf_puts(b, *text == '\'' ? "''" : (const char[]){*text, '\0'});
    tm_buf_puts(b, "'\n");
}

static void put_layers(tm_buf *b, const tm_arch *a, const tm_workspace_sizes *z)
{
    tm_buf_puts(b, "  inter_size:\n");
    for (int i = 0; i < a->layers; i++)
        tm_buf_printf(b, "  - %d\n", a->layer[i].moe ? z->shared : z->ffn);
    tm_buf_puts(b, a->moe.experts > 0 ? "  expert_num:\n" : "  expert_num: []\n");
    for (int i = 0; a->moe.experts > 0 && i < a->layers; i++)
        tm_buf_printf(b, "  - %d\n", a->layer[i].moe ? a->moe.experts : 0);
}

static void put_model(tm_buf *b, const tm_arch *a, const tm_workspace_sizes *z,
                      const tm_workspace_opts *o, const char *weight_type)
{
    tm_buf_puts(b, "model_config:\n");
    put_text(b, "model_name", o->model_name);
    put_text(b, "chat_template", o->chat_template);
    put_text(b, "model_arch", a->arch);
    put_key(b, "head_num", a->heads);
    put_key(b, "kv_head_num", z->kv_heads);
    put_key(b, "hidden_units", a->hidden);
    put_key(b, "vocab_size", a->vocab);
    put_key(b, "embedding_size", a->vocab);
    put_key(b, "tokenizer_size", a->vocab);
    put_key(b, "num_layer", a->layers);
    put_layers(b, a, z);
    tm_buf_puts(b, "  norm_eps: ");
    put_number(b, (double)a->eps, true);
    tm_buf_putc(b, '\n');
    put_key(b, "attn_bias", a->qkv_bias);
    put_flag(b, "qk_norm", tm_family_has(a->family, TM_ROLE_Q_NORM));
    put_key(b, "size_per_head", a->head_dim);
    put_key(b, "group_size", 64);
    tm_buf_printf(b, "  weight_type: %s\n", weight_type[0] == 'b' ? "bfloat16" : "float16");
    put_key(b, "session_len", a->max_positions);
    put_key(b, "attn_tp_size", o->tp);
    put_key(b, "mlp_tp_size", o->tp);
    tm_buf_puts(b, "  model_format: hf\n");
    put_key(b, "expert_inter_size", a->moe.experts > 0 ? z->expert_ffn : 0);
    put_key(b, "experts_per_token", a->moe.experts > 0 ? a->moe.top_k : 0);
    put_flag(b, "moe_shared_gate", a->moe.shared_gate);
    put_flag(b, "norm_topk_prob", a->moe.normalise);
    put_yaml_num(b, "  ", "routed_scale", a->moe.experts > 0 ? (double)a->moe.scale : 1.0);
    tm_buf_puts(b, "  topk_group: 1\n  topk_method: greedy\n  moe_group_num: 1\n"
                   "  q_lora_rank: 0\n  kv_lora_rank: 0\n  qk_rope_dim: 0\n  v_head_dim: 0\n"
                   "  tune_layer_num: 1\n");
}

static void put_attention(tm_buf *b, const tm_arch *a)
{
    static const char *const types[] = {
        [TM_ROPE_DEFAULT] = "default", [TM_ROPE_LINEAR] = "linear", [TM_ROPE_DYNAMIC] = "dynamic",
        [TM_ROPE_LONG] = "longrope",   [TM_ROPE_QWEN] = "dynamic",  [TM_ROPE_LLAMA3] = "llama3",
        [TM_ROPE_YARN] = "yarn"};
    const tm_rope *r = &a->rope;
    tm_buf_puts(b, "attention_config:\n  softmax_scale: 0.0\n");
    put_key(b, "cache_block_seq_len", 64);
    put_key(b, "use_logn_attn", a->logn_len > 0);
    put_key(b, "max_position_embeddings", trained(a));
    tm_buf_printf(b, "  rope_param:\n    type: %s\n", types[r->type]);
    put_yaml_num(b, "    ", "base", r->base);
    tm_buf_printf(b, "    dim: %d\n", r->dim);
    put_yaml_num(b, "    ", "factor", r->factor);
    tm_buf_printf(b, "    max_position_embeddings: %d\n", trained(a));
    put_yaml_num(b, "    ", "attention_factor",
                 r->attention_factor > 0 ? r->attention_factor : 1.0);
    put_yaml_num(b, "    ", "beta_fast", r->beta_fast);
    put_yaml_num(b, "    ", "beta_slow", r->beta_slow);
    put_yaml_num(b, "    ", "low_freq_factor", r->low_freq_factor);
    put_yaml_num(b, "    ", "high_freq_factor", r->high_freq_factor);
    tm_buf_printf(b, "    original_max_position_embeddings: %d\n    mrope_section: null\n",
                  (int)r->original);
}

void tm_workspace_config_text(tm_buf *out, const tm_arch *a, const tm_workspace_sizes *z,
                              const tm_workspace_opts *o, const char *weight_type)
{
    if (!o->yaml) {
        put_ini(out, a, z, o, weight_type);
        return;
    }
    put_model(out, a, z, o, weight_type);
    put_attention(out, a);
    tm_buf_puts(out, "lora_config:\n  lora_policy: ''\n  lora_r: 0\n  lora_scale: 0.0\n"
                     "  lora_max_wo_r: 0\n  lora_rank_pattern: ''\n  lora_scale_pattern: ''\n");
}
