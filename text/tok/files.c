/* The text files of a model folder: which ones are read, in one list, so that a folder and a set of files
 * fetched from a worker make the same tokenizer. */
#include "text/tok/files.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/model_dir.h"

static const struct {
    const char *name;
    size_t max;
} known[] = {
    {"tokenizer.json", (size_t)64 << 20},
    {"tokenizer.model", (size_t)64 << 20},
    {"tokenizer_config.json", (size_t)16 << 20},
    {"special_tokens_map.json", (size_t)4 << 20},
    {"added_tokens.json", (size_t)16 << 20},
    {"chat_template.jinja", (size_t)1 << 20},
    {"chat_template.json", (size_t)1 << 20},
    {TM_TEXT_TOOLS_FILE, (size_t)1 << 20},
    {"config.json", (size_t)4 << 20},
    {"vocab.json", (size_t)64 << 20},
    {"merges.txt", (size_t)64 << 20},
    {"tekken.json", (size_t)64 << 20},
};

static tm_status add_file(tm_text_files *f, const char *dir, const char *name, size_t max,
                          tm_err *err)
{
    char path[4096];
    char *data;
    size_t len;
    if (!tm_path_join(path, sizeof(path), dir, name))
        return TM_FAIL(err, TM_STATUS_CONFIG, "the path of %s is too long", name);
    if (!tm_file_exists(path))
        return TM_OK;
    if (f->count == TM_TEXT_FILES_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "%s: more than %d tokenizer files", dir,
                       TM_TEXT_FILES_MAX);
    TM_TRY(tm_file_read(path, max, &data, &len, err));
    char *copy = strdup(name);
    if (!copy) {
        free(data);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    f->v[f->count++] = (tm_text_file){copy, data, len};
    return TM_OK;
}

/* tiktoken files have no fixed name ("qwen.tiktoken"). */
static tm_status add_tiktoken(tm_text_files *f, const char *dir, tm_err *err)
{
    DIR *d = opendir(dir);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s: cannot be opened as a folder", dir);
    tm_status st = TM_OK;
    struct dirent *e;
    while (st == TM_OK && (e = readdir(d))) {
        size_t n = strlen(e->d_name);
        if (n > 9 && strcmp(e->d_name + n - 9, ".tiktoken") == 0)
            st = add_file(f, dir, e->d_name, (size_t)64 << 20, err);
    }
    closedir(d);
    return st;
}

/* A workspace's config names its template; here that is a file like the others. */
static tm_status add_name(tm_text_files *f, const char *dir, tm_err *err)
{
    char name[128];
    tm_model_template_name(name, sizeof(name), dir);
    if (!name[0] || f->count == TM_TEXT_FILES_MAX)
        return TM_OK;
    char *file = strdup(TM_MODEL_TEMPLATE_FILE), *data = strdup(name);
    if (!file || !data) {
        free(file);
        free(data);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    f->v[f->count++] = (tm_text_file){file, data, strlen(data)};
    return TM_OK;
}

tm_status tm_text_files_load(tm_text_files *out, const char *dir, tm_err *err)
{
    tm_text_files f = {0};
    char text_dir[4096];
    if (!tm_model_text_dir(text_dir, sizeof(text_dir), dir))
        return TM_FAIL(err, TM_STATUS_CONFIG, "the path of the model folder is too long");
    tm_status st = add_tiktoken(&f, text_dir, err);
    for (size_t i = 0; i < TM_ARRAY_LEN(known) && st == TM_OK; i++)
        st = add_file(&f, text_dir, known[i].name, known[i].max, err);
    if (st == TM_OK)
        st = add_name(&f, dir, err);
    if (st != TM_OK) {
        tm_text_files_deinit(&f);
        return st;
    }
    *out = f;
    return TM_OK;
}

void tm_text_files_deinit(tm_text_files *f)
{
    for (int i = 0; i < f->count; i++) {
        free((char *)(uintptr_t)f->v[i].name);
        free((char *)(uintptr_t)f->v[i].data);
    }
    f->count = 0;
}

tm_status tm_tokenizer_load(tm_tokenizer **out, const char *dir, tm_err *err)
{
    tm_text_files f = {0};
    TM_TRY(tm_text_files_load(&f, dir, err));
    tm_status st = tm_tokenizer_create(out, f.v, f.count, err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", dir);
    tm_text_files_deinit(&f);
    return st;
}
