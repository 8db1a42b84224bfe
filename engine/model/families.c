/* The model families, an explicit array. A new family whose decoder has the known parts is one more row;
 * unusual tensor orders are parts (layout.c), and what only code can say is a hook of a few lines
 * (family_hooks.c). tm_family_find and its kin are in family.c.
 * docs/how-to-add-a-family.md goes through one. */
#include "common/check.h"
#include "engine/model/arch.h"
#include "engine/model/family_hooks.h"

#define L "model.layers.%d."

/* Groups of rows that several families share. */
#define ROW(name, role, part, need)                                                                \
    {                                                                                              \
        name, TM_ROLE_##role, TM_PART_##part, TM_NEED_##need                                       \
    }
#define ROWS_ENDS                                                                                  \
    ROW("model.embed_tokens.weight", EMBED, WHOLE, ALWAYS),                                        \
        ROW("model.norm.weight", FINAL_NORM, WHOLE, ALWAYS),                                       \
        ROW("lm_head.weight", HEAD, WHOLE, HEAD)
#define ROWS_NORMS                                                                                 \
    ROW(L "input_layernorm.weight", ATTN_NORM, WHOLE, ALWAYS),                                     \
        ROW(L "post_attention_layernorm.weight", FFN_NORM, WHOLE, ALWAYS)
#define ROWS_QKV                                                                                   \
    ROW(L "self_attn.q_proj.weight", QKV, Q, ALWAYS),                                              \
        ROW(L "self_attn.k_proj.weight", QKV, K, ALWAYS),                                          \
        ROW(L "self_attn.v_proj.weight", QKV, V, ALWAYS),                                          \
        ROW(L "self_attn.q_proj.bias", QKV_BIAS, Q, QKV_BIAS),                                     \
        ROW(L "self_attn.k_proj.bias", QKV_BIAS, K, QKV_BIAS),                                     \
        ROW(L "self_attn.v_proj.bias", QKV_BIAS, V, QKV_BIAS)
#define ROWS_QK_NORM                                                                               \
    ROW(L "self_attn.q_norm.weight", Q_NORM, WHOLE, ALWAYS),                                       \
        ROW(L "self_attn.k_norm.weight", K_NORM, WHOLE, ALWAYS)
#define ROWS_O                                                                                     \
    ROW(L "self_attn.o_proj.weight", O, WHOLE, ALWAYS),                                            \
        ROW(L "self_attn.o_proj.bias", O_BIAS, WHOLE, O_BIAS)
#define ROWS_MLP                                                                                   \
    ROW(L "mlp.gate_proj.weight", GATE_UP, GATE, DENSE),                                           \
        ROW(L "mlp.up_proj.weight", GATE_UP, UP, DENSE),                                           \
        ROW(L "mlp.gate_proj.bias", GATE_UP_BIAS, GATE, MLP_BIAS),                                 \
        ROW(L "mlp.up_proj.bias", GATE_UP_BIAS, UP, MLP_BIAS),                                     \
        ROW(L "mlp.down_proj.weight", DOWN, WHOLE, DENSE),                                         \
        ROW(L "mlp.down_proj.bias", DOWN_BIAS, WHOLE, MLP_BIAS)
#define ROWS_MLP_FUSED                                                                             \
    ROW(L "mlp.gate_up_proj.weight", GATE_UP, WHOLE, ALWAYS),                                      \
        ROW(L "mlp.down_proj.weight", DOWN, WHOLE, ALWAYS)
#define ROWS_EXPERTS                                                                               \
    ROW(L "mlp.gate.weight", ROUTER, WHOLE, MOE),                                                  \
        ROW(L "mlp.experts.%d.gate_proj.weight", EXPERTS_GATE_UP, EXPERT_GATE, MOE_EACH),          \
        ROW(L "mlp.experts.%d.up_proj.weight", EXPERTS_GATE_UP, EXPERT_UP, MOE_EACH),              \
        ROW(L "mlp.experts.%d.down_proj.weight", EXPERTS_DOWN, EXPERT_DOWN, MOE_EACH),             \
        ROW(L "mlp.experts.gate_up_proj", EXPERTS_GATE_UP, EXPERTS_GATE_UP, MOE_STACKED),          \
        ROW(L "mlp.experts.down_proj", EXPERTS_DOWN, EXPERTS_DOWN, MOE_STACKED)
#define ROWS_SHARED(name)                                                                          \
    ROW(L name ".gate_proj.weight", SHARED_GATE_UP, GATE, SHARED),                                 \
        ROW(L name ".up_proj.weight", SHARED_GATE_UP, UP, SHARED),                                 \
        ROW(L name ".down_proj.weight", SHARED_DOWN, WHOLE, SHARED)

/* Llama's names; InternLM 1 and 3, Mistral, Qwen 2 and Gemma 1 have the same. */
static const tm_tensor_row llama_rows[] = {ROWS_ENDS, ROWS_NORMS, ROWS_QKV, ROWS_O, ROWS_MLP};

static const tm_tensor_row qwen3_rows[] = {ROWS_ENDS,    ROWS_NORMS, ROWS_QKV,
                                           ROWS_QK_NORM, ROWS_O,     ROWS_MLP};

static const tm_tensor_row qwen3_moe_rows[] = {ROWS_ENDS, ROWS_NORMS, ROWS_QKV,    ROWS_QK_NORM,
                                               ROWS_O,    ROWS_MLP,   ROWS_EXPERTS};

static const tm_tensor_row qwen2_moe_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_QKV,
    ROWS_O,
    ROWS_MLP,
    ROWS_EXPERTS,
    ROWS_SHARED("mlp.shared_expert"),
    ROW(L "mlp.shared_expert_gate.weight", SHARED_GATE, WHOLE, SHARED_GATE),
};

static const tm_tensor_row deepseek_rows[] = {ROWS_ENDS,
                                              ROWS_NORMS,
                                              ROWS_QKV,
                                              ROWS_O,
                                              ROWS_MLP,
                                              ROWS_EXPERTS,
                                              ROWS_SHARED("mlp.shared_experts")};

/* kv_b is read twice: it becomes two weights. */
static const tm_tensor_row deepseek_mla_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROW(L "self_attn.q_proj.weight", Q_B, MLA_Q, Q_PLAIN),
    ROW(L "self_attn.q_a_proj.weight", Q_A, WHOLE, Q_LORA),
    ROW(L "self_attn.q_a_layernorm.weight", Q_A_NORM, WHOLE, Q_LORA),
    ROW(L "self_attn.q_b_proj.weight", Q_B, MLA_Q, Q_LORA),
    ROW(L "self_attn.kv_a_proj_with_mqa.weight", KV_A, MLA_KV_A, ALWAYS),
    ROW(L "self_attn.kv_a_layernorm.weight", KV_A_NORM, WHOLE, ALWAYS),
    ROW(L "self_attn.kv_b_proj.weight", KV_B_K, MLA_KV_B, ALWAYS),
    ROW(L "self_attn.kv_b_proj.weight", KV_B_V, MLA_KV_B, ALWAYS),
    ROWS_O,
    ROWS_MLP,
    ROWS_EXPERTS,
    ROW(L "mlp.gate.e_score_correction_bias", CHOICE_BIAS, WHOLE, CHOICE_BIAS),
    ROWS_SHARED("mlp.shared_experts"),
};

static const tm_tensor_row mixtral_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_QKV,
    ROWS_O,
    ROW(L "block_sparse_moe.gate.weight", ROUTER, WHOLE, MOE),
    ROW(L "block_sparse_moe.experts.%d.w1.weight", EXPERTS_GATE_UP, EXPERT_GATE, MOE),
    ROW(L "block_sparse_moe.experts.%d.w3.weight", EXPERTS_GATE_UP, EXPERT_UP, MOE),
    ROW(L "block_sparse_moe.experts.%d.w2.weight", EXPERTS_DOWN, EXPERT_DOWN, MOE),
};

static const tm_tensor_row glm_rows[] = {ROWS_ENDS, ROWS_NORMS, ROWS_QKV, ROWS_O, ROWS_MLP_FUSED};

static const tm_tensor_row glm4_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_QKV,
    ROWS_O,
    ROWS_MLP_FUSED,
    ROW(L "post_self_attn_layernorm.weight", POST_ATTN_NORM, WHOLE, ALWAYS),
    ROW(L "post_mlp_layernorm.weight", POST_FFN_NORM, WHOLE, ALWAYS),
};

/* Here post_attention_layernorm acts on the attention's output. */
#define ROWS_FOUR_NORMS                                                                            \
    ROW(L "input_layernorm.weight", ATTN_NORM, WHOLE, ALWAYS),                                     \
        ROW(L "post_attention_layernorm.weight", POST_ATTN_NORM, WHOLE, ALWAYS),                   \
        ROW(L "pre_feedforward_layernorm.weight", FFN_NORM, WHOLE, ALWAYS),                        \
        ROW(L "post_feedforward_layernorm.weight", POST_FFN_NORM, WHOLE, ALWAYS)

static const tm_tensor_row gemma2_rows[] = {ROWS_ENDS, ROWS_FOUR_NORMS, ROWS_QKV, ROWS_O, ROWS_MLP};

static const tm_tensor_row gemma3_rows[] = {ROWS_ENDS,    ROWS_FOUR_NORMS, ROWS_QKV,
                                            ROWS_QK_NORM, ROWS_O,          ROWS_MLP};

static const tm_tensor_row baichuan_rows[] = {
    ROWS_ENDS, ROWS_NORMS, ROWS_O, ROWS_MLP, ROW(L "self_attn.W_pack.weight", QKV, WHOLE, ALWAYS),
};

static const tm_tensor_row phi3_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_O,
    ROWS_MLP_FUSED,
    ROW(L "self_attn.qkv_proj.weight", QKV, WHOLE, ALWAYS),
};

static const tm_tensor_row internlm2_rows[] = {
    ROW("model.tok_embeddings.weight", EMBED, WHOLE, ALWAYS),
    ROW("model.norm.weight", FINAL_NORM, WHOLE, ALWAYS),
    ROW("output.weight", HEAD, WHOLE, HEAD),
    ROW(L "attention_norm.weight", ATTN_NORM, WHOLE, ALWAYS),
    ROW(L "attention.wqkv.weight", QKV, QKV_GROUPED, ALWAYS),
    ROW(L "attention.wqkv.bias", QKV_BIAS, QKV_GROUPED, QKV_BIAS),
    ROW(L "attention.wo.weight", O, WHOLE, ALWAYS),
    ROW(L "attention.wo.bias", O_BIAS, WHOLE, O_BIAS),
    ROW(L "ffn_norm.weight", FFN_NORM, WHOLE, ALWAYS),
    ROW(L "feed_forward.w1.weight", GATE_UP, GATE, ALWAYS),
    ROW(L "feed_forward.w3.weight", GATE_UP, UP, ALWAYS),
    ROW(L "feed_forward.w2.weight", DOWN, WHOLE, ALWAYS),
};

/* Workspaces have Llama's names, too; experts may have a gated shared one beside them. */
static const tm_tensor_row workspace_norm_rows[] = {
    ROWS_ENDS,
    ROWS_NORMS,
    ROWS_QKV,
    ROWS_QK_NORM,
    ROWS_O,
    ROWS_MLP,
    ROWS_EXPERTS,
    ROWS_SHARED("mlp.shared_expert"),
    ROW(L "mlp.shared_expert_gate.weight", SHARED_GATE, WHOLE, SHARED_GATE),
};

#undef L
#define L "transformer.h.%d."

/* w2 is the activated branch, w1 the linear one. */
static const tm_tensor_row qwen_rows[] = {
    ROW("transformer.wte.weight", EMBED, WHOLE, ALWAYS),
    ROW("transformer.ln_f.weight", FINAL_NORM, WHOLE, ALWAYS),
    ROW("lm_head.weight", HEAD, WHOLE, HEAD),
    ROW(L "ln_1.weight", ATTN_NORM, WHOLE, ALWAYS),
    ROW(L "attn.c_attn.weight", QKV, WHOLE, ALWAYS),
    ROW(L "attn.c_attn.bias", QKV_BIAS, WHOLE, ALWAYS),
    ROW(L "attn.c_proj.weight", O, WHOLE, ALWAYS),
    ROW(L "ln_2.weight", FFN_NORM, WHOLE, ALWAYS),
    ROW(L "mlp.w2.weight", GATE_UP, GATE, ALWAYS),
    ROW(L "mlp.w1.weight", GATE_UP, UP, ALWAYS),
    ROW(L "mlp.c_proj.weight", DOWN, WHOLE, ALWAYS),
};

/* Grouped covers all three orders: one group of all queries (7B), kv groups (40B), a group per head (RW). */
static const tm_tensor_row falcon_rows[] = {
    ROW("transformer.word_embeddings.weight", EMBED, WHOLE, ALWAYS),
    ROW("transformer.ln_f.weight", FINAL_NORM, WHOLE, ALWAYS),
    ROW("transformer.ln_f.bias", FINAL_NORM_BIAS, WHOLE, ALWAYS),
    ROW("lm_head.weight", HEAD, WHOLE, HEAD),
    ROW(L "input_layernorm.weight", ATTN_NORM, WHOLE, NOT_PARALLEL2),
    ROW(L "input_layernorm.bias", ATTN_NORM_BIAS, WHOLE, NOT_PARALLEL2),
    ROW(L "ln_attn.weight", ATTN_NORM, WHOLE, PARALLEL2),
    ROW(L "ln_attn.bias", ATTN_NORM_BIAS, WHOLE, PARALLEL2),
    ROW(L "ln_mlp.weight", FFN_NORM, WHOLE, PARALLEL2),
    ROW(L "ln_mlp.bias", FFN_NORM_BIAS, WHOLE, PARALLEL2),
    ROW(L "post_attention_layernorm.weight", FFN_NORM, WHOLE, SEQUENTIAL),
    ROW(L "post_attention_layernorm.bias", FFN_NORM_BIAS, WHOLE, SEQUENTIAL),
    ROW(L "self_attention.query_key_value.weight", QKV, QKV_GROUPED, ALWAYS),
    ROW(L "self_attention.query_key_value.bias", QKV_BIAS, QKV_GROUPED, QKV_BIAS),
    ROW(L "self_attention.dense.weight", O, WHOLE, ALWAYS),
    ROW(L "self_attention.dense.bias", O_BIAS, WHOLE, O_BIAS),
    ROW(L "mlp.dense_h_to_4h.weight", GATE_UP, WHOLE, ALWAYS),
    ROW(L "mlp.dense_h_to_4h.bias", GATE_UP_BIAS, WHOLE, MLP_BIAS),
    ROW(L "mlp.dense_4h_to_h.weight", DOWN, WHOLE, ALWAYS),
    ROW(L "mlp.dense_4h_to_h.bias", DOWN_BIAS, WHOLE, MLP_BIAS),
};

#undef L
#define L "transformer.encoder.layers.%d."

static const tm_tensor_row chatglm_rows[] = {
    ROW("transformer.embedding.word_embeddings.weight", EMBED, WHOLE, ALWAYS),
    ROW("transformer.encoder.final_layernorm.weight", FINAL_NORM, WHOLE, ALWAYS),
    ROW("transformer.output_layer.weight", HEAD, WHOLE, HEAD),
    ROW(L "input_layernorm.weight", ATTN_NORM, WHOLE, ALWAYS),
    ROW(L "self_attention.query_key_value.weight", QKV, WHOLE, ALWAYS),
    ROW(L "self_attention.query_key_value.bias", QKV_BIAS, WHOLE, QKV_BIAS),
    ROW(L "self_attention.dense.weight", O, WHOLE, ALWAYS),
    ROW(L "self_attention.dense.bias", O_BIAS, WHOLE, O_BIAS),
    ROW(L "post_attention_layernorm.weight", FFN_NORM, WHOLE, ALWAYS),
    ROW(L "mlp.dense_h_to_4h.weight", GATE_UP, WHOLE, ALWAYS),
    ROW(L "mlp.dense_h_to_4h.bias", GATE_UP_BIAS, WHOLE, MLP_BIAS),
    ROW(L "mlp.dense_4h_to_h.weight", DOWN, WHOLE, ALWAYS),
    ROW(L "mlp.dense_4h_to_h.bias", DOWN_BIAS, WHOLE, MLP_BIAS),
};

#undef L
#define L "transformer.blocks.%d."

static const tm_tensor_row dbrx_rows[] = {
    ROW("transformer.wte.weight", EMBED, WHOLE, ALWAYS),
    ROW("transformer.norm_f.weight", FINAL_NORM, WHOLE, ALWAYS),
    ROW("lm_head.weight", HEAD, WHOLE, HEAD),
    ROW(L "norm_attn_norm.norm_1.weight", ATTN_NORM, WHOLE, ALWAYS),
    ROW(L "norm_attn_norm.attn.Wqkv.weight", QKV, WHOLE, ALWAYS),
    ROW(L "norm_attn_norm.attn.out_proj.weight", O, WHOLE, ALWAYS),
    ROW(L "norm_attn_norm.norm_2.weight", FFN_NORM, WHOLE, ALWAYS),
    ROW(L "ffn.router.layer.weight", ROUTER, WHOLE, MOE),
    ROW(L "ffn.experts.mlp.w1", EXPERTS_GATE_UP, EXPERTS_GATE, MOE),
    ROW(L "ffn.experts.mlp.v1", EXPERTS_GATE_UP, EXPERTS_UP, MOE),
    ROW(L "ffn.experts.mlp.w2", EXPERTS_DOWN, EXPERTS_DOWN_T, MOE),
};

#undef L

/* ---- families ---- */

/* The defaults that nearly all decoder families share. */
#define USUAL(table)                                                                               \
    .rows = table, .row_count = (int)TM_ARRAY_LEN(table), .gated = true, .eps = 1e-6,              \
    .rope_base = 10000.0
#define UNTIED .tie = {"tie_word_embeddings", false}
#define TIED   .tie = {"tie_word_embeddings", true}

const tm_family tm_families[] = {
    {
        .name = "llama",
        .title = "Llama 1/2/3/3.1/3.2, Code Llama, Yi, DeepSeek LLM and Coder v1",
        .archs = {"LlamaForCausalLM", "LLaMAForCausalLM"},
        .model_types = {"llama"},
        .qkv_bias = {"attention_bias", false},
        .o_bias = {"attention_bias", false},
        .mlp_bias = {"mlp_bias", false},
        USUAL(llama_rows),
        UNTIED,
    },
    {
        .name = "mistral",
        .title = "Mistral, Mistral-Nemo",
        .archs = {"MistralForCausalLM"},
        .model_types = {"mistral"},
        .window = TM_WINDOW_ALL,
        USUAL(llama_rows),
        UNTIED,
    },
    {
        .name = "mixtral",
        .title = "Mixtral",
        .archs = {"MixtralForCausalLM"},
        .model_types = {"mixtral"},
        .window = TM_WINDOW_ALL,
        .norm_topk = {NULL, true},
        USUAL(mixtral_rows),
        UNTIED,
    },
    {
        .name = "qwen",
        .title = "Qwen (v1)",
        .archs = {"QWenLMHeadModel"},
        .model_types = {"qwen"},
        .qkv_bias = {NULL, true},
        .shape = tm_family_qwen_shape,
        .adjust = tm_family_qwen_adjust,
        USUAL(qwen_rows),
        UNTIED,
    },
    {
        .name = "qwen2",
        .title = "Qwen1.5, Qwen2, Qwen2.5",
        .archs = {"Qwen2ForCausalLM"},
        .model_types = {"qwen2"},
        .qkv_bias = {NULL, true}, /* no key announces it */
        .window = TM_WINDOW_QWEN2,
        USUAL(llama_rows),
        UNTIED,
    },
    {
        .name = "qwen2_moe",
        .title = "Qwen1.5-MoE, Qwen2-MoE",
        .archs = {"Qwen2MoeForCausalLM"},
        .model_types = {"qwen2_moe"},
        .qkv_bias = {NULL, true},
        .window = TM_WINDOW_QWEN2,
        .sparse = TM_SPARSE_QWEN,
        .norm_topk = {"norm_topk_prob", false},
        .shared_gate = true,
        USUAL(qwen2_moe_rows),
        UNTIED,
    },
    {
        .name = "qwen3",
        .title = "Qwen3",
        .archs = {"Qwen3ForCausalLM"},
        .model_types = {"qwen3"},
        .qkv_bias = {"attention_bias", false},
        .o_bias = {"attention_bias", false},
        .window = TM_WINDOW_QWEN2,
        .head_dim = 128,
        USUAL(qwen3_rows),
        UNTIED,
    },
    {
        .name = "qwen3_moe",
        .title = "Qwen3-MoE",
        .archs = {"Qwen3MoeForCausalLM"},
        .model_types = {"qwen3_moe"},
        .qkv_bias = {"attention_bias", false},
        .o_bias = {"attention_bias", false},
        .window = TM_WINDOW_QWEN2,
        .sparse = TM_SPARSE_QWEN,
        .norm_topk = {"norm_topk_prob", false},
        USUAL(qwen3_moe_rows),
        UNTIED,
    },
    {
        .name = "internlm",
        .title = "InternLM 1",
        .archs = {"InternLMForCausalLM"},
        .model_types = {"internlm"},
        .qkv_bias = {"bias", true},
        .o_bias = {"bias", true},
        USUAL(llama_rows),
        UNTIED,
    },
    {
        .name = "internlm2",
        .title = "InternLM 2, InternLM 2.5",
        .archs = {"InternLM2ForCausalLM"},
        .model_types = {"internlm2"},
        .qkv_bias = {"bias", true},
        .o_bias = {"bias", true},
        USUAL(internlm2_rows),
        UNTIED,
    },
    {
        .name = "internlm3",
        .title = "InternLM 3",
        .archs = {"InternLM3ForCausalLM"},
        .model_types = {"internlm3"},
        .qkv_bias = {"qkv_bias", false},
        .o_bias = {"qkv_bias", false},
        .mlp_bias = {"bias", false},
        USUAL(llama_rows),
        UNTIED,
    },
    {
        .name = "baichuan7b",
        .title = "Baichuan 7B",
        .archs = {"BaiChuanForCausalLM"}, /* with a capital C */
        USUAL(baichuan_rows),
        UNTIED,
    },
    {
        .name = "baichuan",
        .title = "Baichuan 13B, Baichuan2 7B/13B",
        .archs = {"BaichuanForCausalLM"},
        .model_types = {"baichuan"},
        .adjust = tm_family_baichuan_adjust,
        USUAL(baichuan_rows),
        UNTIED,
    },
    {
        .name = "chatglm",
        .title = "ChatGLM2, ChatGLM3, GLM-4 (original format)",
        .archs = {"ChatGLMModel", "ChatGLMForConditionalGeneration"},
        .model_types = {"chatglm"},
        .qkv_bias = {"add_qkv_bias", false},
        .o_bias = {"add_bias_linear", false},
        .mlp_bias = {"add_bias_linear", false},
        .rope_interleaved = true,
        .rotary_share = 0.5,
        .shape = tm_family_chatglm_shape,
        .adjust = tm_family_chatglm_adjust,
        USUAL(chatglm_rows),
        UNTIED,
    },
    {
        .name = "glm",
        .title = "GLM-4",
        .archs = {"GlmForCausalLM"},
        .model_types = {"glm"},
        .qkv_bias = {"attention_bias", false},
        .rope_interleaved = true,
        .rotary_share = 0.5, /* even when no key says so */
        USUAL(glm_rows),
        UNTIED,
    },
    {
        .name = "glm4",
        .title = "GLM-4-0414",
        .archs = {"Glm4ForCausalLM"},
        .model_types = {"glm4"},
        .qkv_bias = {"attention_bias", false},
        .rope_interleaved = true,
        .rotary_share = 0.5,
        USUAL(glm4_rows),
        UNTIED,
    },
    {
        .name = "falcon",
        .title = "Falcon 7B/11B/40B/180B, Falcon-RW",
        .archs = {"FalconForCausalLM", "RWForCausalLM"},
        .model_types = {"falcon", "RefinedWebModel", "RefinedWeb"},
        .qkv_bias = {"bias", false},
        .o_bias = {"bias", false},
        .mlp_bias = {"bias", false},
        .norm = TM_NORM_LAYER,
        .act = TM_ACT_GELU_ERF,
        .max_positions = 2048,
        .shape = tm_family_falcon_shape,
        .adjust = tm_family_falcon_adjust,
        .rows = falcon_rows,
        .row_count = (int)TM_ARRAY_LEN(falcon_rows),
        .eps = 1e-5,
        .rope_base = 10000.0,
        TIED,
    },
    {
        .name = "gemma",
        .title = "Gemma 1",
        .archs = {"GemmaForCausalLM"},
        .model_types = {"gemma"},
        .norm_add_one = true,
        .act = TM_ACT_GELU_TANH,
        .gelu_is_tanh = true,
        .embed_sqrt = true,
        .head_dim = 256,
        USUAL(llama_rows),
        TIED,
    },
    {
        .name = "gemma2",
        .title = "Gemma 2",
        .archs = {"Gemma2ForCausalLM"},
        .model_types = {"gemma2"},
        .norm_add_one = true,
        .act = TM_ACT_GELU_TANH,
        .gelu_is_tanh = true,
        .embed_sqrt = true,
        .head_dim = 256,
        .window = TM_WINDOW_EVEN,
        .window_len = 4096,
        .query_scalar = 256.0,
        .attn_softcap = 50.0,
        .head_softcap = 30.0,
        USUAL(gemma2_rows),
        TIED,
    },
    {
        .name = "gemma3",
        .title = "Gemma 3 (text)",
        .archs = {"Gemma3ForCausalLM",
                  "Gemma3ForConditionalGeneration"}, /* of the latter the text */
        .model_types = {"gemma3_text", "gemma3"},
        .norm_add_one = true,
        .act = TM_ACT_GELU_TANH,
        .gelu_is_tanh = true,
        .embed_sqrt = true,
        .heads = 8,
        .kv_heads = 4,
        .head_dim = 256,
        .vocab = 262208,
        .max_positions = 131072,
        .window = TM_WINDOW_PATTERN,
        .window_len = 4096,
        .pattern = 6,
        .query_scalar = 256.0,
        .rows = gemma3_rows,
        .row_count = (int)TM_ARRAY_LEN(gemma3_rows),
        .gated = true,
        .eps = 1e-6,
        .rope_base = 1e6,
        TIED,
    },
    {
        .name = "deepseek",
        .title = "DeepSeek-MoE (v1)",
        .archs = {"DeepseekForCausalLM"},
        .model_types = {"deepseek"},
        .qkv_bias = {"attention_bias", false},
        .o_bias = {"attention_bias", false},
        .sparse = TM_SPARSE_DEEPSEEK,
        .norm_topk = {"norm_topk_prob", false},
        .adjust = tm_family_deepseek_adjust,
        USUAL(deepseek_rows),
        UNTIED,
    },
    {
        .name = "deepseek2",
        .title = "DeepSeek-V2, DeepSeek-V2-Lite",
        .archs = {"DeepseekV2ForCausalLM"},
        .model_types = {"deepseek_v2"},
        .sparse = TM_SPARSE_DEEPSEEK,
        .norm_topk = {"norm_topk_prob", false},
        .rope_interleaved = true,
        .adjust = tm_family_deepseek_mla_adjust,
        USUAL(deepseek_mla_rows),
        UNTIED,
    },
    {
        .name = "deepseek3",
        .title = "DeepSeek-V3, DeepSeek-R1",
        .archs = {"DeepseekV3ForCausalLM"},
        .model_types = {"deepseek_v3"},
        .sparse = TM_SPARSE_DEEPSEEK,
        .norm_topk = {"norm_topk_prob", true},
        .rope_interleaved = true,
        .adjust = tm_family_deepseek_mla_adjust,
        USUAL(deepseek_mla_rows),
        UNTIED,
    },
    {
        .name = "dbrx",
        .title = "DBRX",
        .archs = {"DbrxForCausalLM"},
        .model_types = {"dbrx"},
        .norm = TM_NORM_LAYER,
        .norm_topk = {NULL, true},
        .adjust = tm_family_dbrx_adjust,
        .rows = dbrx_rows,
        .row_count = (int)TM_ARRAY_LEN(dbrx_rows),
        .gated = true,
        .eps = 1e-5,
        .rope_base = 10000.0,
        UNTIED,
    },
    {
        .name = "phi3",
        .title = "Phi-3, Phi-3.5",
        .archs = {"Phi3ForCausalLM"},
        .model_types = {"phi3"},
        .window = TM_WINDOW_ALL,
        USUAL(phi3_rows),
        UNTIED,
    },
};

const int tm_family_count = (int)TM_ARRAY_LEN(tm_families);

/* ---- workspaces ---- */

const tm_family *tm_workspace_family(bool qk_norm)
{
    static const tm_family plain = {.name = "workspace",
                                    .title = "a TurboMind workspace",
                                    .archs = {"TurboMind"},
                                    USUAL(qwen2_moe_rows)};
    static const tm_family norm = {.name = "workspace",
                                   .title = "a TurboMind workspace",
                                   .archs = {"TurboMind"},
                                   USUAL(workspace_norm_rows)};
    return qk_norm ? &norm : &plain;
}
