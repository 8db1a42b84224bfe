/* Opening a model's folder. A workspace becomes an ordinary model here: its config is config.json of the tokenizer's
 * folder (the converter copies it) under what the workspace's own config says, and its tensors have the names of the
 * Llama family. The rest of the engine does not know which kind it was. */
#include "engine/model/folder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "common/model_dir.h"
#include "engine/model/model_impl.h"

#define CONFIG_BYTES_MAX ((size_t)16 << 20)

/* The last component of the folder's real path. */
static void name_of(const char *dir, char *out, size_t size)
{
    char *real = realpath(dir, NULL);
    const char *path = real ? real : dir;
    const char *slash = strrchr(path, '/');
    snprintf(out, size, "%s", slash && slash[1] ? slash + 1 : path);
    free(real);
}

/* config.json of the folder `dir`; absent: NULL. */
static tm_status load_config(tm_folder *f, tm_arch *arch, tm_err *err)
{
    char path[4096 + 16];
    if (!tm_path_join(path, sizeof(path), f->text_dir, "config.json"))
        return TM_FAIL(err, TM_STATUS_CONFIG, "model folder: the path is too long");
    if (!tm_file_exists(path))
        return TM_OK;
    TM_TRY(tm_json_load_file(path, CONFIG_BYTES_MAX, &f->config, err));
    tm_status st = tm_err_of_file(err, tm_arch_read(arch, f->config, err));
    if (st != TM_OK)
        tm_err_prefix(err, "%s", path);
    return st;
}

static tm_status open_workspace(tm_folder *f, tm_arch *arch, tm_err *err)
{
    char weights[4096];
    if (!tm_model_weights_dir(weights, sizeof(weights), f->dir))
        return TM_FAIL(err, TM_STATUS_CONFIG, "model folder: the path is too long");
    f->workspace = calloc(1, sizeof(*f->workspace));
    if (!f->workspace)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    TM_TRY(tm_ws_config_read(f->workspace, weights, err));
    if (f->workspace->model_name[0])
        snprintf(f->name, sizeof(f->name), "%s", f->workspace->model_name);
    TM_TRY(load_config(f, arch, err));
    f->has_config = f->config != NULL;
    if (!f->config) {
        TM_TRY(tm_workspace_stand_in(f->workspace, &f->config, err));
        TM_TRY(tm_arch_read(arch, f->config, err));
    }
    tm_status st = tm_workspace_settle(arch, f->workspace, f->has_config, err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", weights);
    return st;
}

tm_status tm_folder_open(tm_folder *f, const char *dir, tm_arch *arch, tm_err *err)
{
    *f = (tm_folder){.config = NULL};
    if (dir && tm_file_exists(dir))
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s is a file, not a model's folder", dir);
    if (!dir || !tm_dir_exists(dir))
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "model folder %s does not exist", dir ? dir : "?");
    int n = snprintf(f->dir, sizeof(f->dir), "%s", dir);
    if (n < 0 || (size_t)n >= sizeof(f->dir) ||
        !tm_model_text_dir(f->text_dir, sizeof(f->text_dir), dir))
        return TM_FAIL(err, TM_STATUS_CONFIG, "model folder: the path is too long");
    name_of(dir, f->name, sizeof(f->name));
    if (tm_model_is_workspace(dir))
        return open_workspace(f, arch, err);
    TM_TRY(load_config(f, arch, err));
    if (f->config)
        return TM_OK;
    /* The Hugging Face cache keeps a model's files one folder further down. */
    char hub[4096 + 16];
    bool cached = tm_path_join(hub, sizeof(hub), dir, "snapshots") && tm_dir_exists(hub);
    return TM_FAIL(err, TM_STATUS_CONFIG, "%s: no config.json: not a Hugging Face model folder%s",
                   dir, cached ? "; the model is in a folder under snapshots" : "");
}

void tm_folder_close(tm_folder *f)
{
    json_decref(f->config);
    free(f->workspace);
    f->config = NULL;
    f->workspace = NULL;
}

/* The shared expert's width of the first layer that has experts, the width of the dense ones: checked to be the same
 * everywhere by tm_workspace_settle. */
tm_status tm_folder_checkpoint(const tm_folder *f, const tm_arch *a, tm_checkpoint **out,
                               tm_err *err)
{
    char weights[4096];
    if (!f->workspace)
        return tm_checkpoint_open(out, f->dir, err);
    if (!tm_model_weights_dir(weights, sizeof(weights), f->dir))
        return TM_FAIL(err, TM_STATUS_CONFIG, "model folder: the path is too long");
    bool moe[TM_LAYERS_MAX];
    for (int i = 0; i < a->layers; i++)
        moe[i] = a->layer[i].moe;
    const tm_ws_model m = {.layers = a->layers,
                           .hidden = a->hidden,
                           .heads = a->heads,
                           .kv_heads = a->kv_heads,
                           .head_dim = a->head_dim,
                           .ffn = a->ffn,
                           .vocab = a->vocab,
                           .pairs = !a->rope.interleaved,
                           .qkv_bias = a->qkv_bias,
                           .o_bias = a->o_bias,
                           .qk_norm = tm_family_has(a->family, TM_ROLE_Q_NORM),
                           .head = !a->tie,
                           .moe_layer = moe,
                           .experts = a->moe.experts,
                           .moe_ffn = a->moe.ffn,
                           .shared = a->moe.shared,
                           .shared_gate = a->moe.shared_gate};
    return tm_checkpoint_open_workspace(out, weights, f->workspace, &m, err);
}
