/* The second pass of loading: this rank's share of each tensor is copied.
 *
 * Copies go through a small staging buffer in the device's number format, a few rows at a time, so that
 * loading needs no second copy of a weight. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "engine/model/model_impl.h"
#include "engine/weights/convert.h"

#define STAGING_BYTES ((size_t)4 << 20)

/* Where a role's numbers go: a tm_weight (for a bias, the weight that has it) or a vector, in tm_layer, or in
 * tm_model for roles that are not of a layer. */
#define IN_LAYER(f) offsetof(tm_layer, f)
#define IN_MODEL(f) offsetof(tm_model, f)
static const size_t places[TM_ROLE_COUNT] = {
    [TM_ROLE_EMBED] = IN_MODEL(embed),
    [TM_ROLE_FINAL_NORM] = IN_MODEL(final_norm),
    [TM_ROLE_FINAL_NORM_BIAS] = IN_MODEL(final_norm_b),
    [TM_ROLE_HEAD] = IN_MODEL(head),
    [TM_ROLE_ATTN_NORM] = IN_LAYER(attn_norm),
    [TM_ROLE_ATTN_NORM_BIAS] = IN_LAYER(attn_norm_b),
    [TM_ROLE_POST_ATTN_NORM] = IN_LAYER(post_attn_norm),
    [TM_ROLE_QKV] = IN_LAYER(qkv),
    [TM_ROLE_QKV_BIAS] = IN_LAYER(qkv),
    [TM_ROLE_Q_NORM] = IN_LAYER(q_norm),
    [TM_ROLE_K_NORM] = IN_LAYER(k_norm),
    [TM_ROLE_Q_A] = IN_LAYER(q_a),
    [TM_ROLE_Q_A_NORM] = IN_LAYER(q_a_norm),
    [TM_ROLE_Q_B] = IN_LAYER(q_b),
    [TM_ROLE_KV_A] = IN_LAYER(kv_a),
    [TM_ROLE_KV_A_NORM] = IN_LAYER(kv_a_norm),
    [TM_ROLE_KV_B_K] = IN_LAYER(kv_b_k),
    [TM_ROLE_KV_B_V] = IN_LAYER(kv_b_v),
    [TM_ROLE_O] = IN_LAYER(o),
    [TM_ROLE_O_BIAS] = IN_LAYER(o),
    [TM_ROLE_FFN_NORM] = IN_LAYER(ffn_norm),
    [TM_ROLE_FFN_NORM_BIAS] = IN_LAYER(ffn_norm_b),
    [TM_ROLE_POST_FFN_NORM] = IN_LAYER(post_ffn_norm),
    [TM_ROLE_GATE_UP] = IN_LAYER(gate_up),
    [TM_ROLE_GATE_UP_BIAS] = IN_LAYER(gate_up),
    [TM_ROLE_DOWN] = IN_LAYER(down),
    [TM_ROLE_DOWN_BIAS] = IN_LAYER(down),
    [TM_ROLE_ROUTER] = IN_LAYER(router),
    [TM_ROLE_CHOICE_BIAS] = IN_LAYER(choice_bias),
    [TM_ROLE_EXPERTS_GATE_UP] = IN_LAYER(experts_gate_up),
    [TM_ROLE_EXPERTS_DOWN] = IN_LAYER(experts_down),
    [TM_ROLE_SHARED_GATE_UP] = IN_LAYER(shared_gate_up),
    [TM_ROLE_SHARED_DOWN] = IN_LAYER(shared_down),
    [TM_ROLE_SHARED_GATE] = IN_LAYER(shared_gate),
};

static void *place_of(tm_model *m, tm_role role, int layer)
{
    bool in_layer = tm_role_info_get(role)->of_layer;
    return (in_layer ? (char *)&m->layers[layer] : (char *)m) + places[role];
}

/* The first tensor of a role takes its memory (q before k and v). */
tm_status tm_load_role_memory(tm_model *m, tm_role role, int layer, char **base, tm_err *err)
{
    const tm_role_info *info = tm_role_info_get(role);
    tm_weight *weight = place_of(m, role, layer);
    const float **vector = place_of(m, role, layer);
    const void *have = info->kind == TM_ROLE_VECTOR ? (const void *)*vector
                       : info->kind == TM_ROLE_BIAS ? (const void *)weight->bias
                                                    : weight->data;
    void *p = (void *)(uintptr_t)have;
    if (!p) {
        int rows, cols;
        tm_role_size(&m->arch, &m->shard, role, &rows, &cols);
        tm_dtype dtype = info->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32;
        size_t bytes = (size_t)rows * (size_t)cols * tm_dtype_size(dtype);
        tm_status st = tm_model_take(m, bytes, &p, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "%s of layer %d", info->name, layer);
            return st;
        }
        m->info.weight_bytes += bytes;
        if (info->kind == TM_ROLE_VECTOR)
            *vector = p;
        else if (info->kind == TM_ROLE_BIAS)
            weight->bias = p;
        else
            *weight = (tm_weight){.dtype = dtype, .n = rows, .k = cols, .data = p};
    }
    *base = p;
    return TM_OK;
}

/* What copying one tensor needs. */
typedef struct copy {
    tm_model *m;
    const tm_checkpoint *c;
    const tm_st_tensor *tensor;
    char *base, *staging, *turned; /* two staging buffers */
    size_t cols_all, col0, cols;
    bool unit_rows; /* rows are divided by their length */
    tm_dtype dtype;
    tm_err *err;
} copy;

static tm_status put(const copy *k, size_t dst_row, const void *src, size_t rows, size_t row_bytes)
{
    char *dst = k->base + dst_row * row_bytes;
    if (k->m->backend->dev->upload(k->m->dev, dst, src, rows * row_bytes) != TM_OK)
        return TM_FAIL(k->err, TM_STATUS_IO, "tensor %s: the copy to the device failed",
                       k->tensor->name);
    return TM_OK;
}

/* out[cols, rows] = the transpose of in[rows, cols], numbers of `size` bytes. */
static void turn(char *out, const char *in, size_t rows, size_t cols, size_t size)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            memcpy(out + (c * rows + r) * size, in + (r * cols + c) * size, size);
}

/* A block of n rows becomes n columns: a few of its columns at a time, each a whole row of the weight. */
static tm_status copy_turned(const copy *k, tm_row_run run)
{
    size_t n = (size_t)run.n, size = tm_dtype_size(k->dtype);
    size_t per = TM_MAX(STAGING_BYTES / (n * size), (size_t)1);
    for (size_t i = 0; i < k->cols; i += per) {
        tm_slice s = {(size_t)run.src, n, k->col0 + i, TM_MIN(per, k->cols - i)};
        TM_TRY(tm_checkpoint_read(k->c, k->tensor, k->cols_all, s, k->staging, k->dtype, k->err));
        turn(k->turned, k->staging, n, s.cols, size);
        TM_TRY(put(k, (size_t)run.dst + i, k->turned, s.cols, n * size));
    }
    return TM_OK;
}

void tm_load_unit_row(float *x, size_t n)
{
    double sq = 0;
    for (size_t i = 0; i < n; i++)
        sq += (double)x[i] * (double)x[i];
    float inv = (float)(1.0 / TM_MAX(sqrt(sq), 1e-7));
    for (size_t i = 0; i < n; i++)
        x[i] *= inv;
}

/* Rows of the slice, read in f32, divided by their lengths and then rounded. */
static tm_status read_unit_rows(const copy *k, tm_slice s)
{
    float *x = (float *)(void *)k->turned;
    TM_TRY(tm_checkpoint_read(k->c, k->tensor, k->cols_all, s, x, TM_DTYPE_F32, k->err));
    for (size_t r = 0; r < s.rows; r++)
        tm_load_unit_row(x + r * s.cols, s.cols);
    tm_convert(k->staging, k->dtype, x, TM_DTYPE_F32, s.rows * s.cols);
    return TM_OK;
}

static tm_status copy_run(void *arg, tm_row_run run)
{
    const copy *k = arg;
    size_t row_bytes = k->cols * tm_dtype_size(k->dtype);
    size_t per = TM_MAX(STAGING_BYTES / (k->cols * sizeof(float)), (size_t)1);
    if (run.turned)
        return copy_turned(k, run);
    for (size_t i = 0; i < (size_t)run.n; i += per) {
        tm_slice s = {(size_t)run.src + i, TM_MIN(per, (size_t)run.n - i), k->col0, k->cols};
        TM_TRY(k->unit_rows ? read_unit_rows(k, s)
                            : tm_checkpoint_read(k->c, k->tensor, k->cols_all, s, k->staging,
                                                 k->dtype, k->err));
        TM_TRY(put(k, (size_t)run.dst + i, k->staging, s.rows, row_bytes));
    }
    return TM_OK;
}

/* Rows that pad the vocabulary of the last ranks. */
static tm_status zero_padding(tm_model *m, char *base, size_t row_bytes, tm_err *err)
{
    int real = TM_MAX(TM_MIN(m->shard.vocab, m->arch.vocab - m->shard.vocab0), 0);
    char *zeros = calloc(1, row_bytes);
    if (!zeros)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "padding of the vocabulary: out of memory");
    tm_status st = TM_OK;
    for (int i = real; st == TM_OK && i < m->shard.vocab; i++)
        st = m->backend->dev->upload(m->dev, base + (size_t)i * row_bytes, zeros, row_bytes);
    free(zeros);
    return st == TM_OK ? TM_OK : TM_FAIL(err, st, "padding of the vocabulary: the copy failed");
}

static tm_status load_tensor(copy *k, const tm_tensor_row *row, int layer, int expert)
{
    char name[TM_TENSOR_NAME_MAX];
    int rows, cols_all, col0, cols;
    tm_model *m = k->m;
    tm_load_tensor_name(name, &m->arch, row, layer, expert);
    tm_tensor_size(&m->arch, row, &rows, &cols_all);
    tm_tensor_cols(&m->arch, &m->shard, row, &col0, &cols);
    k->tensor = tm_checkpoint_find(k->c, name);
    k->cols_all = (size_t)cols_all;
    k->col0 = (size_t)col0;
    k->cols = (size_t)cols;
    k->unit_rows = row->role == TM_ROLE_HEAD && m->arch.head_norm;
    k->dtype = tm_role_info_get(row->role)->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32;
    TM_ASSERT(k->tensor); /* tm_load_check saw it */
    TM_TRY(tm_load_role_memory(m, row->role, layer, &k->base, k->err));
    TM_TRY(tm_tensor_runs(&m->arch, &m->shard, row, expert, copy_run, k));
    if (row->role == TM_ROLE_EMBED || row->role == TM_ROLE_HEAD)
        return zero_padding(m, k->base, k->cols * tm_dtype_size(k->dtype), k->err);
    return TM_OK;
}

static tm_status load_row(copy *k, const tm_tensor_row *row)
{
    const tm_arch *a = &k->m->arch;
    if (tm_role_info_get(row->role)->summed && k->m->shard.rank > 0)
        return TM_OK;
    for (int layer = 0; layer < tm_load_layers(a, row); layer++) {
        if (!tm_need_met(a, row->need, layer))
            continue;
        for (int e = 0; e < tm_tensor_experts(a, row); e++)
            TM_TRY(load_tensor(k, row, layer, e));
    }
    return TM_OK;
}

/* Roles that linear works on as a whole. Experts and the halves of kv_b are used in parts. */
static bool is_prepared(tm_role role)
{
    tm_role_kind kind = tm_role_info_get(role)->kind;
    return (kind == TM_ROLE_MATRIX || kind == TM_ROLE_MATRIX_F32) && role != TM_ROLE_EMBED &&
           role != TM_ROLE_EXPERTS_GATE_UP && role != TM_ROLE_EXPERTS_DOWN &&
           role != TM_ROLE_KV_B_K && role != TM_ROLE_KV_B_V;
}

/* Bytes that a decode step of one sequence reads of a weight: of the experts the chosen ones alone. */
static size_t step_bytes(const tm_model *m, tm_role role, const tm_weight *w)
{
    size_t bytes = (size_t)w->n * (size_t)w->k * tm_dtype_size(w->dtype);
    if (role == TM_ROLE_EMBED)
        return 0;
    if (role == TM_ROLE_EXPERTS_GATE_UP || role == TM_ROLE_EXPERTS_DOWN)
        return bytes / (size_t)m->arch.moe.experts * (size_t)m->arch.moe.top_k;
    return bytes;
}

typedef tm_status (*weight_fn)(tm_model *m, tm_role role, tm_weight *w, tm_err *err);

/* Calls fn for each matrix that was loaded. */
static tm_status each_weight(tm_model *m, weight_fn fn, tm_err *err)
{
    for (int role = 0; role < TM_ROLE_COUNT; role++) {
        const tm_role_info *info = tm_role_info_get((tm_role)role);
        if (info->kind == TM_ROLE_VECTOR || info->kind == TM_ROLE_BIAS)
            continue;
        for (int i = 0; i < (info->of_layer ? m->arch.layers : 1); i++) {
            tm_weight *w = place_of(m, (tm_role)role, i);
            if (w->data)
                TM_TRY(fn(m, (tm_role)role, w, err));
        }
    }
    return TM_OK;
}

static tm_status prepare(tm_model *m, tm_role role, tm_weight *w, tm_err *err)
{
    if (is_prepared(role))
        TM_TRY(m->backend->ops->linear_prepare(m->dev, w, err));
    m->info.step_read_bytes += step_bytes(m, role, w);
    return TM_OK;
}

static tm_status release(tm_model *m, tm_role role, tm_weight *w, tm_err *err)
{
    (void)err;
    if (is_prepared(role))
        m->backend->ops->linear_release(m->dev, w);
    return TM_OK;
}

tm_status tm_load_prepare(tm_model *m, tm_err *err)
{
    if (m->arch.tie)
        m->head = m->embed;
    return each_weight(m, prepare, err);
}

tm_status tm_load_weights(tm_model *m, const tm_checkpoint *c, tm_err *err)
{
    const tm_family *f = m->arch.family;
    /* One row of the widest tensor always fits, and one column of the tallest that is turned. */
    size_t widest = STAGING_BYTES / sizeof(float);
    for (int i = 0; i < f->row_count; i++) {
        int rows, cols;
        tm_tensor_size(&m->arch, &f->rows[i], &rows, &cols);
        widest = TM_MAX(widest, (size_t)cols);
    }
    widest = TM_MAX(widest, (size_t)TM_MAX(m->arch.moe.ffn, m->arch.mla.nope));
    char *staging = malloc(2 * widest * sizeof(float));
    if (!staging)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "loading: out of memory");
    copy k = {.m = m, .c = c, .staging = staging, .err = err};
    k.turned = staging + widest * sizeof(float);
    tm_status st = TM_OK;
    for (int i = 0; st == TM_OK && i < f->row_count; i++)
        st = load_row(&k, &f->rows[i]);
    free(staging);
    return st == TM_OK ? tm_load_prepare(m, err) : st;
}

void tm_load_release(tm_model *m)
{
    if (m->layers) /* else refused before anything was loaded */
        each_weight(m, release, NULL);
}
