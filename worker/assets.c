/* The files a router needs to turn text into this model's tokens and back. Read once at start and kept
 * packed: a router asks for them by digest and keeps no model folder of its own. */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/model_dir.h"
#include "worker/internal.h"

#define ASSETS_MAX      16
#define ASSET_BYTES_MAX ((size_t)48 << 20) /* all together: one message, below its 64 MiB */

typedef struct asset_set {
    PB(Asset) asset[ASSETS_MAX];
    PB(Asset) * ptr[ASSETS_MAX];
    char *names[ASSETS_MAX];
    char *data[ASSETS_MAX];
    size_t count, bytes;
} asset_set;

/* Takes data. */
static tm_status put_asset(asset_set *set, const char *name, char *data, size_t len, tm_err *err)
{
    size_t i = set->count;
    set->names[i] = strdup(name);
    if (!set->names[i]) {
        free(data);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    set->data[i] = data;
    turbomesh__worker__v1__asset__init(&set->asset[i]);
    set->asset[i].name = set->names[i];
    set->asset[i].data.data = (uint8_t *)data;
    set->asset[i].data.len = len;
    set->ptr[i] = &set->asset[i];
    set->bytes += len;
    set->count++;
    return TM_OK;
}

static tm_status add_asset(asset_set *set, const char *dir, const char *name, tm_err *err)
{
    char path[4096], *data = NULL;
    size_t len = 0;
    if (!tm_path_join(path, sizeof(path), dir, name))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: path too long", dir);
    if (!tm_file_exists(path))
        return TM_OK;
    if (set->count == ASSETS_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "%s: more than %d tokenizer files", dir,
                       ASSETS_MAX);
    TM_TRY(tm_file_read(path, ASSET_BYTES_MAX - set->bytes, &data, &len, err));
    return put_asset(set, name, data, len, err);
}

/* A workspace's config names its chat template. */
static tm_status add_template_name(asset_set *set, const char *model_dir, tm_err *err)
{
    char name[128];
    tm_model_template_name(name, sizeof(name), model_dir);
    if (!name[0] || set->count == ASSETS_MAX)
        return TM_OK;
    char *data = strdup(name);
    if (!data)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    return put_asset(set, TM_MODEL_TEMPLATE_FILE, data, strlen(data), err);
}

static tm_status add_tiktoken(asset_set *set, const char *dir, tm_err *err)
{
    DIR *d = opendir(dir);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s: cannot read the model folder: %m", dir);
    tm_status st = TM_OK;
    for (struct dirent *e; st == TM_OK && (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        if (n > 9 && strcmp(e->d_name + n - 9, ".tiktoken") == 0)
            st = add_asset(set, dir, e->d_name, err);
    }
    closedir(d);
    return st;
}

static tm_status pack_assets(const asset_set *set, const char *digest, char **out, size_t *len,
                             tm_err *err)
{
    PB(AssetsReply) reply = TURBOMESH__WORKER__V1__ASSETS_REPLY__INIT;
    char *digest_copy = strdup(digest);
    if (!digest_copy)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    reply.digest = digest_copy;
    reply.n_asset = set->count;
    reply.asset = (PB(Asset) **)set->ptr;
    size_t size = turbomesh__worker__v1__assets_reply__get_packed_size(&reply);
    char *bytes = malloc(size);
    if (bytes) {
        *len = turbomesh__worker__v1__assets_reply__pack(&reply, (uint8_t *)bytes);
        *out = bytes;
    }
    free(digest_copy);
    return bytes ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
}

tm_status worker_assets_load(const char *model_dir, const char *digest, char **out, size_t *len,
                             tm_err *err)
{
    static const char *const names[] = {"config.json",
                                        "generation_config.json",
                                        "tokenizer.json",
                                        "tokenizer_config.json",
                                        "tokenizer.model",
                                        "chat_template.jinja",
                                        "special_tokens_map.json",
                                        "added_tokens.json",
                                        "chat_template.json",
                                        "vocab.json",
                                        "merges.txt",
                                        "tekken.json"};
    asset_set *set = calloc(1, sizeof(*set));
    if (!set)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = TM_OK;
    char dir[4096];
    if (!tm_model_text_dir(dir, sizeof(dir), model_dir))
        st = TM_FAIL(err, TM_STATUS_CONFIG, "%s: path too long", model_dir);
    for (size_t i = 0; st == TM_OK && i < TM_ARRAY_LEN(names); i++)
        st = add_asset(set, dir, names[i], err);
    if (st == TM_OK)
        st = add_tiktoken(set, dir, err);
    if (st == TM_OK)
        st = add_template_name(set, model_dir, err);
    if (st == TM_OK)
        st = pack_assets(set, digest, out, len, err);
    for (size_t i = 0; i < set->count; i++) {
        free(set->names[i]);
        free(set->data[i]);
    }
    free(set);
    return st;
}
