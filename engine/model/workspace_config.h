/* The config of a workspace that is written. */
#ifndef TM_ENGINE_MODEL_WORKSPACE_CONFIG_H
#define TM_ENGINE_MODEL_WORKSPACE_CONFIG_H

#include "common/buf.h"
#include "engine/model/workspace_write.h"

/* What is stored, where it differs from the model. */
typedef struct tm_workspace_sizes {
    int kv_heads;                /* repeated for more parts than there are heads */
    int ffn, expert_ffn, shared; /* padded */
    int vocab_padded;
} tm_workspace_sizes;

/* Appends config.yaml or config.ini. */
void tm_workspace_config_text(tm_buf *out, const tm_arch *a, const tm_workspace_sizes *z,
                              const tm_workspace_opts *o, const char *weight_type);

#endif
