/* See model_dir.h. One rule in one place, because the engine, the text library and the worker all ask. */
#include "common/model_dir.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"

#define WORKSPACE_MARK   "triton_models"
#define PATH_MAX_LEN     4096
#define CONFIG_BYTES_MAX ((size_t)1 << 20)

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

/* The value of `key` in a line "key: value" or "key = value" of a config; quotes are taken off. */
static bool find_value(char *out, size_t size, const char *text, const char *key)
{
    size_t n = strlen(key);
    for (const char *line = text; line && *line; line = strchr(line, '\n')) {
        while (isspace((unsigned char)*line))
            line++;
        const char *at = line + n;
        if (strncmp(line, key, n) != 0)
            continue;
        while (*at == ' ')
            at++;
        if (*at != ':' && *at != '=')
            continue;
        at++;
        at += strspn(at, " '\"");
        size_t len = strcspn(at, "\r\n'\"");
        while (len > 0 && at[len - 1] == ' ')
            len--;
        if (len > 0 && len < size) {
            memcpy(out, at, len);
            out[len] = '\0';
            return true;
        }
    }
    return false;
}

void tm_model_template_name(char *out, size_t size, const char *dir)
{
    static const char *const files[] = {"config.yaml", "config.ini"};
    static const char *const keys[] = {"chat_template", "model_name"};
    char weights[PATH_MAX_LEN], path[PATH_MAX_LEN], *text;
    size_t len;
    bool found = false;
    out[0] = '\0';
    if (!tm_model_is_workspace(dir) || !tm_model_weights_dir(weights, sizeof(weights), dir))
        return;
    for (size_t i = 0; i < 2 && !found; i++) {
        if (!tm_path_join(path, sizeof(path), weights, files[i]) || !tm_file_exists(path) ||
            tm_file_read(path, CONFIG_BYTES_MAX, &text, &len, NULL) != TM_OK)
            continue;
        for (size_t k = 0; k < 2 && !found; k++)
            found = find_value(out, size, text, keys[k]);
        free(text);
    }
}
