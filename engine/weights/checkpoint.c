/* Finds the files of a checkpoint, and copies slices out of them.
 *
 * Headers are mapped; numbers are read with pread: from the page cache that is a copy by the kernel, several times as
 * fast as touching a mapping page by page, it goes straight into pinned memory, and a file that was cut meanwhile is
 * an error instead of a bus error.
 *
 * The index decides which shard a tensor comes from. Shard names must be plain file names: an index is
 * downloaded data and may not point outside its folder. */
#include "engine/weights/checkpoint.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "engine/weights/convert.h"

#define SHARDS_MAX      4096
#define INDEX_BYTES_MAX ((size_t)256 << 20)
#define INDEX_NAME      "model.safetensors.index.json"
#define SINGLE_NAME     "model.safetensors"
#define PATH_MAX_LEN    4096
#define PIECE_BYTES     ((size_t)64 << 10) /* read at once where numbers are converted: stays in L2 */

typedef struct shard {
    char *name;
    int fd; /* -1: none */
    tm_map map;
    tm_st_list list;
} shard;

struct tm_checkpoint {
    shard *shards;
    int count;
    tm_st_tensor *tensors; /* sorted by name; names belong to the shards' lists */
    size_t n;
    tm_ws_source *ws; /* not NULL: the tensors are its own, and there are no shards */
};

static int by_name(const void *a, const void *b)
{
    const tm_st_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static bool plain_name(const char *name)
{
    size_t n = strlen(name);
    return n > 0 && n <= 255 && name[0] != '.' && !strchr(name, '/') && !strchr(name, '\\');
}

static tm_status shard_open(shard *s, const char *dir, const char *name, tm_err *err)
{
    char path[PATH_MAX_LEN];
    if (!tm_path_join(path, sizeof(path), dir, name))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: the folder's path is too long", name);
    size_t size;
    s->fd = -1;
    s->name = strdup(name);
    if (!s->name)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", name);
    TM_TRY(tm_map_open(&s->map, path, err));
    TM_TRY(tm_file_open(path, &s->fd, &size, err));
    if (size != s->map.len)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: the file changed while it was opened", name);
    return tm_st_parse(&s->list, s->map.data, s->map.len, name, err);
}

/* The shard's number, opened on first sight. */
static tm_status shard_of(tm_checkpoint *c, const char *dir, const char *tensor, const char *name,
                          int *out, tm_err *err)
{
    for (int i = c->count - 1; i >= 0; i--)
        if (strcmp(c->shards[i].name, name) == 0) {
            *out = i;
            return TM_OK;
        }
    if (!plain_name(name))
        return TM_FAIL(err, TM_STATUS_DATA, INDEX_NAME ": %s: '%.100s' is not a plain file name",
                       tensor, name);
    if (c->count == SHARDS_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, INDEX_NAME ": more than %d files", SHARDS_MAX);
    char path[PATH_MAX_LEN];
    if (!tm_path_join(path, sizeof(path), dir, name) || !tm_file_exists(path))
        return TM_FAIL(err, TM_STATUS_DATA, "%s: the shard %s that " INDEX_NAME " names is missing",
                       dir, name);
    c->count++;
    TM_TRY(shard_open(&c->shards[c->count - 1], dir, name, err));
    qsort(c->shards[c->count - 1].list.tensors, c->shards[c->count - 1].list.count,
          sizeof(tm_st_tensor), by_name);
    *out = c->count - 1;
    return TM_OK;
}

static tm_status add_indexed(tm_checkpoint *c, const char *dir, const char *tensor, const json_t *v,
                             tm_err *err)
{
    const char *file = json_string_value(v);
    if (!file)
        return TM_FAIL(err, TM_STATUS_DATA,
                       INDEX_NAME ": weight_map: %.200s: expected a file name, got %s", tensor,
                       tm_json_type_name(v));
    int i = 0;
    TM_TRY(shard_of(c, dir, tensor, file, &i, err));
    const tm_st_list *l = &c->shards[i].list;
    const tm_st_tensor key = {.name = (char *)(uintptr_t)tensor};
    const tm_st_tensor *t = bsearch(&key, l->tensors, l->count, sizeof(key), by_name);
    if (!t)
        return TM_FAIL(err, TM_STATUS_DATA,
                       "%s: tensor %.200s is not in it, though " INDEX_NAME " says so", file,
                       tensor);
    c->tensors[c->n] = *t;
    c->tensors[c->n++].shard = i;
    return TM_OK;
}

static tm_status open_indexed(tm_checkpoint *c, const char *dir, const char *path, tm_err *err)
{
    json_t *root = NULL;
    tm_status st = tm_json_load_file(path, INDEX_BYTES_MAX, &root, err);
    if (st != TM_OK)
        return st;
    json_t *map = tm_json_get(root, "weight_map"), *v;
    const char *name;
    size_t n = json_object_size(map);
    c->shards = calloc(SHARDS_MAX, sizeof(shard));
    c->tensors = calloc(n ? n : 1, sizeof(tm_st_tensor));
    if (!json_is_object(map) || n == 0 || n > TM_ST_TENSORS_MAX)
        st = TM_FAIL(err, TM_STATUS_DATA,
                     INDEX_NAME ": weight_map: expected an object of 1 to %zu tensors",
                     TM_ST_TENSORS_MAX);
    else if (!c->shards || !c->tensors)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, INDEX_NAME ": out of memory");
    if (st == TM_OK)
        json_object_foreach(map, name, v)
        {
            st = add_indexed(c, dir, name, v, err);
            if (st != TM_OK)
                break;
        }
    json_decref(root);
    return st;
}

static tm_status open_single(tm_checkpoint *c, const char *dir, tm_err *err)
{
    c->shards = calloc(1, sizeof(shard));
    if (!c->shards)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, SINGLE_NAME ": out of memory");
    c->count = 1;
    TM_TRY(shard_open(&c->shards[0], dir, SINGLE_NAME, err));
    const tm_st_list *l = &c->shards[0].list;
    c->tensors = calloc(l->count ? l->count : 1, sizeof(tm_st_tensor));
    if (!c->tensors)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, SINGLE_NAME ": out of memory");
    memcpy(c->tensors, l->tensors, l->count * sizeof(tm_st_tensor));
    c->n = l->count;
    return TM_OK;
}

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n > m && strcmp(name + n - m, end) == 0;
}

/* The first file of the folder that has weights in a format that is not read. */
static bool find_foreign(const char *dir, char *name, size_t size, bool *pickle)
{
    static const char *const pickles[] = {".bin", ".pt", ".pth", ".ckpt"};
    bool found = false;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        bool is_pickle = false, other = ends_with(e->d_name, ".gguf");
        for (size_t i = 0; i < TM_ARRAY_LEN(pickles); i++)
            is_pickle = is_pickle || ends_with(e->d_name, pickles[i]);
        /* The first by name, so that the message does not depend on the file system. */
        if ((is_pickle || other) && (!found || strcmp(e->d_name, name) < 0)) {
            snprintf(name, size, "%.*s", (int)size - 1, e->d_name);
            *pickle = is_pickle;
            found = true;
        }
    }
    if (d)
        closedir(d);
    return found;
}

/* No safetensors: says what there is instead and what to do. */
static tm_status refuse_folder(const char *dir, tm_err *err)
{
    char name[256];
    bool pickle = false;
    if (!find_foreign(dir, name, sizeof(name), &pickle))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "%s: neither " SINGLE_NAME " nor " INDEX_NAME " is there", dir);
    if (!pickle)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "%s: %s: GGUF files are not read; take the model's safetensors files", dir,
                       name);
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "%s: %s is a pickle, which can run code when it is opened, and is not read: "
                   "convert it to safetensors, in Python by AutoModelForCausalLM.from_pretrained("
                   "DIR).save_pretrained(OUT, safe_serialization=True)",
                   dir, name);
}

tm_status tm_checkpoint_open(tm_checkpoint **out, const char *dir, tm_err *err)
{
    char index[PATH_MAX_LEN], single[PATH_MAX_LEN];
    if (!tm_path_join(index, sizeof(index), dir, INDEX_NAME) ||
        !tm_path_join(single, sizeof(single), dir, SINGLE_NAME))
        return TM_FAIL(err, TM_STATUS_CONFIG, "the model folder's path is too long");
    bool indexed = tm_file_exists(index);
    if (!indexed && !tm_file_exists(single))
        return refuse_folder(dir, err);
    tm_checkpoint *c = calloc(1, sizeof(*c));
    if (!c)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "checkpoint: out of memory");
    tm_status st = indexed ? open_indexed(c, dir, index, err) : open_single(c, dir, err);
    if (st != TM_OK) {
        tm_checkpoint_close(c);
        return st;
    }
    qsort(c->tensors, c->n, sizeof(c->tensors[0]), by_name);
    *out = c;
    return TM_OK;
}

tm_status tm_checkpoint_open_workspace(tm_checkpoint **out, const char *dir,
                                       const tm_ws_config *config, const tm_ws_model *model,
                                       tm_err *err)
{
    tm_checkpoint *c = calloc(1, sizeof(*c));
    if (!c)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "checkpoint: out of memory");
    tm_status st = tm_ws_source_open(&c->ws, dir, config, model, err);
    if (st == TM_OK) {
        const tm_st_tensor *tensors = tm_ws_source_tensors(c->ws, &c->n);
        c->tensors = calloc(c->n, sizeof(*tensors));
        if (c->tensors)
            memcpy(c->tensors, tensors, c->n * sizeof(*tensors));
        else
            st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "checkpoint: out of memory");
    }
    if (st != TM_OK) {
        tm_checkpoint_close(c);
        return st;
    }
    qsort(c->tensors, c->n, sizeof(c->tensors[0]), by_name);
    *out = c;
    return TM_OK;
}

void tm_checkpoint_close(tm_checkpoint *c)
{
    if (!c)
        return;
    tm_ws_source_close(c->ws);
    for (int i = 0; i < c->count; i++) {
        tm_st_list_deinit(&c->shards[i].list);
        tm_map_close(&c->shards[i].map);
        if (c->shards[i].fd >= 0)
            close(c->shards[i].fd);
        free(c->shards[i].name);
    }
    free(c->shards);
    free(c->tensors);
    free(c);
}

size_t tm_checkpoint_count(const tm_checkpoint *c)
{
    return c->n;
}

const tm_st_tensor *tm_checkpoint_at(const tm_checkpoint *c, size_t i)
{
    return &c->tensors[i];
}

const tm_st_tensor *tm_checkpoint_find(const tm_checkpoint *c, const char *name)
{
    const tm_st_tensor key = {.name = (char *)(uintptr_t)name};
    return bsearch(&key, c->tensors, c->n, sizeof(key), by_name);
}

const char *tm_checkpoint_file(const tm_checkpoint *c, const tm_st_tensor *t)
{
    return c->ws ? tm_ws_source_file(c->ws, t->shard) : c->shards[t->shard].name;
}

void tm_checkpoint_hash(const tm_checkpoint *c, tm_sha256_ctx *h)
{
    if (c->ws)
        tm_ws_source_hash(c->ws, h);
    for (int i = 0; i < c->count; i++)
        tm_sha256_add(h, c->shards[i].map.data, c->shards[i].list.header_bytes);
}

bool tm_checkpoint_is_float(const tm_st_tensor *t, tm_dtype *out)
{
    static const struct {
        tm_st_dtype file;
        tm_dtype type;
    } map[] = {{TM_ST_F32, TM_DTYPE_F32}, {TM_ST_BF16, TM_DTYPE_BF16}, {TM_ST_F16, TM_DTYPE_F16}};
    for (size_t i = 0; i < TM_ARRAY_LEN(map); i++)
        if (map[i].file == t->dtype) {
            *out = map[i].type;
            return true;
        }
    return false;
}

bool tm_checkpoint_equal(const tm_checkpoint *c, const tm_st_tensor *a, const tm_st_tensor *b)
{
    TM_ASSERT(!c->ws); /* a workspace shows no head beside a tied embedding */
    return a->dtype == b->dtype && a->ndim == b->ndim && a->bytes == b->bytes &&
           memcmp(a->dims, b->dims, (size_t)a->ndim * sizeof(a->dims[0])) == 0 &&
           memcmp(c->shards[a->shard].map.data + a->offset,
                  c->shards[b->shard].map.data + b->offset, a->bytes) == 0;
}

/* n bytes of a shard: all of them, or an error. */
static tm_status read_bytes(const shard *s, size_t at, void *dst, size_t n, tm_err *err)
{
    size_t got = 0;
    if (!tm_file_read_at(s->fd, dst, n, at, &got))
        return TM_FAIL(err, TM_STATUS_IO, "%s: %m", s->name);
    if (got < n)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: the file shrank or vanished while it was read",
                       s->name);
    return TM_OK;
}

/* n numbers that lie one after another in a shard. */
static tm_status read_numbers(const shard *s, size_t at, tm_dtype from, void *dst, tm_dtype to,
                              size_t n, tm_err *err)
{
    unsigned char piece[PIECE_BYTES];
    size_t in = tm_dtype_size(from), out = tm_dtype_size(to);
    if (from == to)
        return read_bytes(s, at, dst, n * in, err);
    for (size_t i = 0; i < n; i += PIECE_BYTES / in) {
        size_t m = TM_MIN(n - i, PIECE_BYTES / in);
        TM_TRY(read_bytes(s, at + i * in, piece, m * in, err));
        tm_convert((char *)dst + i * out, to, piece, from, m);
    }
    return TM_OK;
}

tm_status tm_checkpoint_read(const tm_checkpoint *c, const tm_st_tensor *t, size_t cols_all,
                             tm_slice s, void *dst, tm_dtype to, tm_err *err)
{
    if (c->ws)
        return tm_ws_source_read(c->ws, t->shard, s.row0, s.rows, s.col0, s.cols, dst, to, err);
    const shard *sh = &c->shards[t->shard];
    tm_dtype from = TM_DTYPE_F32;
    if (!tm_checkpoint_is_float(t, &from))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "%s: tensor %s is %s, expected F32, BF16 or F16",
                       sh->name, t->name, tm_st_dtype_name(t->dtype));
    size_t in = tm_dtype_size(from), outb = tm_dtype_size(to);
    TM_ASSERT(s.col0 + s.cols <= cols_all && (s.row0 + s.rows) * cols_all * in <= t->bytes);
    size_t at = t->offset + (s.row0 * cols_all + s.col0) * in;
    if (s.cols == cols_all)
        return read_numbers(sh, at, from, dst, to, s.rows * cols_all, err);
    for (size_t i = 0; i < s.rows; i++)
        TM_TRY(read_numbers(sh, at + i * cols_all * in, from, (char *)dst + i * s.cols * outb, to,
                            s.cols, err));
    return TM_OK;
}
