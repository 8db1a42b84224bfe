/* A model's folder, of Hugging Face or a TurboMind workspace: its config as tm_arch, and its tensors. */
#ifndef TM_ENGINE_MODEL_FOLDER_H
#define TM_ENGINE_MODEL_FOLDER_H

#include "engine/model/arch.h"
#include "engine/weights/checkpoint.h"

typedef struct tm_folder {
    char dir[4096], text_dir[4096]; /* of config.json and the tokenizer */
    char name[128];                 /* the folder's, of a workspace the model's own */
    json_t *config;          /* config.json; of a workspace without one, what stands for it */
    tm_ws_config *workspace; /* NULL: a Hugging Face folder */
    bool has_config;         /* the workspace has a config.json beside its tokenizer */
} tm_folder;

/* Reads the config. Messages name file and key. *f is freed with tm_folder_close also after a failure. */
tm_status tm_folder_open(tm_folder *f, const char *dir, tm_arch *arch, tm_err *err);
/* Finds the tensors of the model that arch describes. */
tm_status tm_folder_checkpoint(const tm_folder *f, const tm_arch *arch, tm_checkpoint **out,
                               tm_err *err);
void tm_folder_close(tm_folder *f);

/* Does the family fit the format? Names what it has no word for. yaml: config.yaml rather than config.ini. */
tm_status tm_workspace_can_hold(const tm_arch *a, bool yaml, tm_err *err);

/* workspace_arch.c: what the workspace's own config says beats config.json, which says what it cannot. */
tm_status tm_workspace_stand_in(const tm_ws_config *c, json_t **out, tm_err *err);
tm_status tm_workspace_settle(tm_arch *a, const tm_ws_config *c, bool has_config, tm_err *err);

#endif
