/* The model families, an explicit array. A new family whose decoder has the known parts is one more row;
 * unusual tensor orders are parts (layout.c), not code of a family. */
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "engine/model/arch.h"

#define L "model.layers.%d."

/* Groups of rows that several families share. */
#define ROWS_ENDS                                                                                  \
    {"model.embed_tokens.weight", TM_ROLE_EMBED, TM_PART_WHOLE, TM_NEED_ALWAYS},                   \
        {"model.norm.weight", TM_ROLE_FINAL_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS},                  \
    {                                                                                              \
        "lm_head.weight", TM_ROLE_HEAD, TM_PART_WHOLE, TM_NEED_HEAD                                \
    }
#define ROWS_NORMS                                                                                 \
    {L "input_layernorm.weight", TM_ROLE_ATTN_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS},                \
    {                                                                                              \
        L "post_attention_layernorm.weight", TM_ROLE_FFN_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS       \
    }
#define ROWS_QKV                                                                                   \
    {L "self_attn.q_proj.weight", TM_ROLE_QKV, TM_PART_Q, TM_NEED_ALWAYS},                         \
        {L "self_attn.k_proj.weight", TM_ROLE_QKV, TM_PART_K, TM_NEED_ALWAYS},                     \
        {L "self_attn.v_proj.weight", TM_ROLE_QKV, TM_PART_V, TM_NEED_ALWAYS},                     \
        {L "self_attn.q_proj.bias", TM_ROLE_QKV_BIAS, TM_PART_Q, TM_NEED_QKV_BIAS},                \
        {L "self_attn.k_proj.bias", TM_ROLE_QKV_BIAS, TM_PART_K, TM_NEED_QKV_BIAS},                \
    {                                                                                              \
        L "self_attn.v_proj.bias", TM_ROLE_QKV_BIAS, TM_PART_V, TM_NEED_QKV_BIAS                   \
    }
#define ROWS_O                                                                                     \
    {L "self_attn.o_proj.weight", TM_ROLE_O, TM_PART_WHOLE, TM_NEED_ALWAYS},                       \
    {                                                                                              \
        L "self_attn.o_proj.bias", TM_ROLE_O_BIAS, TM_PART_WHOLE, TM_NEED_O_BIAS                   \
    }
#define ROWS_MLP                                                                                   \
    {L "mlp.gate_proj.weight", TM_ROLE_GATE_UP, TM_PART_GATE, TM_NEED_ALWAYS},                     \
        {L "mlp.up_proj.weight", TM_ROLE_GATE_UP, TM_PART_UP, TM_NEED_ALWAYS},                     \
        {L "mlp.gate_proj.bias", TM_ROLE_GATE_UP_BIAS, TM_PART_GATE, TM_NEED_MLP_BIAS},            \
        {L "mlp.up_proj.bias", TM_ROLE_GATE_UP_BIAS, TM_PART_UP, TM_NEED_MLP_BIAS},                \
        {L "mlp.down_proj.weight", TM_ROLE_DOWN, TM_PART_WHOLE, TM_NEED_ALWAYS},                   \
    {                                                                                              \
        L "mlp.down_proj.bias", TM_ROLE_DOWN_BIAS, TM_PART_WHOLE, TM_NEED_MLP_BIAS                 \
    }
#define ROWS_MLP_FUSED                                                                             \
    {L "mlp.gate_up_proj.weight", TM_ROLE_GATE_UP, TM_PART_WHOLE, TM_NEED_ALWAYS},                 \
    {                                                                                              \
        L "mlp.down_proj.weight", TM_ROLE_DOWN, TM_PART_WHOLE, TM_NEED_ALWAYS                      \
    }

/* Llama's names; InternLM 1 and 3, Mistral and Qwen 2 have the same. */
static const tm_tensor_row llama_rows[] = {ROWS_ENDS, ROWS_NORMS, ROWS_QKV, ROWS_O, ROWS_MLP};

static const tm_tensor_row glm_rows[] = {ROWS_ENDS, ROWS_NORMS, ROWS_QKV, ROWS_O, ROWS_MLP_FUSED};

static const tm_tensor_row baichuan_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_O,
    ROWS_MLP,
    {L "self_attn.W_pack.weight", TM_ROLE_QKV, TM_PART_WHOLE, TM_NEED_ALWAYS},
};

static const tm_tensor_row phi3_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_O,
    ROWS_MLP_FUSED,
    {L "self_attn.qkv_proj.weight", TM_ROLE_QKV, TM_PART_WHOLE, TM_NEED_ALWAYS},
};

static const tm_tensor_row internlm2_rows[] = {
    {"model.tok_embeddings.weight", TM_ROLE_EMBED, TM_PART_WHOLE, TM_NEED_ALWAYS},
    {"model.norm.weight", TM_ROLE_FINAL_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS},
    {"output.weight", TM_ROLE_HEAD, TM_PART_WHOLE, TM_NEED_HEAD},
    {L "attention_norm.weight", TM_ROLE_ATTN_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS},
    {L "attention.wqkv.weight", TM_ROLE_QKV, TM_PART_QKV_GROUPED, TM_NEED_ALWAYS},
    {L "attention.wqkv.bias", TM_ROLE_QKV_BIAS, TM_PART_QKV_GROUPED, TM_NEED_QKV_BIAS},
    {L "attention.wo.weight", TM_ROLE_O, TM_PART_WHOLE, TM_NEED_ALWAYS},
    {L "attention.wo.bias", TM_ROLE_O_BIAS, TM_PART_WHOLE, TM_NEED_O_BIAS},
    {L "ffn_norm.weight", TM_ROLE_FFN_NORM, TM_PART_WHOLE, TM_NEED_ALWAYS},
    {L "feed_forward.w1.weight", TM_ROLE_GATE_UP, TM_PART_GATE, TM_NEED_ALWAYS},
    {L "feed_forward.w3.weight", TM_ROLE_GATE_UP, TM_PART_UP, TM_NEED_ALWAYS},
    {L "feed_forward.w2.weight", TM_ROLE_DOWN, TM_PART_WHOLE, TM_NEED_ALWAYS},
};

/* The defaults that nearly all decoder families share; a row may name other tensors. */
#define USUAL(table)                                                                               \
    .rows = table, .row_count = (int)TM_ARRAY_LEN(table), .norm = TM_NORM_RMS, .gated = true,      \
    .eps = 1e-6, .rope_base = 10000.0, .tie = {"tie_word_embeddings", false}

static const tm_family families[] = {
    {
        .name = "llama",
        .archs = {"LlamaForCausalLM", "LLaMAForCausalLM"},
        .model_types = {"llama"},
        .qkv_bias = {"attention_bias", false},
        .o_bias = {"attention_bias", false},
        .mlp_bias = {"mlp_bias", false},
        .rotary_share = 1.0,
        USUAL(llama_rows),
    },
    {
        .name = "mistral",
        .archs = {"MistralForCausalLM"},
        .model_types = {"mistral"},
        .window = TM_WINDOW_ALL,
        .rotary_share = 1.0,
        USUAL(llama_rows),
    },
    {
        .name = "qwen2",
        .archs = {"Qwen2ForCausalLM"},
        .model_types = {"qwen2"},
        .qkv_bias = {NULL, true}, /* no key announces it */
        .window = TM_WINDOW_QWEN2,
        .rotary_share = 1.0,
        USUAL(llama_rows),
    },
    {
        .name = "internlm",
        .archs = {"InternLMForCausalLM"},
        .model_types = {"internlm"},
        .qkv_bias = {"bias", true},
        .o_bias = {"bias", true},
        .rotary_share = 1.0,
        USUAL(llama_rows),
    },
    {
        .name = "internlm3",
        .archs = {"InternLM3ForCausalLM"},
        .model_types = {"internlm3"},
        .qkv_bias = {"qkv_bias", false},
        .o_bias = {"qkv_bias", false},
        .mlp_bias = {"bias", false},
        .rotary_share = 1.0,
        USUAL(llama_rows),
    },
    {
        .name = "internlm2",
        .archs = {"InternLM2ForCausalLM"},
        .model_types = {"internlm2"},
        .qkv_bias = {"bias", true},
        .o_bias = {"bias", true},
        .rotary_share = 1.0,
        USUAL(internlm2_rows),
    },
    {
        .name = "baichuan",
        .archs = {"BaiChuanForCausalLM"}, /* the 7B of the first version; the others differ */
        .rotary_share = 1.0,
        USUAL(baichuan_rows),
    },
    {
        .name = "glm",
        .archs = {"GlmForCausalLM"},
        .model_types = {"glm"},
        .qkv_bias = {"attention_bias", false},
        .rope_interleaved = true,
        .rotary_share = 0.5, /* even when no key says so */
        USUAL(glm_rows),
    },
    {
        .name = "phi3",
        .archs = {"Phi3ForCausalLM"},
        .model_types = {"phi3"},
        .window = TM_WINDOW_ALL,
        .rotary_share = 1.0,
        USUAL(phi3_rows),
    },
};

static bool in_list(const char *const *names, size_t n, const char *name)
{
    for (size_t i = 0; i < n && names[i]; i++)
        if (strcmp(names[i], name) == 0)
            return true;
    return false;
}

const tm_family *tm_family_find(const char *arch, const char *model_type)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(families); i++) {
        const tm_family *f = &families[i];
        bool hit = arch ? in_list(f->archs, TM_ARRAY_LEN(f->archs), arch)
                        : in_list(f->model_types, TM_ARRAY_LEN(f->model_types), model_type);
        if (hit)
            return f;
    }
    return NULL;
}

void tm_family_list(char *out, size_t size)
{
    size_t at = 0;
    out[0] = '\0';
    for (size_t i = 0; i < TM_ARRAY_LEN(families); i++) {
        int n = snprintf(out + at, size - at, "%s%s", at ? ", " : "", families[i].archs[0]);
        if (n < 0 || (size_t)n >= size - at)
            return;
        at += (size_t)n;
    }
}
