/* What a workspace's own config says: config.ini (releases up to 0.5) or config.yaml (from 0.6 on). */
#ifndef TM_ENGINE_WEIGHTS_WORKSPACE_CONFIG_H
#define TM_ENGINE_WEIGHTS_WORKSPACE_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"
#include "engine/backend/backend.h"

#define TM_WS_LAYERS_MAX 1024

/* How the head is stored: one file of rows, parts of rows, or parts that are turned. */
typedef enum tm_ws_head { TM_WS_HEAD_ROWS, TM_WS_HEAD_COLUMNS } tm_ws_head;

typedef struct tm_ws_config {
    const char *file; /* "config.ini", "config.yaml" */
    bool yaml;
    char model_name[128], model_arch[64];
    tm_dtype dtype; /* of the files; F32 ones may hold F16 numbers */
    int heads, kv_heads, head_dim, hidden, layers, vocab, embedding;
    int ffn[TM_WS_LAYERS_MAX];     /* 0: the layer has no such part */
    int experts[TM_WS_LAYERS_MAX]; /* 0: none */
    int expert_ffn, top_k;
    bool shared_gate;
    bool attn_bias, qk_norm;
    int tp; /* 0 = not said */
    tm_ws_head head;
    int start_id, end_id; /* -1 = not said */
    int session_len, max_positions, original_positions;
    double eps;
    double rope_base, rope_factor; /* 0 = not said */
    int rope_dim;
    bool dynamic_ntk, logn;
    char rope_type[16];
    int quant_policy;
} tm_ws_config;

/* dir: the workspace's folder of weights. Messages name the file and the key. */
tm_status tm_ws_config_read(tm_ws_config *out, const char *dir, tm_err *err);
/* From the text of the file. */
tm_status tm_ws_config_parse(tm_ws_config *out, const char *text, size_t len, bool yaml,
                             tm_err *err);

#endif
