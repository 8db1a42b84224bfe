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

typedef enum tm_rope_type {
    TM_ROPE_DEFAULT,
    TM_ROPE_LINEAR,
    TM_ROPE_DYNAMIC, /* equal to default up to max_positions, which is where the context ends here */
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
} tm_rope;

typedef struct tm_layer_arch {
    int window; /* 0 = sees everything before it */
} tm_layer_arch;

typedef struct tm_family tm_family;

typedef struct tm_arch {
    const tm_family *family;
    char arch[64]; /* "LlamaForCausalLM" */
    int hidden, layers, heads, kv_heads, head_dim, ffn, vocab, max_positions;
    tm_norm_kind norm;
    bool norm_add_one;
    float eps;
    bool qkv_bias, o_bias, mlp_bias;
    float attn_scale, attn_softcap;
    tm_act_kind act;
    bool gated;
    float embed_scale;
    bool tie; /* the head is the embedding */
    tm_rope rope;
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
    TM_ROLE_QKV,
    TM_ROLE_QKV_BIAS,
    TM_ROLE_O,
    TM_ROLE_O_BIAS,
    TM_ROLE_FFN_NORM,
    TM_ROLE_FFN_NORM_BIAS,
    TM_ROLE_GATE_UP,
    TM_ROLE_GATE_UP_BIAS,
    TM_ROLE_DOWN,
    TM_ROLE_DOWN_BIAS,
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
    TM_PART_UP
} tm_part;

/* When a tensor is needed. A tensor that is not needed is not read. */
typedef enum tm_need {
    TM_NEED_ALWAYS,
    TM_NEED_HEAD, /* unless the head is tied */
    TM_NEED_QKV_BIAS,
    TM_NEED_O_BIAS,
    TM_NEED_MLP_BIAS
} tm_need;

typedef struct tm_tensor_row {
    const char *pattern; /* %d is the layer */
    tm_role role;
    tm_part part;
    tm_need need;
} tm_tensor_row;

typedef struct tm_flag_rule {
    const char *key; /* NULL: no key, the default holds */
    bool def;
} tm_flag_rule;

typedef enum tm_window_rule {
    TM_WINDOW_NONE, /* a sliding_window key means nothing */
    TM_WINDOW_ALL,  /* every layer */
    TM_WINDOW_QWEN2 /* layers >= max_window_layers, only with use_sliding_window */
} tm_window_rule;

struct tm_family {
    const char *name;
    const char *archs[6];       /* values of architectures[0] */
    const char *model_types[4]; /* used when architectures is absent */
    const tm_tensor_row *rows;
    int row_count;
    tm_flag_rule qkv_bias, o_bias, mlp_bias, tie;
    tm_window_rule window;
    tm_norm_kind norm;
    bool norm_add_one;
    bool gated;
    double eps, rope_base, rotary_share; /* defaults of the class */
    bool rope_interleaved;
};

/* NULL when no row knows the name. */
const tm_family *tm_family_find(const char *arch, const char *model_type);
/* "A, B, C": all architecture names, for messages. */
void tm_family_list(char *out, size_t size);

/* Fills *out from config.json's tree; messages name the key. */
tm_status tm_arch_read(tm_arch *out, const json_t *root, tm_err *err);

/* Union of the stop ids of config, generation_config and tokenizer_config; at most `max`, sorted. */
tm_status tm_stop_ids_read(const char *dir, const json_t *config, int vocab, int32_t *ids, int max,
                           int *count, tm_err *err);

/* inv_freq[rope.dim / 2] and the factor of cos and sin. */
void tm_rope_freqs(const tm_rope *r, float *inv_freq, float *mscale);

#endif
