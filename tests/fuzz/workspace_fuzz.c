/* Fuzz entry of a workspace: the text of its config, then the files that this config asks for. A file is made as long
 * as a refusal says it must be until the workspace opens; then every tensor is read, whole and in slices, and all
 * numbers must be the zeros that were written. A text that begins with '[' is config.ini. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/check.h"
#include "common/file.h"
#include "common/log.h"
#include "common/model_dir.h"
#include "engine/model/folder.h"

#define NUMBERS_MAX 100000 /* of a model whose files are made */
#define TRIES_MAX   200

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char g_dir[48], g_weights[160];

static void clean(void)
{
    DIR *d = opendir(g_weights);
    TM_ASSERT(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.')
            unlinkat(dirfd(d), e->d_name, 0);
    closedir(d);
}

static void remove_all(void)
{
    char path[80];
    clean();
    rmdir(g_weights);
    snprintf(path, sizeof(path), "%s/triton_models", g_dir);
    rmdir(path);
    rmdir(g_dir);
}

static void make_dir(void)
{
    char path[80];
    if (g_dir[0])
        return;
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-workspace-fuzz-XXXXXX");
    TM_ASSERT(mkdtemp(g_dir));
    snprintf(path, sizeof(path), "%s/triton_models", g_dir);
    TM_ASSERT(mkdir(path, 0700) == 0);
    snprintf(g_weights, sizeof(g_weights), "%s/weights", path);
    TM_ASSERT(mkdir(g_weights, 0700) == 0);
    atexit(remove_all);
}

/* Does what the message asks for; false when it is about something else. */
static bool obey(const char *message)
{
    char name[200], path[400];
    unsigned long has, want = 0;
    int parts = 0, wanted = 0;
    const char *at = strstr(message, g_weights);
    if (!at || strncmp(at + strlen(g_weights), ": ", 2) != 0)
        return false;
    at += strlen(g_weights) + 2;
    if (sscanf(at, "layers.0.attention.w_qkv: %d parts are there, %*s says %d", &parts, &wanted) ==
        2) {
        snprintf(name, sizeof(name), "layers.0.attention.w_qkv.%d.weight is missing", parts);
        at = name;
        if (parts >= wanted)
            return false;
    }
    char copy[200];
    snprintf(copy, sizeof(copy), "%.199s", at);
    at = copy;
    bool size = sscanf(at, "%199s has %lu bytes, expected %lu", name, &has, &want) == 3;
    if (!size && (sscanf(at, "%199s is missing", name) != 1 || !strstr(at, " is missing")))
        return false;
    TM_ASSERT(want <= NUMBERS_MAX * sizeof(float));
    snprintf(path, sizeof(path), "%s/%s", g_weights, name);
    FILE *f = fopen(path, "ab");
    TM_ASSERT(f);
    fclose(f);
    TM_ASSERT(truncate(path, (off_t)want) == 0);
    return true;
}

static void check_slice(const tm_checkpoint *c, const tm_st_tensor *t, tm_slice s, tm_dtype to)
{
    static const float zeros[NUMBERS_MAX];
    size_t cols = t->ndim == 2 ? (size_t)t->dims[1] : 1,
           bytes = s.rows * s.cols * tm_dtype_size(to);
    tm_err err = TM_ERR_INIT;
    char *dst = malloc(bytes ? bytes : 1);
    TM_ASSERT(dst && tm_checkpoint_read(c, t, cols, s, dst, to, &err) == TM_OK);
    TM_ASSERT(bytes <= sizeof(zeros) && memcmp(dst, zeros, bytes) == 0);
    free(dst);
}

static void read_all(const tm_checkpoint *c)
{
    for (size_t i = 0; i < tm_checkpoint_count(c); i++) {
        const tm_st_tensor *t = tm_checkpoint_at(c, i);
        size_t rows = (size_t)t->dims[0], cols = t->ndim == 2 ? (size_t)t->dims[1] : 1;
        TM_ASSERT(rows >= 1 && cols >= 1 && rows * cols <= NUMBERS_MAX);
        check_slice(c, t, (tm_slice){0, rows, 0, cols}, TM_DTYPE_BF16);
        check_slice(c, t, (tm_slice){rows / 3, rows - rows / 3, cols / 2, cols - cols / 2},
                    TM_DTYPE_F32);
        check_slice(c, t, (tm_slice){rows - 1, 1, cols - 1, 1}, TM_DTYPE_F16);
    }
}

/* Few enough numbers and files? */
static bool is_small(const tm_ws_config *c)
{
    size_t h = (size_t)c->hidden, d = (size_t)c->head_dim, numbers = 2 * (size_t)c->vocab * h;
    size_t heads = (size_t)(c->heads + c->kv_heads);
    for (int i = 0; i < c->layers && numbers <= NUMBERS_MAX; i++)
        numbers += h * (2 * heads * d + 3 * (size_t)c->ffn[i] + 2);
    return numbers <= NUMBERS_MAX && c->layers <= 4 && c->tp <= 4;
}

static void open_files(const tm_folder *f, const tm_arch *a)
{
    make_dir();
    for (int i = 0; i < TRIES_MAX; i++) {
        tm_checkpoint *c = NULL;
        tm_err err = TM_ERR_INIT;
        if (tm_folder_checkpoint(f, a, &c, &err) == TM_OK) {
            read_all(c);
            tm_checkpoint_close(c);
            break;
        }
        TM_ASSERT(err.msg[0] && !strchr(err.msg, '\n'));
        if (!obey(err.msg))
            break;
    }
    clean();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool started;
    if (!started)
        tm_log_init("workspace_fuzz", TM_LOG_ERROR, TM_LOG_AUTO);
    started = true;
    static tm_arch a; /* large */
    static tm_ws_config c;
    tm_err err = TM_ERR_INIT;
    json_t *stand_in = NULL;
    bool yaml = size == 0 || data[0] != '[';
    tm_status st = tm_ws_config_parse(&c, (const char *)data, size, yaml, &err);
    if (st == TM_OK)
        st = tm_workspace_stand_in(&c, &stand_in, &err);
    if (st == TM_OK)
        st = tm_arch_read(&a, stand_in, &err);
    json_decref(stand_in);
    if (st == TM_OK)
        st = tm_workspace_settle(&a, &c, false, &err);
    if (st != TM_OK) {
        TM_ASSERT(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    if (!is_small(&c))
        return 0;
    static tm_folder f;
    make_dir();
    f = (tm_folder){.workspace = &c};
    snprintf(f.dir, sizeof(f.dir), "%s", g_dir);
    open_files(&f, &a);
    return 0;
}
