/* Writes the weights of a model as a TurboMind workspace holds them. The way back is engine/weights/workspace.h. */
#ifndef TM_ENGINE_MODEL_WORKSPACE_WRITE_H
#define TM_ENGINE_MODEL_WORKSPACE_WRITE_H

#include "engine/model/folder.h"

typedef struct tm_workspace_opts {
    int tp;
    bool yaml; /* config.yaml and the layout of release 0.9, else config.ini and that of 0.1 */
    const char *model_name, *chat_template;
    int start_id, end_id; /* -1: the model's config does not say */
} tm_workspace_opts;

typedef struct tm_workspace_report {
    char arch[64], family[32];
    const char *weight_type; /* "bf16", "fp16" */
    bool rounded;            /* from float32 */
    bool
        scaled_rope; /* config.ini has no words for it: config.json must stay beside the tokenizer */
    int files;
    uint64_t bytes;
} tm_workspace_report;

/* model: a folder of either kind. weights: an empty folder. */
tm_status tm_workspace_write(const char *model, const char *weights, const tm_workspace_opts *opts,
                             tm_workspace_report *report, tm_err *err);

#endif
