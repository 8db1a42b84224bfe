/* See model_dir.h. One rule in one place, because the engine, the text library and the worker all ask. */
#include "common/model_dir.h"

#include <stdio.h>

#include "common/file.h"

#define WORKSPACE_MARK "triton_models"
#define PATH_MAX_LEN   4096

bool tm_model_is_workspace(const char *dir)
{
    char path[PATH_MAX_LEN];
    return tm_path_join(path, sizeof(path), dir, WORKSPACE_MARK) && tm_dir_exists(path);
}

static bool part(char *out, size_t size, const char *dir, const char *in_workspace)
{
    if (tm_model_is_workspace(dir))
        return tm_path_join(out, size, dir, in_workspace);
    int n = snprintf(out, size, "%s", dir);
    return n >= 0 && (size_t)n < size;
}

bool tm_model_text_dir(char *out, size_t size, const char *dir)
{
    return part(out, size, dir, WORKSPACE_MARK "/tokenizer");
}

bool tm_model_weights_dir(char *out, size_t size, const char *dir)
{
    return part(out, size, dir, WORKSPACE_MARK "/weights");
}
