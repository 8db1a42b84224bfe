/* What config.json says, in one form for every family, and the table of families.
 *
 * tm_arch holds the whole model's numbers; tm_shard (layout.h) one rank's share. A family is a row: the names
 * it goes by, its defaults and rules for what no key announces, and its tensors. The forward pass reads
 * tm_arch alone and never asks for the family. */
#ifndef TM_ENGINE_MODEL_ARCH_H
#define TM_ENGINE_MODEL_ARCH_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "engine/backend/backend.h"

#define TM_LAYERS_MAX 1024

#define TM_LONGROPE_MAX 256 /* pairs of rotated dimensions */

typedef enum tm_rope_type {
    TM_ROPE_DEFAULT,
    TM_ROPE_LINEAR,
    TM_ROPE_DYNAMIC, /* from here on to QWEN: chosen by the sequence's length, see tm_rope_by_length */
    TM_ROPE_LONG,
    TM_ROPE_QWEN, /* dynamic as Qwen v1 has it */
    TM_ROPE_LLAMA3,
    TM_ROPE_YARN
} tm_rope_type;

typedef struct tm_rope {
    tm_rope_type type;
    bool interleaved; /* pairs (2i, 2i + 1) instead of (i, i + dim / 2) */
    int dim;          /* rotated dimensions of a head; 0 = none */
    double base, factor;
    double original; /* positions the model was first trained for */
    double low_freq_factor, high_freq_factor;
    double beta_fast, beta_slow, mscale, mscale_all_dim;
    double attention_factor; /* 0 = derive from factor */
    bool truncate;
    float short_factor[TM_LONGROPE_MAX], long_factor[TM_LONGROPE_MAX];
} tm_rope;

typedef struct tm_layer_arch {
    int window;      /* 0 = sees everything before it */
    bool local_rope; /* rotates by rope_local */
    bool moe;
} tm_layer_arch;

/* What follows the attention's norm: the two blocks one after the other, or side by side on the same x. */
typedef enum tm_block {
    TM_BLOCK_SEQUENTIAL,
    TM_BLOCK_PARALLEL1, /* one norm feeds both */
    TM_BLOCK_PARALLEL2
} tm_block;

typedef struct tm_moe_arch {
    int experts, top_k; /* experts 0: all layers are dense */
    int ffn;            /* width of an expert */
    int shared;         /* width of the shared expert, 0 = none */
    bool shared_gate, choice_bias;
    bool stacked; /* in the checkpoint at hand */
    int groups, top_groups;
    tm_moe_score score;
    tm_group_score group_score;
    bool normalise;
    float scale;
} tm_moe_arch;

/* Latent attention: keys and values of a position are kv_rank shared numbers and rope rotated ones. To the
 * operators it is one kv head of [rope | kv_rank] whose keys are its values. */
typedef struct tm_mla_arch {
    int q_rank; /* 0 = queries straight from x */
    int kv_rank, nope, rope, v;
} tm_mla_arch;

typedef struct tm_family tm_family;

typedef struct tm_arch {
    const tm_family *family;
    char arch[64]; /* "LlamaForCausalLM" */
    int prefix;    /* how the checkpoint at hand names the text model, see load_check.c */
    int hidden, layers, heads, kv_heads, head_dim, ffn, vocab, max_positions;
    int context_max; /* how far a session may be set to go beyond max_positions */
    int v_dim;       /* of a head's output; head_dim but for latent attention */
    tm_norm_kind norm;
    bool norm_add_one;
    float eps;
    tm_block block;
    bool qkv_bias, o_bias, mlp_bias;
    float attn_scale, attn_softcap;
    float clip_qkv; /* 0 = none */
    bool alibi;     /* instead of rope */
    float alibi_scale;
    int logn_len; /* see tm_rope_append_args */
    tm_act_kind act;
    bool gated;
    float embed_scale;
    bool tie;           /* the head is the embedding */
    bool head_apart;    /* the config says that it is not, so it must be stored */
    bool head_norm;     /* rows of the head are divided by their length */
    float head_softcap; /* 0 = none */
    tm_rope rope, rope_local;
    tm_moe_arch moe;
    tm_mla_arch mla; /* kv_rank 0: ordinary attention */
    tm_layer_arch layer[TM_LAYERS_MAX];
} tm_arch;

/* The weight that a tensor becomes, or becomes a part of. Geometry and place: layout.c. */
typedef enum tm_role {
    TM_ROLE_EMBED,
    TM_ROLE_FINAL_NORM,
    TM_ROLE_FINAL_NORM_BIAS,
    TM_ROLE_HEAD,
    TM_ROLE_ATTN_NORM, /* from here on: of a layer */
    TM_ROLE_ATTN_NORM_BIAS,
    TM_ROLE_POST_ATTN_NORM, /* on the attention's output, before it is added */
    TM_ROLE_QKV,
    TM_ROLE_QKV_BIAS,
    TM_ROLE_Q_NORM, /* of each head */
    TM_ROLE_K_NORM,
    TM_ROLE_Q_A, /* latent attention, see tm_mla_arch */
    TM_ROLE_Q_A_NORM,
    TM_ROLE_Q_B, /* per head: its rotated rows, then the others */
    TM_ROLE_KV_A,
    TM_ROLE_KV_A_NORM,
    TM_ROLE_KV_B_K, /* per head: [kv_rank, nope], from a query's part to the latent space */
    TM_ROLE_KV_B_V, /* per head: [v, kv_rank], back */
    TM_ROLE_O,
    TM_ROLE_O_BIAS,
    TM_ROLE_FFN_NORM,
    TM_ROLE_FFN_NORM_BIAS,
    TM_ROLE_POST_FFN_NORM,
    TM_ROLE_GATE_UP,
    TM_ROLE_GATE_UP_BIAS,
    TM_ROLE_DOWN,
    TM_ROLE_DOWN_BIAS,
    TM_ROLE_ROUTER,
    TM_ROLE_CHOICE_BIAS,
    TM_ROLE_EXPERTS_GATE_UP, /* of all experts, one below the other */
    TM_ROLE_EXPERTS_DOWN,
    TM_ROLE_SHARED_GATE_UP,
    TM_ROLE_SHARED_DOWN,
    TM_ROLE_SHARED_GATE,
    TM_ROLE_COUNT
} tm_role;

/* Which rows of the role's weight a tensor holds, and in which order. */
typedef enum tm_part {
    TM_PART_WHOLE, /* in our own order: all q rows, all k rows, all v rows; gate rows, up rows */
    TM_PART_Q,
    TM_PART_K,
    TM_PART_V,
    TM_PART_QKV_GROUPED, /* per kv head: its query heads, its key, its value */
    TM_PART_GATE,
    TM_PART_UP,
    TM_PART_MLA_Q,       /* per head: nope rows, rope rows */
    TM_PART_MLA_KV_A,    /* kv_rank rows, rope rows */
    TM_PART_MLA_KV_B,    /* per head: nope rows of the key, v rows of the value */
    TM_PART_EXPERT_GATE, /* a tensor per expert */
    TM_PART_EXPERT_UP,
    TM_PART_EXPERT_DOWN,
    TM_PART_EXPERTS_GATE_UP, /* [E, 2F, h], gate first */
    TM_PART_EXPERTS_DOWN,    /* [E, h, F] */
    TM_PART_EXPERTS_GATE,    /* of all experts, one below the other */
    TM_PART_EXPERTS_UP,
    TM_PART_EXPERTS_DOWN_T /* the same, each expert's [F, h] to be turned */
} tm_part;

/* When a tensor is needed. A tensor that is not needed is not read. */
typedef enum tm_need {
    TM_NEED_ALWAYS,
    TM_NEED_HEAD, /* unless the head is tied */
    TM_NEED_QKV_BIAS,
    TM_NEED_O_BIAS,
    TM_NEED_DENSE, /* layers without experts */
    TM_NEED_MLP_BIAS,
    TM_NEED_MOE,         /* layers with experts */
    TM_NEED_MOE_EACH,    /* by how the experts are stored: a tensor for each, */
    TM_NEED_MOE_STACKED, /* or one for all, as Transformers 5 may write them */
    TM_NEED_CHOICE_BIAS,
    TM_NEED_SHARED,
    TM_NEED_SHARED_GATE,
    TM_NEED_Q_LORA, /* q_rank > 0 */
    TM_NEED_Q_PLAIN,
    TM_NEED_SEQUENTIAL, /* by block */
    TM_NEED_PARALLEL2,
    TM_NEED_NOT_PARALLEL2
} tm_need;

typedef struct tm_tensor_row {
    const char *pattern; /* the first %d is the layer, the second the expert */
    tm_role role;
    tm_part part;
    tm_need need;
} tm_tensor_row;

typedef struct tm_flag_rule {
    const char *key; /* NULL: no key, the default holds */
    bool def;
} tm_flag_rule;

/* Which layers a sliding_window concerns, when no layer_types says so. */
typedef enum tm_window_rule {
    TM_WINDOW_NONE,   /* the key means nothing */
    TM_WINDOW_ALL,    /* every layer */
    TM_WINDOW_QWEN2,  /* layers >= max_window_layers, only with use_sliding_window */
    TM_WINDOW_EVEN,   /* layers 0, 2, 4, ... */
    TM_WINDOW_PATTERN /* all but every sliding_window_pattern-th; they rotate by rope_local */
} tm_window_rule;

/* Which layers have experts, when there are any. */
typedef enum tm_sparse_rule {
    TM_SPARSE_ALL,
    TM_SPARSE_QWEN,    /* mlp_only_layers, decoder_sparse_step */
    TM_SPARSE_DEEPSEEK /* first_k_dense_replace, moe_layer_freq */
} tm_sparse_rule;

struct tm_family {
    const char *name;
    const char *title;          /* the models it covers, for people */
    const char *archs[6];       /* values of architectures[0] */
    const char *model_types[4]; /* used when architectures is absent */
    const tm_tensor_row *rows;
    int row_count;
    tm_flag_rule qkv_bias, o_bias, mlp_bias, tie, norm_topk;
    tm_window_rule window;
    tm_sparse_rule sparse;
    tm_norm_kind norm;
    tm_act_kind act;
    bool norm_add_one;
    bool gated;
    bool shared_gate;
    bool embed_sqrt;   /* the embedding is multiplied by sqrt(hidden) */
    bool gelu_is_tanh; /* whatever hidden_act says */
    bool rope_interleaved;
    double eps, rope_base, rotary_share; /* defaults of the class */
    /* What released configs leave out; 0 = must be there. */
    int heads, kv_heads, head_dim, vocab, max_positions, window_len, pattern;
    double
        query_scalar; /* not 0: scores are scaled by query_pre_attn_scalar^-0.5, this by default */
    double attn_softcap, head_softcap;
    /* What no other field can say. `shape` runs when sizes are read and may settle some; `adjust` at the end. */
    tm_status (*shape)(tm_arch *a, const json_t *root, tm_err *err);
    tm_status (*adjust)(tm_arch *a, const json_t *root, tm_err *err);
};

/* The table of families.c. */
extern const tm_family tm_families[];
extern const int tm_family_count;

/* Of the tensors of a TurboMind workspace, whatever the model's own family is. */
const tm_family *tm_workspace_family(bool qk_norm);

/* NULL when no row knows the name. */
const tm_family *tm_family_find(const char *arch, const char *model_type);
/* "A, B, C": the architecture names that are closest to this one, for messages. */
void tm_family_closest(const char *arch, char *out, size_t size);
/* Has the family a tensor of this role, in any variant? */
bool tm_family_has(const tm_family *f, tm_role role);

/* Fills *out from config.json's tree; messages name the key. */
tm_status tm_arch_read(tm_arch *out, const json_t *root, tm_err *err);

/* Union of the stop ids of config, generation_config and tokenizer_config; at most `max`, sorted. */
tm_status tm_stop_ids_read(const char *dir, const json_t *config, int vocab, int32_t *ids, int max,
                           int *count, tm_err *err);

/* Does the length of a sequence change its frequencies? */
bool tm_rope_by_length(const tm_rope *r);
/* One length for all that have the same frequencies; 0 = those of the trained length. */
int tm_rope_class(const tm_rope *r, int length);
/* inv_freq[rope.dim / 2] of a sequence of this length (0 = within the trained length), and the factor of cos
 * and sin. */
void tm_rope_freqs_at(const tm_rope *r, int length, float *inv_freq, float *mscale);
void tm_rope_freqs(const tm_rope *r, float *inv_freq, float *mscale); /* at length 0 */

/* What yarn multiplies the scores by in families that leave cos and sin alone (DeepSeek). */
double tm_rope_score_factor(const tm_rope *r);

/* config.c, for the families' hooks: a value by "key" or "object.key"; NULL when absent or null. */
json_t *tm_config_get(const json_t *root, const char *path);
/* Reads a number or a flag into *out if the key is there; refuses other types and numbers outside. */
tm_status tm_config_num(const json_t *root, const char *path, double min, double max, double *out,
                        tm_err *err);
tm_status tm_config_int(const json_t *root, const char *path, int min, int max, int *out,
                        tm_err *err);
tm_status tm_config_flag(const json_t *root, const char *path, bool *out, tm_err *err);

#endif
