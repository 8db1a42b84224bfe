/* What a workspace is written from and to: rows of a role, put together by the rules that loading uses, and files whose
 * matrices are turned on the way, a block at a time. */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/file.h"
#include "engine/model/loader.h"
#include "engine/model/workspace_writer.h"
#include "engine/weights/convert.h"

/* ---- rows of a role ---- */

/* Rows lo..hi of a role's weight, read from the tensors that hold them. */
typedef struct window {
    const tm_ws_writer *w;
    const tm_st_tensor *tensor;
    size_t cols;
    int lo, hi;
    bool unit_rows;
    uint16_t *dst;
} window;

static tm_status read_unit_rows(const window *v, tm_slice s, uint16_t *dst)
{
    float *x = malloc(v->cols * sizeof(*x));
    if (!x)
        return TM_FAIL(v->w->err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = TM_OK;
    for (size_t i = 0; st == TM_OK && i < s.rows; i++) {
        tm_slice row = {s.row0 + i, 1, 0, v->cols};
        st = tm_checkpoint_read(v->w->c, v->tensor, v->cols, row, x, TM_DTYPE_F32, v->w->err);
        if (st != TM_OK)
            break;
        tm_load_unit_row(x, v->cols);
        tm_convert(dst + i * v->cols, v->w->dtype, x, TM_DTYPE_F32, v->cols);
    }
    free(x);
    return st;
}

static tm_status copy_run(void *arg, tm_row_run run)
{
    const window *v = arg;
    int first = TM_MAX(run.dst, v->lo), last = TM_MIN(run.dst + run.n, v->hi);
    TM_ASSERT(!run.turned); /* no family that fits has such tensors */
    if (first >= last)
        return TM_OK;
    tm_slice s = {(size_t)(run.src + first - run.dst), (size_t)(last - first), 0, v->cols};
    uint16_t *dst = v->dst + (size_t)(first - v->lo) * v->cols;
    if (v->unit_rows)
        return read_unit_rows(v, s, dst);
    return tm_checkpoint_read(v->w->c, v->tensor, v->cols, s, dst, v->w->dtype, v->w->err);
}

tm_status tm_ws_read_rows(const tm_ws_writer *w, tm_role role, int layer, int expert, int lo,
                          int hi, uint16_t *dst)
{
    const tm_arch *a = w->a;
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        char name[TM_TENSOR_NAME_MAX];
        int rows, cols;
        if (row->role != role || !tm_need_met(a, row->need, layer))
            continue;
        int e = tm_tensor_experts(a, row) > 1 ? expert : 0;
        tm_load_tensor_name(name, a, row, layer, e);
        tm_tensor_size(a, row, &rows, &cols);
        window v = {.w = w,
                    .tensor = tm_checkpoint_find(w->c, name),
                    .cols = (size_t)cols,
                    .lo = lo,
                    .hi = hi,
                    .unit_rows = role == TM_ROLE_HEAD && a->head_norm,
                    .dst = dst};
        TM_ASSERT(v.tensor); /* tm_load_check saw it */
        TM_TRY(tm_tensor_runs(a, &w->whole, row, e, copy_run, &v));
    }
    return TM_OK;
}

tm_status tm_ws_take(const tm_ws_writer *w, size_t rows, size_t cols, uint16_t **out)
{
    *out = calloc(TM_MAX(rows * cols, (size_t)1), sizeof(uint16_t));
    return *out ? TM_OK
                : TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "a tensor of %zu x %zu: out of memory", rows,
                          cols);
}

/* ---- files ---- */

tm_status tm_ws_out_open(tm_ws_out *o, tm_ws_writer *w, const char *fmt, ...)
{
    char path[4096];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(o->name, sizeof(o->name), fmt, ap);
    va_end(ap);
    o->w = w;
    o->f = tm_path_join(path, sizeof(path), w->dir, o->name) ? fopen(path, "wbx") : NULL;
    if (!o->f)
        return TM_FAIL(w->err, TM_STATUS_IO, "%s/%s: %m", w->dir, o->name);
    w->report->files++;
    return TM_OK;
}

tm_status tm_ws_out_put(tm_ws_out *o, const uint16_t *x, size_t n)
{
    o->w->report->bytes += n * sizeof(*x);
    if (fwrite(x, sizeof(*x), n, o->f) == n)
        return TM_OK;
    return TM_FAIL(o->w->err, TM_STATUS_IO, "%s/%s: %m", o->w->dir, o->name);
}

tm_status tm_ws_out_close(tm_ws_out *o, tm_status st)
{
    if (fclose(o->f) != 0 && st == TM_OK)
        return TM_FAIL(o->w->err, TM_STATUS_IO, "%s/%s: %m", o->w->dir, o->name);
    return st;
}

tm_status tm_ws_out_turned(tm_ws_out *o, const uint16_t *x, size_t cols, const int *src, size_t n)
{
    uint16_t *block = o->w->block;
    size_t most = TM_MAX(TM_WS_BLOCK_BYTES / sizeof(uint16_t) / n, (size_t)1);
    for (size_t c = 0; c < cols; c += most) {
        size_t wide = TM_MIN(most, cols - c);
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i < wide; i++)
                block[i * n + j] = src[j] < 0 ? 0 : x[(size_t)src[j] * cols + c + i];
        TM_TRY(tm_ws_out_put(o, block, wide * n));
    }
    return TM_OK;
}

tm_status tm_ws_out_columns(tm_ws_out *o, const uint16_t *x, size_t rows, size_t cols, size_t col0,
                            size_t n)
{
    uint16_t *block = o->w->block;
    size_t most = TM_MAX(TM_WS_BLOCK_BYTES / sizeof(uint16_t) / rows, (size_t)1);
    for (size_t i = 0; i < n; i += most) {
        size_t high = TM_MIN(most, n - i);
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < high; k++) {
                size_t col = col0 + i + k;
                block[k * rows + r] = col < cols ? x[r * cols + col] : 0;
            }
        TM_TRY(tm_ws_out_put(o, block, high * rows));
    }
    return TM_OK;
}
