/* Files of a workspace and the gathering of slices out of them.
 *
 * Files are mapped when they are first needed, a bounded number at a time: a model of experts has more files than a
 * process may have mappings. Where the tensor's columns lie far apart in the file, a tile is turned at a time, so that
 * both sides stay in the cache. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/check.h"
#include "engine/weights/convert.h"
#include "engine/weights/workspace_impl.h"
#include "engine/weights/workspace_text.h"

#define TILE_ROWS    64
#define TILE_COLS    128
#define PATH_MAX_LEN 4096

static int by_name(const void *a, const void *b)
{
    const tm_ws_file *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static tm_status add_file(tm_ws_source *s, size_t *cap, const char *name, size_t size, tm_err *err)
{
    if (s->file_count == TM_WS_FILES_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "more than %zu files", TM_WS_FILES_MAX);
    if (s->file_count == *cap) {
        size_t more = *cap ? 2 * *cap : 256;
        tm_ws_file *grown = realloc(s->files, more * sizeof(*grown));
        if (!grown)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
        s->files = grown;
        *cap = more;
    }
    char *copy = strdup(name);
    if (!copy)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    s->files[s->file_count++] = (tm_ws_file){copy, size, false};
    return TM_OK;
}

tm_status tm_ws_files_list(tm_ws_source *s, tm_err *err)
{
    size_t cap = 0;
    DIR *d = opendir(s->dir);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "the folder of weights cannot be read: %m");
    tm_status st = TM_OK;
    for (struct dirent *e; st == TM_OK && (e = readdir(d)) != NULL;) {
        struct stat sb;
        if (e->d_name[0] == '.' || fstatat(dirfd(d), e->d_name, &sb, 0) != 0 ||
            !S_ISREG(sb.st_mode))
            continue;
        st = add_file(s, &cap, e->d_name, (size_t)sb.st_size, err);
    }
    closedir(d);
    if (st == TM_OK && s->file_count > 0)
        qsort(s->files, s->file_count, sizeof(s->files[0]), by_name);
    return st;
}

int tm_ws_file_find(const tm_ws_source *s, const char *name)
{
    const tm_ws_file key = {.name = (char *)(uintptr_t)name};
    if (s->file_count == 0)
        return -1;
    const tm_ws_file *f = bsearch(&key, s->files, s->file_count, sizeof(key), by_name);
    return f ? (int)(f - s->files) : -1;
}

void tm_ws_source_close(tm_ws_source *s)
{
    if (!s)
        return;
    for (int i = 0; i < TM_WS_MAPS_MAX; i++)
        if (s->slots[i].file >= 0)
            tm_map_close(&s->slots[i].map);
    for (size_t i = 0; i < s->file_count; i++)
        free(s->files[i].name);
    for (size_t i = 0; i < s->view_count; i++)
        free(s->tensors[i].name);
    free(s->files);
    free(s->views);
    free(s->tensors);
    free(s->dir);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

const char *tm_ws_source_file(const tm_ws_source *s, int tensor)
{
    return s->files[s->views[tensor].file[0]].name;
}

void tm_ws_source_hash(const tm_ws_source *s, tm_sha256_ctx *h)
{
    static const char *const configs[] = {"config.yaml", "config.ini"};
    for (size_t i = 0; i < TM_ARRAY_LEN(configs); i++) {
        char path[PATH_MAX_LEN], *text;
        size_t len;
        if (tm_path_join(path, sizeof(path), s->dir, configs[i]) && tm_file_exists(path) &&
            tm_file_read(path, TM_WS_TEXT_MAX, &text, &len, NULL) == TM_OK) {
            tm_sha256_add(h, text, len);
            free(text);
        }
    }
    for (size_t i = 0; i < s->file_count; i++) {
        const tm_ws_file *f = &s->files[i];
        uint64_t size = f->size;
        if (!f->used)
            continue;
        tm_sha256_add(h, f->name, strlen(f->name) + 1);
        tm_sha256_add(h, &size, sizeof(size));
    }
}

/* A slot that holds the file's numbers, mapped, for one user more; under the lock. A mapping that nobody uses may go. A
 * file that was cut since then would end the process at the first touch, so its size is looked at for each slice. */
static tm_status take_slot(tm_ws_source *s, int file, tm_ws_slot **out, tm_err *err)
{
    const tm_ws_file *f = &s->files[file];
    char path[PATH_MAX_LEN];
    struct stat sb;
    if (!tm_path_join(path, sizeof(path), s->dir, f->name))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: the folder's path is too long", f->name);
    if (stat(path, &sb) != 0 || (size_t)sb.st_size != f->size)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: the file changed while it was read", f->name);
    for (int i = 0; i < TM_WS_MAPS_MAX; i++)
        if (s->slots[i].file == file) {
            s->slots[i].users++;
            *out = &s->slots[i];
            return TM_OK;
        }
    /* There is one: the slices that are read at once have at most as many parts as there are slots. */
    for (int i = 0; s->slots[s->next_slot].users > 0; i++) {
        TM_ASSERT(i < TM_WS_MAPS_MAX);
        s->next_slot = (s->next_slot + 1) % TM_WS_MAPS_MAX;
    }
    tm_ws_slot *slot = &s->slots[s->next_slot];
    s->next_slot = (s->next_slot + 1) % TM_WS_MAPS_MAX;
    if (slot->file >= 0)
        tm_map_close(&slot->map);
    slot->file = -1;
    TM_TRY(tm_map_open(&slot->map, path, err));
    if (slot->map.len != f->size) {
        tm_map_close(&slot->map);
        return TM_FAIL(err, TM_STATUS_DATA, "%s: the file changed while it was read", f->name);
    }
    slot->file = file;
    slot->users = 1;
    *out = slot;
    return TM_OK;
}

/* The row as it is stored. */
static size_t stored_row(const tm_ws_view *v, size_t row)
{
    if (v->head_dim == 0)
        return row;
    size_t d = (size_t)v->head_dim, head = row / d, i = row % d;
    if (v->pairs)
        i = i < d / 2 ? 2 * i : 2 * (i - d / 2) + 1;
    return head * (size_t)v->head_step * d + i;
}

/* What reading one slice needs. */
typedef struct gather {
    tm_ws_source *s;
    const tm_ws_view *v;
    size_t row0, col0, cols; /* of the slice */
    char *dst;
    tm_dtype to;
    tm_ws_slot *slot[TM_WS_PARTS_MAX]; /* NULL: not mapped for this slice yet */
    tm_err *err;
} gather;

/* The number of a part's element that stands at (row as stored, column). */
static size_t place(const tm_ws_view *v, size_t row, size_t col, size_t *part)
{
    *part = (v->by_row ? row : col) / v->per;
    size_t r = v->by_row ? row - *part * v->per : row;
    size_t c = v->by_row ? col : col - *part * v->per;
    return v->base + r * v->rs + c * v->cs;
}

/* n columns of a row, all in one part, converted. */
static void copy_run(const gather *g, size_t row, size_t col, size_t n)
{
    size_t part, in = tm_dtype_size(g->v->dtype), out = tm_dtype_size(g->to);
    size_t at = place(g->v, stored_row(g->v, row), col, &part);
    char *dst = g->dst + ((row - g->row0) * g->cols + (col - g->col0)) * out;
    tm_convert(dst, g->to, g->slot[part]->map.data + at * in, g->v->dtype, n);
}

/* A tile whose columns are far apart: turned first, then converted row by row. */
static void copy_tile(const gather *g, size_t row, size_t rows, size_t col, size_t cols)
{
    unsigned char tile[TILE_ROWS * TILE_COLS * sizeof(float)];
    const unsigned char *src[TILE_ROWS];
    const tm_ws_view *v = g->v;
    size_t in = tm_dtype_size(v->dtype), out = tm_dtype_size(g->to);
    for (size_t r = 0; r < rows; r++) {
        size_t part, at = place(v, stored_row(v, row + r), col, &part);
        src[r] = g->slot[part]->map.data + at * in;
    }
    for (size_t c = 0; c < cols; c++)
        for (size_t r = 0; r < rows; r++)
            if (in == sizeof(uint16_t))
                memcpy(tile + (r * TILE_COLS + c) * 2, src[r] + c * v->cs * 2, 2);
            else
                memcpy(tile + (r * TILE_COLS + c) * 4, src[r] + c * v->cs * 4, 4);
    for (size_t r = 0; r < rows; r++) {
        char *dst = g->dst + ((row + r - g->row0) * g->cols + (col - g->col0)) * out;
        tm_convert(dst, g->to, tile + r * TILE_COLS * in, v->dtype, cols);
    }
}

/* Maps the parts that the slice lies in. */
static tm_status map_parts(gather *g, size_t rows)
{
    const tm_ws_view *v = g->v;
    for (size_t i = 0; i < (v->by_row ? rows : g->cols); i++) {
        size_t part;
        place(v, v->by_row ? stored_row(v, g->row0 + i) : g->row0, g->col0 + (v->by_row ? 0 : i),
              &part);
        TM_ASSERT(part < (size_t)v->parts);
        if (!g->slot[part])
            TM_TRY(take_slot(g->s, v->file[part], &g->slot[part], g->err));
    }
    return TM_OK;
}

static void copy_slice(const gather *g, size_t rows)
{
    const tm_ws_view *v = g->v;
    size_t high = v->cs == 1 ? 1 : TILE_ROWS, wide = v->cs == 1 ? g->cols : TILE_COLS;
    for (size_t r = 0; r < rows; r += high)
        for (size_t c = 0; c < g->cols;) {
            size_t n = TM_MIN(wide, g->cols - c);
            if (!v->by_row) /* up to the end of the part */
                n = TM_MIN(n, v->per - (g->col0 + c) % v->per);
            if (v->cs == 1)
                copy_run(g, g->row0 + r, g->col0 + c, n);
            else
                copy_tile(g, g->row0 + r, TM_MIN(high, rows - r), g->col0 + c, n);
            c += n;
        }
}

tm_status tm_ws_source_read(tm_ws_source *s, int tensor, size_t row0, size_t rows, size_t col0,
                            size_t cols, void *dst, tm_dtype to, tm_err *err)
{
    const tm_ws_view *v = &s->views[tensor];
    gather g = {
        .s = s, .v = v, .row0 = row0, .col0 = col0, .cols = cols, .dst = dst, .to = to, .err = err};
    TM_ASSERT(row0 + rows <= v->rows && col0 + cols <= v->cols);
    pthread_mutex_lock(&s->lock);
    tm_status st = map_parts(&g, rows);
    pthread_mutex_unlock(&s->lock);
    if (st == TM_OK)
        copy_slice(&g, rows);
    pthread_mutex_lock(&s->lock);
    for (int i = 0; i < v->parts; i++)
        if (g.slot[i])
            g.slot[i]->users--;
    pthread_mutex_unlock(&s->lock);
    return st;
}
