/* A role's rows are put together in the engine's own order (all of q, of k, of v; gate; up) by the rules that loading
 * uses, so every family that fits comes out right; then each part is written turned, its rows chosen by a list. */
#include "engine/model/workspace_write.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "engine/model/model_impl.h"
#include "engine/model/workspace_config.h"
#include "engine/weights/convert.h"

#define NAME_MAX_LEN 256
#define BLOCK_BYTES  ((size_t)4 << 20)
#define ROW_MAX      ((size_t)1 << 24) /* of a file: the largest vocabulary */

/* What writing needs. Numbers are 2 bytes each (bf16 or f16). */
typedef struct writer {
    const char *dir;
    const tm_workspace_opts *o;
    const tm_arch *a;
    const tm_checkpoint *c;
    tm_shard whole;
    tm_dtype dtype;
    tm_workspace_sizes z;
    tm_workspace_report *report;
    uint16_t *block; /* [BLOCK_BYTES / 2 + ROW_MAX] on its way to a file */
    tm_err *err;
} writer;

/* ---- rows of a role ---- */

/* Rows lo..hi of a role's weight, read from the tensors that hold them. */
typedef struct window {
    const writer *w;
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

/* Rows lo..hi of the role in dst; of a role of experts, those of one expert. */
static tm_status read_rows(const writer *w, tm_role role, int layer, int expert, int lo, int hi,
                           uint16_t *dst)
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

static tm_status take(const writer *w, size_t rows, size_t cols, uint16_t **out)
{
    *out = calloc(TM_MAX(rows * cols, (size_t)1), sizeof(uint16_t));
    return *out ? TM_OK
                : TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "a tensor of %zu x %zu: out of memory", rows,
                          cols);
}

/* ---- files ---- */

/* An open file that counts. */
typedef struct out_file {
    writer *w;
    FILE *f;
    char name[NAME_MAX_LEN];
} out_file;

static tm_status __attribute__((format(printf, 3, 4)))
out_open(out_file *o, writer *w, const char *fmt, ...)
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

static tm_status out_put(out_file *o, const uint16_t *x, size_t n)
{
    o->w->report->bytes += n * sizeof(*x);
    if (fwrite(x, sizeof(*x), n, o->f) == n)
        return TM_OK;
    return TM_FAIL(o->w->err, TM_STATUS_IO, "%s/%s: %m", o->w->dir, o->name);
}

static tm_status out_close(out_file *o, tm_status st)
{
    if (fclose(o->f) != 0 && st == TM_OK)
        return TM_FAIL(o->w->err, TM_STATUS_IO, "%s/%s: %m", o->w->dir, o->name);
    return st;
}

/* Writes [cols, n]: column j holds row src[j] of x [*, cols], zeros where that is -1. */
static tm_status put_turned(out_file *o, const uint16_t *x, size_t cols, const int *src, size_t n)
{
    uint16_t *block = o->w->block;
    size_t most = TM_MAX(BLOCK_BYTES / sizeof(uint16_t) / n, (size_t)1);
    for (size_t c = 0; c < cols; c += most) {
        size_t wide = TM_MIN(most, cols - c);
        for (size_t j = 0; j < n; j++)
            for (size_t i = 0; i < wide; i++)
                block[i * n + j] = src[j] < 0 ? 0 : x[(size_t)src[j] * cols + c + i];
        TM_TRY(out_put(o, block, wide * n));
    }
    return TM_OK;
}

/* Writes [n, rows]: row i holds column col0 + i of x [rows, cols], zeros past the last. */
static tm_status put_columns(out_file *o, const uint16_t *x, size_t rows, size_t cols, size_t col0,
                             size_t n)
{
    uint16_t *block = o->w->block;
    size_t most = TM_MAX(BLOCK_BYTES / sizeof(uint16_t) / rows, (size_t)1);
    for (size_t i = 0; i < n; i += most) {
        size_t high = TM_MIN(most, n - i);
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < high; k++) {
                size_t col = col0 + i + k;
                block[k * rows + r] = col < cols ? x[r * cols + col] : 0;
            }
        TM_TRY(out_put(o, block, high * rows));
    }
    return TM_OK;
}

/* ---- attention ---- */

/* Row i of a head as the engine has it, for place i of the stored one. */
static int row_at(const writer *w, int place)
{
    int half = w->a->head_dim / 2;
    if (w->a->rope.interleaved)
        return place;
    return place % 2 == 0 ? place / 2 : half + place / 2;
}

/* Rows of q, k and v that part `rank` holds, side by side. */
static size_t qkv_rows(const writer *w, int rank, int *src)
{
    const tm_arch *a = w->a;
    int d = a->head_dim, repeat = w->z.kv_heads / a->kv_heads;
    int heads = a->heads / w->o->tp, kv = w->z.kv_heads / w->o->tp;
    size_t n = 0;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < d; i++)
            src[n++] = (rank * heads + h) * d + row_at(w, i);
    for (int part = 0; part < 2; part++)
        for (int h = 0; h < kv; h++) {
            int head = a->heads + part * a->kv_heads + (rank * kv + h) / repeat;
            for (int i = 0; i < d; i++)
                src[n++] = head * d + (part == 0 ? row_at(w, i) : i);
        }
    return n;
}

static tm_status write_qkv(writer *w, tm_role role, int layer, const char *ext)
{
    int rows, cols;
    uint16_t *x;
    tm_role_size(w->a, &w->whole, role, &rows, &cols);
    int *src =
        malloc((size_t)(w->a->heads + 2 * w->z.kv_heads) * (size_t)w->a->head_dim * sizeof(*src));
    if (!src)
        return TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = take(w, (size_t)rows, (size_t)cols, &x);
    if (st == TM_OK)
        st = read_rows(w, role, layer, 0, 0, rows, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        out_file o;
        size_t n = qkv_rows(w, r, src);
        st = out_open(&o, w, "layers.%d.attention.w_qkv.%d.%s", layer, r, ext);
        if (st == TM_OK)
            st = out_close(&o, put_turned(&o, x, (size_t)cols, src, n));
    }
    free(src);
    free(x);
    return st;
}

/* A bias of the output for each part: a copy, or zeros where q, k and v alone have one. */
static tm_status write_o_bias(writer *w, int layer)
{
    size_t n = (size_t)w->a->hidden;
    uint16_t *x;
    TM_TRY(take(w, n, 1, &x));
    tm_status st = TM_OK;
    if (w->a->o_bias)
        st = read_rows(w, TM_ROLE_O_BIAS, layer, 0, 0, (int)n, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        out_file o;
        st = out_open(&o, w, "layers.%d.attention.wo.%d.bias", layer, r);
        if (st == TM_OK)
            st = out_close(&o, out_put(&o, x, n));
    }
    free(x);
    return st;
}

/* A vector of one file; pairs: in the order of a rotated head. */
static tm_status write_vector(writer *w, tm_role role, int layer, bool pairs, const char *name)
{
    int n, one;
    uint16_t *x, *y = NULL;
    out_file o;
    tm_role_size(w->a, &w->whole, role, &n, &one);
    tm_status st = take(w, 2 * (size_t)n, 1, &x);
    if (st != TM_OK)
        return st;
    y = x + n;
    st = read_rows(w, role, layer, 0, 0, n, x);
    for (int i = 0; i < n; i++)
        y[i] = x[pairs ? row_at(w, i) : i];
    if (st == TM_OK)
        st = out_open(&o, w, "%s", name);
    if (st == TM_OK)
        st = out_close(&o, out_put(&o, y, (size_t)n));
    free(x);
    return st;
}

/* A matrix whose input is split: rows hidden, columns `cols` padded to `padded`. */
static tm_status write_in_split(writer *w, tm_role role, int layer, int expert, int cols,
                                int padded, const char *prefix)
{
    size_t h = (size_t)w->a->hidden, per = (size_t)(padded / w->o->tp);
    uint16_t *x;
    TM_TRY(take(w, h, (size_t)cols, &x));
    int lo = expert * (int)h;
    tm_status st = read_rows(w, role, layer, expert, lo, lo + (int)h, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        out_file o;
        st = out_open(&o, w, "%s.%d.weight", prefix, r);
        if (st == TM_OK)
            st = out_close(&o, put_columns(&o, x, h, (size_t)cols, (size_t)r * per, per));
    }
    free(x);
    return st;
}

static tm_status write_attention(writer *w, int layer)
{
    const tm_arch *a = w->a;
    char name[NAME_MAX_LEN];
    int q = a->heads * a->head_dim;
    TM_TRY(write_qkv(w, TM_ROLE_QKV, layer, "weight"));
    if (a->qkv_bias) {
        TM_TRY(write_qkv(w, TM_ROLE_QKV_BIAS, layer, "bias"));
        TM_TRY(write_o_bias(w, layer));
    }
    snprintf(name, sizeof(name), "layers.%d.attention.wo", layer);
    TM_TRY(write_in_split(w, TM_ROLE_O, layer, 0, q, q, name));
    if (!tm_family_has(a->family, TM_ROLE_Q_NORM))
        return TM_OK;
    snprintf(name, sizeof(name), "layers.%d.attention.q_norm", layer);
    TM_TRY(write_vector(w, TM_ROLE_Q_NORM, layer, true, name));
    snprintf(name, sizeof(name), "layers.%d.attention.k_norm", layer);
    return write_vector(w, TM_ROLE_K_NORM, layer, true, name);
}

/* ---- feed-forward ---- */

/* rows of x [rows, hidden] as parts of the outputs, padded with zeros to `padded`. */
static tm_status write_out_split(writer *w, const uint16_t *x, int rows, int padded,
                                 const char *prefix)
{
    int per = padded / w->o->tp;
    int *src = malloc((size_t)per * sizeof(*src));
    tm_status st = src ? TM_OK : TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        out_file o;
        for (int i = 0; i < per; i++)
            src[i] = r * per + i < rows ? r * per + i : -1;
        st = out_open(&o, w, "%s.%d.weight", prefix, r);
        if (st == TM_OK)
            st = out_close(&o, put_turned(&o, x, (size_t)w->a->hidden, src, (size_t)per));
    }
    free(src);
    return st;
}

/* Gate, up and down of one width. */
static tm_status write_mlp(writer *w, tm_role gate_up, tm_role down, int layer, int expert,
                           int width, int padded, const char *prefix)
{
    char name[NAME_MAX_LEN];
    size_t h = (size_t)w->a->hidden;
    uint16_t *x;
    TM_TRY(take(w, 2 * (size_t)width, h, &x));
    int lo = expert * 2 * width;
    tm_status st = read_rows(w, gate_up, layer, expert, lo, lo + 2 * width, x);
    snprintf(name, sizeof(name), "%.200s.w1", prefix);
    if (st == TM_OK)
        st = write_out_split(w, x, width, padded, name);
    snprintf(name, sizeof(name), "%.200s.w3", prefix);
    if (st == TM_OK)
        st = write_out_split(w, x + (size_t)width * h, width, padded, name);
    free(x);
    snprintf(name, sizeof(name), "%.200s.w2", prefix);
    return st == TM_OK ? write_in_split(w, down, layer, expert, width, padded, name) : st;
}

/* A small matrix [rows, hidden] in one turned file. */
static tm_status write_gate(writer *w, tm_role role, int layer, int rows, const char *name)
{
    uint16_t *x;
    out_file o;
    int *src = malloc((size_t)rows * sizeof(*src));
    if (!src)
        return TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int i = 0; i < rows; i++)
        src[i] = i;
    tm_status st = take(w, (size_t)rows, (size_t)w->a->hidden, &x);
    if (st == TM_OK)
        st = read_rows(w, role, layer, 0, 0, rows, x);
    if (st == TM_OK)
        st = out_open(&o, w, "layers.%d.moe_ffn.%s.weight", layer, name);
    if (st == TM_OK)
        st = out_close(&o, put_turned(&o, x, (size_t)w->a->hidden, src, (size_t)rows));
    free(src);
    free(x);
    return st;
}

static tm_status write_experts(writer *w, int layer)
{
    const tm_moe_arch *m = &w->a->moe;
    char name[NAME_MAX_LEN];
    TM_TRY(write_gate(w, TM_ROLE_ROUTER, layer, m->experts, "gate"));
    for (int e = 0; e < m->experts; e++) {
        snprintf(name, sizeof(name), "layers.%d.moe_ffn.experts.%d", layer, e);
        TM_TRY(write_mlp(w, TM_ROLE_EXPERTS_GATE_UP, TM_ROLE_EXPERTS_DOWN, layer, e, m->ffn,
                         w->z.expert_ffn, name));
    }
    if (m->shared == 0)
        return TM_OK;
    snprintf(name, sizeof(name), "layers.%d.feed_forward", layer);
    TM_TRY(write_mlp(w, TM_ROLE_SHARED_GATE_UP, TM_ROLE_SHARED_DOWN, layer, 0, m->shared,
                     w->z.shared, name));
    return m->shared_gate ? write_gate(w, TM_ROLE_SHARED_GATE, layer, 1, "shared_gate") : TM_OK;
}

static tm_status write_layer(writer *w, int layer)
{
    char name[NAME_MAX_LEN];
    snprintf(name, sizeof(name), "layers.%d.attention_norm.weight", layer);
    TM_TRY(write_vector(w, TM_ROLE_ATTN_NORM, layer, false, name));
    snprintf(name, sizeof(name), "layers.%d.ffn_norm.weight", layer);
    TM_TRY(write_vector(w, TM_ROLE_FFN_NORM, layer, false, name));
    TM_TRY(write_attention(w, layer));
    if (w->a->layer[layer].moe)
        return write_experts(w, layer);
    snprintf(name, sizeof(name), "layers.%d.feed_forward", layer);
    return write_mlp(w, TM_ROLE_GATE_UP, TM_ROLE_DOWN, layer, 0, w->a->ffn, w->z.ffn, name);
}

/* ---- embedding and head ---- */

/* All rows of the embedding or the head, padded with zeros. */
static tm_status read_vocabulary(const writer *w, tm_role role, uint16_t **out)
{
    uint16_t *x;
    TM_TRY(take(w, (size_t)w->z.vocab_padded, (size_t)w->a->hidden, &x));
    tm_status st = read_rows(w, role, 0, 0, 0, w->a->vocab, x);
    if (st == TM_OK)
        *out = x;
    else
        free(x);
    return st;
}

static tm_status write_rows_whole(writer *w, const uint16_t *x, const char *name)
{
    out_file o;
    TM_TRY(out_open(&o, w, "%s.weight", name));
    return out_close(&o, out_put(&o, x, (size_t)w->z.vocab_padded * (size_t)w->a->hidden));
}

/* The embedding, split by the hidden size. */
static tm_status write_hidden_split(writer *w, const uint16_t *x)
{
    size_t h = (size_t)w->a->hidden, per = h / (size_t)w->o->tp;
    tm_status st = TM_OK;
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        out_file o;
        st = out_open(&o, w, "tok_embeddings.%d.weight", r);
        if (st != TM_OK)
            break;
        for (size_t i = 0; st == TM_OK && i < (size_t)w->z.vocab_padded; i++)
            st = out_put(&o, x + i * h + (size_t)r * per, per);
        st = out_close(&o, st);
    }
    return st;
}

static tm_status write_ends(writer *w)
{
    uint16_t *x = NULL;
    TM_TRY(write_vector(w, TM_ROLE_FINAL_NORM, 0, false, "norm.weight"));
    TM_TRY(read_vocabulary(w, TM_ROLE_EMBED, &x));
    tm_status st = w->o->yaml ? write_hidden_split(w, x) : write_rows_whole(w, x, "tok_embeddings");
    if (st == TM_OK && !w->a->tie) {
        free(x);
        x = NULL;
        st = read_vocabulary(w, TM_ROLE_HEAD, &x);
    }
    if (st == TM_OK)
        st = w->o->yaml ? write_out_split(w, x, w->z.vocab_padded, w->z.vocab_padded, "output")
                        : write_rows_whole(w, x, "output");
    free(x);
    return st;
}

/* ---- the whole ---- */

static int up_to(int n, int multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* Sizes as they are stored; what cannot be cut into tp parts is refused with its name. */
static tm_status settle_sizes(writer *w)
{
    const tm_arch *a = w->a;
    int tp = w->o->tp;
    bool pad = w->o->yaml;
    w->z = (tm_workspace_sizes){.kv_heads = a->kv_heads,
                                .ffn = pad ? up_to(a->ffn, tp) : a->ffn,
                                .expert_ffn = up_to(a->moe.ffn, tp),
                                .shared = up_to(a->moe.shared, tp),
                                .vocab_padded = up_to(a->vocab, tp)};
    if (a->kv_heads < tp && tp % a->kv_heads == 0)
        w->z.kv_heads = tp;
    const struct {
        const char *key;
        int size;
    } cuts[] = {{"num_attention_heads", a->heads},
                {"num_key_value_heads", w->z.kv_heads},
                {"intermediate_size", w->z.ffn},
                {"hidden_size", pad ? a->hidden : 0}};
    for (size_t i = 0; i < TM_ARRAY_LEN(cuts); i++)
        if (cuts[i].size % tp != 0)
            return TM_FAIL(w->err, TM_STATUS_CONFIG, "%s %d is not divisible by tp %d", cuts[i].key,
                           cuts[i].size, tp);
    return TM_OK;
}

/* The number format of the first layer's q decides for all. */
static void settle_dtype(writer *w)
{
    tm_dtype dtype = TM_DTYPE_F16;
    for (int i = 0; i < w->a->family->row_count; i++) {
        const tm_tensor_row *row = &w->a->family->rows[i];
        char name[TM_TENSOR_NAME_MAX];
        tm_load_tensor_name(name, w->a, row, 0, 0);
        if (row->role == TM_ROLE_QKV && tm_need_met(w->a, row->need, 0)) {
            tm_checkpoint_is_float(tm_checkpoint_find(w->c, name), &dtype);
            break;
        }
    }
    w->report->rounded = dtype == TM_DTYPE_F32;
    w->dtype = dtype == TM_DTYPE_BF16 ? TM_DTYPE_BF16 : TM_DTYPE_F16;
    w->report->weight_type = w->dtype == TM_DTYPE_BF16 ? "bf16" : "fp16";
}

static tm_status write_config(writer *w)
{
    tm_buf b;
    char path[4096];
    const char *name = w->o->yaml ? "config.yaml" : "config.ini";
    tm_buf_init(&b, 0);
    tm_workspace_config_text(&b, w->a, &w->z, w->o, w->report->weight_type);
    FILE *f = tm_path_join(path, sizeof(path), w->dir, name) ? fopen(path, "wbx") : NULL;
    bool ok = f && !b.failed && fwrite(b.data, 1, b.len, f) == b.len;
    ok = (!f || fclose(f) == 0) && ok;
    tm_buf_deinit(&b);
    return ok ? TM_OK : TM_FAIL(w->err, TM_STATUS_IO, "%s/%s: %m", w->dir, name);
}

static tm_status write_all(writer *w)
{
    settle_dtype(w);
    TM_TRY(settle_sizes(w));
    TM_TRY(write_config(w));
    TM_TRY(write_ends(w));
    for (int i = 0; i < w->a->layers; i++)
        TM_TRY(write_layer(w, i));
    return TM_OK;
}

tm_status tm_workspace_write(const char *model, const char *weights, const tm_workspace_opts *opts,
                             tm_workspace_report *report, tm_err *err)
{
    tm_folder folder;
    tm_checkpoint *c = NULL;
    int64_t parameters;
    tm_workspace_report r = {.files = 0};
    tm_arch *a = calloc(1, sizeof(*a));
    writer w = {.dir = weights, .o = opts, .a = a, .report = &r, .err = err};
    w.block = malloc(BLOCK_BYTES + ROW_MAX * sizeof(uint16_t));
    tm_status st = tm_folder_open(&folder, model, a, err);
    if (!a || !w.block)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (st == TM_OK)
        st = tm_workspace_can_hold(a, opts->yaml, err);
    if (st == TM_OK)
        st = tm_folder_checkpoint(&folder, a, &c, err);
    if (st == TM_OK)
        st = tm_load_check(a, c, &parameters, err);
    if (st == TM_OK)
        st = tm_shard_make(&w.whole, a, 1, 0, err);
    w.c = c;
    if (st == TM_OK)
        st = write_all(&w);
    if (st == TM_OK) {
        snprintf(r.arch, sizeof(r.arch), "%s", a->arch);
        snprintf(r.family, sizeof(r.family), "%s", a->family->name);
        r.scaled_rope = a->rope.type != TM_ROPE_DEFAULT && a->rope.type != TM_ROPE_DYNAMIC;
        *report = r;
    }
    tm_checkpoint_close(c);
    tm_folder_close(&folder);
    free(w.block);
    free(a);
    return st;
}
